"""Which rank of how many the caller is and who its peers are, for code that must not know of
communication.

`dtrain.distributed` tells (`set_world`, `set_peers`); `DistributedSampler` asks who it is
(`world`), SyncBatchNorm with whom it shares statistics (`peers`). Before any process group has been
heard of, the first raises torch's error and the second answers: nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

World = Callable[[], tuple[int, int]]


def nobody() -> tuple[int, int]:
    """The answer as long as nobody has told: ValueError in torch's words."""
    raise ValueError(
        "Default process group has not been initialized, please make sure to call "
        "init_process_group. Or give DistributedSampler both num_replicas and rank."
    )


_world: World = nobody


def set_world(world: World) -> None:
    """Let `world()` -> (world size, rank) of the calling thread be the answer.

    It is asked anew each time, and raises ValueError where there is no process group.
    """
    global _world
    _world = world


def world() -> tuple[int, int]:
    """(world size, rank) of the calling thread; ValueError without a process group."""
    return _world()


class Peers(Protocol):
    """The ranks of a group, for a calculation on arrays that all of them make together.

    Every rank calls the same method with an array of the same shape and dtype; both block until
    all have, at most the group's timeout.
    """

    def gather(self, values: Any) -> Any:
        """The 1-D array of every rank as rows, in rank order."""

    def sum(self, values: Any) -> Any:
        """The sum over ranks, in rank order, as a new array."""


def alone(process_group: Any) -> Peers | None:
    """The answer as long as nobody has told: there are no peers."""
    return None


_peers: Callable[[Any], Peers | None] = alone


def set_peers(peers: Callable[[Any], Peers | None]) -> None:
    """Let `peers(process_group)` be the answer; a group of None is the default one."""
    global _peers
    _peers = peers


def peers(process_group: Any) -> Peers | None:
    """The ranks of a group, or None when there is no group or the caller is alone in it."""
    return _peers(process_group)
