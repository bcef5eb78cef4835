"""What an absent rank is doing: from its flight record, and the stack of its main thread now.

Owns: `whereabouts`, in lines for a report. Ranks of this host are looked at; those of other hosts
are not (`dtrun debug` there shows them). Blocks at most `stacks.PATIENCE` seconds for each rank.
"""

from __future__ import annotations

import os
import time

from dtrain import flight, stacks
from dtrain.comm.topology import host_id
from dtrain.comm.transports.base import Peer
from dtrain.flight import Flight, GroupFlight

__all__ = ["whereabouts"]


def whereabouts(group: str, rank: int, peer: Peer | None, heard: str) -> list[str]:
    """Rank `rank` of `group` in a few lines. `peer`: its process, None for a thread of this one.

    `heard`: what the group itself knows of it, for a rank that cannot be looked at.
    """
    if peer is not None and peer.host != host_id():
        return [f"rank {rank} (on {peer.host_name}): {heard}"]
    pid = os.getpid() if peer is None else peer.pid
    record = flight.of_process(pid)
    mine = None if record is None else _group_of(record, group, rank)
    who = f"rank {rank}" if pid == os.getpid() else f"rank {rank} (pid {pid})"
    if record is None or mine is None:
        return [f"{who}: {heard}"]
    last = next((call for call in reversed(mine.calls) if call.state == flight.DONE), None)
    done = "has completed no call of this group" if last is None else f"last completed {last}"
    return [f"{who} {done}; {_now(record, mine, pid)}", *_stack(record, mine, pid)]


def _group_of(record: Flight, group: str, rank: int) -> GroupFlight | None:
    fitting = [g for g in record.groups if (g.name, g.rank) == (group, rank)]
    return max(fitting, key=lambda g: (g.is_open, g.number), default=None)


def _now(record: Flight, mine: GroupFlight, pid: int) -> str:
    """The call it is in, or since when it is in none."""
    groups = [mine] if pid == os.getpid() else record.groups
    calls = [(call, group) for group in groups for call in group.calls]
    running = [pair for pair in calls if pair[0].state == flight.RUNNING]
    if running:
        call, group = max(running, key=lambda pair: pair[0].start)
        return f"it is in {call} of group {group.name!r} for {_ago(call.start)}"
    ends = [call.end for call, _ in calls if call.end]
    return f"it is in no call{f' for {_ago(max(ends))}' if ends else ''}"


def _ago(when: float) -> str:
    return f"{time.monotonic() - when:.1f} s"


def _stack(record: Flight, mine: GroupFlight, pid: int) -> list[str]:
    if pid == os.getpid():
        found: list[stacks.Frame] | str = stacks.of_thread(mine.thread)
    else:
        found = stacks.of_process(pid, record.started, record.signal, stacks.beside(record.path))
    if isinstance(found, str):
        return [f"  {found}"]
    return [f"  {line}" for line in stacks.in_words(found)]
