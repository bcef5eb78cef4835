"""The ranks of one host in a group that spans hosts, and the memory that they share.

Owns: `Island`, a `Window` and where it stands among the others: inside it ranks are counted from 0,
in the group from the first rank of the host. Moves nothing; `island_algorithms` and `chain` do.
"""

from __future__ import annotations

from functools import cached_property

from dtrain.comm.topology import Placement
from dtrain.comm.transports.window import Window

__all__ = ["Island"]


class Island:
    """What a rank knows of its host and of the others; `members[i]` is rank i of the window."""

    def __init__(self, window: Window, placement: Placement, rank: int) -> None:
        self.window, self.placement, self._rank = window, placement, rank
        self.here = placement.host_of[rank]
        self.members = placement.hosts[self.here]

    @cached_property
    def carried(self) -> list[int]:
        """The ranks of other hosts whose contributions this rank receives for its host."""
        return self.placement.carried(self._rank)

    @cached_property
    def targets(self) -> list[int]:
        """Who receives this rank's contribution on each other host."""
        hosts = [h for h in range(len(self.placement.hosts)) if h != self.here]
        return [self.placement.carrier(self._rank, h) for h in hosts]

    @cached_property
    def shown_at(self) -> list[tuple[int, int]]:
        """Who on this host shows the contribution of each rank of the group, and at which place:
        its own comes first, then those it carries.
        """
        found = {
            rank: (place, slot)
            for place, member in enumerate(self.members)
            for slot, rank in enumerate([member, *self.placement.carried(member)])
        }
        return [found[rank] for rank in range(len(found))]

    @cached_property
    def depth(self) -> int:
        """The most contributions that any rank of the group shows."""
        placement = self.placement
        return 1 + max(len(placement.carried(r)) for r in range(len(placement.host_of)))
