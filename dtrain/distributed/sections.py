"""What only rank 0 does, or does first: `rank0_first`, `rank0_section`.

The others wait for rank 0 itself, not for a clock: its block may take long (a download, an
evaluation) without anybody's timeout. They stop waiting when it has finished, has raised (they
raise too, and say what), or is gone (`PeerLost`). A collective inside a block is refused at once:
nobody else would make it.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, ClassVar

import numpy as np

from dtrain.comm.collectives import Broadcast
from dtrain.comm.record import call_site
from dtrain.comm.store.base import Timeout
from dtrain.distributed.work import seconds
from dtrain.distributed.world import ProcessGroup, alone, resolve
from dtrain.errors import DistError

# "For ever" with an end: a peer that dies or stops is noticed within seconds.
A_WEEK = 7 * 24 * 3600.0

_ROOM = 1024  # bytes of the sentence with which rank 0 fails


class _Told(Broadcast):
    """What rank 0 tells when its block is done."""

    __slots__ = ()
    patient = True


class _Rank0Block:
    """A block in which the ranks do different things.

    `timeout` (seconds or timedelta, default a week) bounds the wait for rank 0 of `group`.
    """

    others_follow: ClassVar[bool]  # whether the others run the block after rank 0

    def __init__(self, group: Any = None, timeout: Timeout | None = None) -> None:
        self.group: ProcessGroup = resolve(group)
        self.patience = seconds(timeout) or A_WEEK
        self.mine = self.group.rank() == 0
        self.place = f"{type(self).__name__} at {call_site()}"

    def __enter__(self) -> bool:
        """Whether this is rank 0; with `rank0_first` the others wait here."""
        if self.others_follow and not self.mine:
            self._exchange("")
        self._token = alone.set(self.place)
        return self.mine

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        alone.reset(self._token)
        if self.mine:
            self._exchange("" if error is None else f"{type(error).__name__}: {error}")
        elif not self.others_follow and error is None:
            self._exchange("")

    def _exchange(self, reason: str) -> None:
        """Tell from rank 0, or hear there, that its block is done, or why it failed."""
        told = np.zeros(_ROOM, np.uint8)
        if self.mine:
            text = reason.encode()[:_ROOM]
            told[: len(text)] = np.frombuffer(text, np.uint8)
        self.group.issue(_Told(told, 0), timeout=self.patience)
        reason = told.tobytes().rstrip(b"\0").decode(errors="ignore")
        if reason and not self.mine:
            raise DistError(f"rank {self.group.ranks[0]} failed in its {self.place}: {reason}")


class rank0_first(_Rank0Block):
    """`with rank0_first():` rank 0 of the group runs the block first, the others after it.

    For what fills a cache that the others then find: `with rank0_first(): data = download()`.
    """

    others_follow = True


class rank0_section(_Rank0Block):
    """`with rank0_section() as mine: if mine: ...`: the others wait at the end of the block."""

    others_follow = False
