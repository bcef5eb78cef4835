"""`key_averages()`: the events of a timeline put together by name, and a table of them.

Owns: `Average`, `Averages`. Rules: 1. Numbers stand for themselves in no name: steps are one line,
ProfilerStep*, as in PyTorch; buckets and calls keep their sizes. 2. The self time of a span is what
no span inside it has; only the row of the program has spans in one another.
Source: torch.autograd.profiler_util.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from dtrain.tape import MAIN, Event

_STEP = re.compile(r"^ProfilerStep#\d+$")
_SORTS = ("cpu_time_total", "self_cpu_time_total", "cpu_time", "count")


@dataclass(slots=True)
class Average:
    """All events of one name: `count`, and times in microseconds, in all and without inner ones."""

    key: str
    count: int = 0
    cpu_time_total: float = 0.0
    self_cpu_time_total: float = 0.0

    @property
    def cpu_time(self) -> float:
        """The mean."""
        return self.cpu_time_total / self.count


class Averages(list[Average]):
    """One `Average` for each name, in the order in which they came."""

    def table(
        self, sort_by: str | None = None, row_limit: int = 100, header: str | None = None
    ) -> str:
        """Times in milliseconds, as text; -1 rows are all. ValueError for an unknown `sort_by`."""
        rows = list(self)
        if sort_by is not None:
            if sort_by not in _SORTS:
                raise ValueError(f"sort_by is one of {', '.join(_SORTS)}, got {sort_by!r}")
            rows.sort(key=lambda row: -float(getattr(row, sort_by)))
        rows = rows if row_limit < 0 else rows[:row_limit]
        width = max([4, *(len(row.key) for row in rows)])
        lines = [
            f"{'Name':>{width}}  {'Self ms':>10}  {'Total ms':>10}  {'Mean ms':>10}  # of Calls"
        ]
        lines += [
            f"{row.key:>{width}}  {row.self_cpu_time_total / 1e3:10.3f}  "
            f"{row.cpu_time_total / 1e3:10.3f}  {row.cpu_time / 1e3:10.3f}  {row.count:10d}"
            for row in rows
        ]
        return "\n".join([*([] if header is None else [header]), *lines])


def averages_of(events: Iterable[Event]) -> Averages:
    """Events put together by name."""
    events, found = list(events), dict[str, Average]()
    inner = _inner([event for event in events if event.lane == MAIN])
    for event in events:
        key = "ProfilerStep*" if _STEP.match(event.name) else event.name
        row = found.setdefault(key, Average(key))
        seconds = event.ended - event.begun
        row.count += 1
        row.cpu_time_total += seconds * 1e6
        row.self_cpu_time_total += (seconds - inner.get(id(event), 0.0)) * 1e6
    return Averages(found.values())


def _inner(events: list[Event]) -> dict[int, float]:
    """{id of an event: seconds of the events directly inside it}."""
    inner: dict[int, float] = {}
    around: list[Event] = []
    for event in sorted(events, key=lambda event: (event.begun, -event.ended)):
        while around and around[-1].ended <= event.begun:
            around.pop()
        if around:
            outer = id(around[-1])
            inner[outer] = inner.get(outer, 0.0) + event.ended - event.begun
        around.append(event)
    return inner
