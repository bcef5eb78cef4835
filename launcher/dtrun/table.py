"""What the ranks of a run did last and do now, read from their flight records, as text.

`table` is what `dtrun debug` prints, `last_calls` what the failure report says; `verdict` compares
the calls that ranks made under one number, in the words of PyTorch's flight recorder. dtrain, which
knows the format of the records, is imported when one is read.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dtrain.flight import Call, Flight, GroupFlight

FULLY_MATCHED = "FULLY_MATCHED"
COLLECTIVE_TYPE_MISMATCH = "COLLECTIVE_TYPE_MISMATCH"
SIZE_OR_SYNTAX_MISMATCH = "SIZE_OR_SYNTAX_MISMATCH"
COLLECTIVE_STATE_MISMATCH = "COLLECTIVE_STATE_MISMATCH"
COLLECTIVE_DTYPE_MISMATCH = "COLLECTIVE_DTYPE_MISMATCH"
UNDECIDED = "UNDECIDED"

STATES = {1: "queued", 2: "running", 3: "done", 4: "failed"}
_DTYPE = re.compile(r"\((\w+)\[")


def has_records(directory: str) -> bool:
    """Whether a rank has joined a group."""
    return any(name.startswith("flight-") for name in os.listdir(directory))


def verdict(signatures: Mapping[int, str], states: Mapping[int, int], complete: bool) -> str:
    """How the calls of ranks under one number fit together: {rank: ...} of those that are known.

    `complete`: they are all that there can be. A rank that has not come yet is no entry.
    """
    words = set(signatures.values())
    if len({word.partition("(")[0] for word in words}) > 1:
        return COLLECTIVE_TYPE_MISMATCH
    if len(words) > 1:
        dtypes = {found[1] if (found := _DTYPE.search(word)) else "" for word in words}
        return COLLECTIVE_DTYPE_MISMATCH if len(dtypes) > 1 else SIZE_OR_SYNTAX_MISMATCH
    if not complete:
        return UNDECIDED
    return COLLECTIVE_STATE_MISMATCH if len(set(states.values())) > 1 else FULLY_MATCHED


def table(directory: str, count: int) -> str:
    """The state of every rank that has a record in `directory`, then the last `count` calls of
    each group. Blocks at most half a second for each rank that does not answer.
    """
    from dtrain import flight

    flights = flight.read_all(directory)
    lines = [f"{len(flights)} ranks have a flight record in {directory}"]
    for one in flights:
        lines += _rank(one)
    groups: dict[tuple[str, int], list[tuple[Flight, GroupFlight]]] = {}
    for one in flights:
        for group in one.groups:
            groups.setdefault((group.name, group.number), []).append((one, group))
    for (name, _), members in groups.items():
        lines += ["", f"Last calls of group {name!r} ({members[0][1].size} ranks)"]
        lines += _matched(members, count)
    return "\n".join(lines) + "\n"


def _rank(one: Flight) -> list[str]:
    """What a rank completed last, what it is in, and where its main thread is."""
    from dtrain import flight, stacks

    calls = [call for group in one.groups for call in group.calls]
    done = [call for call in calls if call.state == flight.DONE]
    running = [call for call in calls if call.state == flight.RUNNING]
    last = f"last completed {max(done, key=lambda call: call.end)}" if done else "nothing completed"
    now = "in no call"
    if running:
        call = max(running, key=lambda call: call.start)
        now = f"in {call} since {_clock(one, call.start)}"
    found = stacks.of_process(one.pid, one.started, one.signal, stacks.beside(one.path))
    stack = [found] if isinstance(found, str) else stacks.in_words(found)
    head = f"rank {one.rank} (pid {one.pid} on {one.host})"
    return ["", f"{head}: {last}; {now}", *(f"    {line}" for line in stack)]


def _clock(one: Flight, when: float) -> str:
    seconds = one.clock + when
    return f"{time.strftime('%H:%M:%S', time.localtime(seconds))}.{int(seconds % 1 * 1000):03d}"


def _matched(members: Sequence[tuple[Flight, GroupFlight]], count: int) -> list[str]:
    """The last calls in sequence, side by side."""
    by_rank = {
        one.rank: {call.seq: call for call in group.calls if call.seq >= 0}
        for one, group in members
    }
    numbers = sorted({seq for calls in by_rank.values() for seq in calls})[-count:]
    everybody = len(members) == members[0][1].size
    lines = []
    for seq in numbers:
        calls = {rank: known[seq] for rank, known in by_rank.items() if seq in known}
        # A rank whose record begins later has forgotten this call.
        forgot = [r for r, known in by_rank.items() if known and min(known) > seq]
        lines += _row(seq, calls, sorted(by_rank.keys() - calls.keys()), everybody and not forgot)
    return lines or ["  none"]


def _row(seq: int, calls: Mapping[int, Call], missing: list[int], everybody: bool) -> list[str]:
    words = {rank: call.signature for rank, call in calls.items()}
    states = {rank: call.state for rank, call in calls.items()} | dict.fromkeys(missing, 0)
    found = verdict(words, states, everybody)
    alike: dict[str, list[int]] = {}
    for rank, call in calls.items():
        text = f"{call.signature} at {call.site} {STATES.get(call.state, '?')}"
        alike.setdefault(text, []).append(rank)
    rows = [f"{ranks_in_words(ranks)}: {text}" for text, ranks in alike.items()]
    rows += [f"{ranks_in_words(missing)}: has not called it"] if missing else []
    if len(rows) == 1:
        return [f"  #{seq} {found}  {rows[0]}"]
    return [f"  #{seq} {found}", *(f"      {row}" for row in rows)]


def last_calls(directory: str) -> list[str]:
    """The last call of every rank, in a line for all that made the same."""
    from dtrain import flight

    alike: dict[str, list[int]] = {}
    for one in flight.read_all(directory):
        found = one.last_call()
        if found is not None:
            group, call = found
            what = "was in" if call.unfinished else STATES[call.state]
            alike.setdefault(f"{what} {call} of group {group.name!r}", []).append(one.rank)
    return [f"  {ranks_in_words(ranks)}: {text}" for text, ranks in alike.items()]


def ranks_in_words(ranks: Iterable[int]) -> str:
    """`rank 3`, or `ranks 0, 2`."""
    numbers = sorted(ranks)
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
