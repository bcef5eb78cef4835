"""Which rank of how many the caller is, for code that must not know of communication.

`dtrain.distributed` tells (`set_world`), `DistributedSampler` asks (`world`). Before any process
group has been heard of, asking raises torch's error.
"""

from __future__ import annotations

from collections.abc import Callable

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
