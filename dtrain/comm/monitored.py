"""A barrier that names everybody who did not come.

Owns: `MonitoredBarrier`. All report to rank 0, which waits for each of them to the end of the
deadline and then tells all who came who did not. Slower than `Barrier`: 2(N-1) messages at rank 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from dtrain.comm.channel import Channel
from dtrain.comm.collectives import Collective, Outputs
from dtrain.comm.transports.mailbox import Array
from dtrain.errors import CollectiveTimeout, PeerLost, TransportTimeout

__all__ = ["MonitoredBarrier"]

_NOTHING = np.empty(0, np.uint8)


@dataclass(slots=True)
class MonitoredBarrier(Collective):
    """Return when all ranks have called it, or raise with the ranks that did not.

    `wait_all`: a rank that is known to be gone does not end the wait for the others. `names[r]` is
    what the error calls rank r, `patience` the seconds that rank 0 waits, for the error too.
    """

    names: Sequence[int]
    patience: float
    wait_all: bool = False
    kind: ClassVar[str] = "monitored_barrier"

    @staticmethod
    def reference(ranks: Sequence[Any]) -> Outputs:
        return [None for _ in ranks]

    def run(self, channel: Channel) -> None:
        if channel.rank:
            channel.send(0, _NOTHING)
            channel.wait(channel.post(0, _NOTHING))
            return
        missing = self._missing(channel)
        if missing:
            raise CollectiveTimeout(
                f"[Rank {self.names[0]}]: Ranks {', '.join(map(str, missing))} failed to pass "
                f"monitoredBarrier in {self.patience * 1000:.0f} ms",
                ranks=missing,
                timeout=self.patience,
            )
        for peer in channel.peers:
            channel.send(peer, _NOTHING)

    def _missing(self, channel: Channel) -> list[int]:
        """Hear from all; the names of those who did not report before the deadline."""
        receives = {peer: channel.post(peer, _NOTHING) for peer in channel.peers}
        missing = []
        for peer, receive in receives.items():
            try:
                channel.wait(receive)
            except (TransportTimeout, PeerLost) as error:
                if isinstance(error, PeerLost) and not self.wait_all:
                    raise
                missing.append(self.names[peer])
        return missing

    def validate(self, rank: int, size: int) -> None:
        """Nothing to check."""

    @property
    def signature(self) -> str:
        return "monitored_barrier()"

    @property
    def output(self) -> Array | None:
        return None
