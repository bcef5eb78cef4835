"""What a rank did and when, kept for a timeline: `Tape`, its file, and all ranks' files in one.

Owns: the file format, which is the Trace Event Format (Perfetto and chrome://tracing open it).
Rules: 1. times are of the monotonic clock, which all processes of a host share. The clock of
another host is shifted so that joining the default group ended everywhere at once: right to what
ranks take to get ready after they have met, 12 ms with two on one host. 2. A file appears complete
or not at all. 3. A tape keeps `LIMIT` events and counts what it drops after that. Standard library
only. Source: the Trace Event Format document of Chromium.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import json
import os
import socket
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

__all__ = ["LIMIT", "MAIN", "Event", "Tape", "merge"]

LIMIT = 1_000_000

MAIN = "main"  # the lane of the program; the only one whose events lie in one another
MERGED = "trace.json"

Json = dict[str, Any]


class Event(NamedTuple):
    """Something that took time: `lane` is the row it is shown in, times are in seconds."""

    name: str
    category: str
    lane: str
    begun: float
    ended: float
    args: Mapping[str, Any]


class Tape:
    """The events of global rank `rank` of `size`; any thread may add to it.

    `folder`: where `save` writes the file of this rank, None for a tape without one.
    """

    def __init__(self, rank: int, size: int, folder: str | None = None) -> None:
        self.rank, self.size = rank, size
        self.events: list[Event] = []
        self.dropped = 0
        self.joined = monotonic()
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file.unlink(missing_ok=True)  # of an earlier run
            self._alive = open(self.folder / ".lock", "a")  # noqa: SIM115, until `save`
            fcntl.flock(self._alive, fcntl.LOCK_SH)

    @property
    def _file(self) -> Path:
        assert self.folder is not None
        return self.folder / f"rank-{self.rank}.json"

    def add(
        self, name: str, category: str, lane: str, begun: float, ended: float, **args: Any
    ) -> None:
        """Keep one event."""
        if len(self.events) < LIMIT:
            self.events.append(Event(name, category, lane, begun, ended, args))
        else:
            self.dropped += 1

    def write(self, path: str | os.PathLike[str], events: Iterable[Event]) -> None:
        """Write some of its events as a trace of this rank alone."""
        about = {"rank": self.rank, "world_size": self.size, "host": socket.gethostname(),
                 "boot": _boot(), "joined": self.joined * 1e6, "dropped": self.dropped}  # fmt: skip
        _write(Path(path), {"traceEvents": _shown(self.rank, events), "dtrain": about})

    def save(self) -> None:
        """Write this rank's file; the last rank to do so merges all that are there.

        The last: until then every rank shares a lock, which the kernel takes from one that dies.
        """
        if self.folder is None:
            return
        self.write(self._file, self.events)
        with self._alive as lock:
            fcntl.flock(lock, fcntl.LOCK_UN)
            with contextlib.suppress(BlockingIOError):  # others are still there
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                merge(self.folder)


def merge(folder: str | os.PathLike[str]) -> Path:
    """Write `trace.json` from the `rank-N.json` files in `folder`; its path.

    Calls of one collective are joined by arrows. FileNotFoundError when there is no file of a rank.
    """
    files = sorted(Path(folder).glob("rank-*.json"))
    if not files:
        raise FileNotFoundError(f"there is no rank-*.json in {folder}: nothing to merge")
    ranks = [json.loads(file.read_text()) for file in files]
    ranks.sort(key=lambda rank: rank["dtrain"]["rank"])
    shifts = _shifts([rank["dtrain"] for rank in ranks])
    events: list[Json] = []
    for rank, shift in zip(ranks, shifts, strict=True):
        for event in rank["traceEvents"]:
            if "ts" in event:
                event["ts"] += shift
        events += rank["traceEvents"]
        rank["dtrain"]["shift"] = shift
    merged = Path(folder) / MERGED
    about = [rank["dtrain"] for rank in ranks]
    _write(merged, {"traceEvents": events + _arrows(events), "dtrain": about})
    return merged


def _shifts(ranks: list[Json]) -> list[float]:
    """By how many microseconds the times of each rank are moved: 0 on the first one's host."""
    joined: dict[str, float] = {}  # {boot: when the first rank of that host had joined}
    for rank in ranks:
        joined[rank["boot"]] = min(rank["joined"], joined.get(rank["boot"], rank["joined"]))
    first = joined[ranks[0]["boot"]]
    return [first - joined[rank["boot"]] for rank in ranks]


def _arrows(events: list[Json]) -> list[Json]:
    """Flow events through the calls of each collective, from who came first to who came last."""
    calls: dict[tuple[Any, ...], list[Json]] = defaultdict(list)
    seen: Counter[tuple[Any, ...]] = Counter()  # groups of the same ranks may share a name
    for event in events:
        if event.get("cat") == "collective":
            call = event["args"]["group"], event["args"]["seq"]
            calls[*call, seen[event["pid"], *call]].append(event)
            seen[event["pid"], *call] += 1
    arrows: list[Json] = []
    for number, same in enumerate(calls.values()):
        same.sort(key=lambda event: event["ts"])
        for i, event in enumerate(same if len(same) > 1 else ()):
            phase = "s" if i == 0 else "f" if i == len(same) - 1 else "t"
            arrow = {"ph": phase, "name": "same call", "cat": "flow", "id": number}
            arrow |= {key: event[key] for key in ("pid", "tid", "ts")}
            arrows.append(arrow | ({"bp": "e"} if phase == "f" else {}))
    return arrows


def _shown(rank: int, events: Iterable[Event]) -> list[Json]:
    """The events of a rank in the format, with the names of its rows."""
    lanes: dict[str, list[Event]] = {MAIN: []}
    for event in events:
        lanes.setdefault(event.lane, []).append(event)
    shown = [_name("process_name", rank, 0, f"rank {rank}")]
    tid = 0
    for lane, those in lanes.items():
        for i, row in enumerate([those] if lane == MAIN else _rows(those)):
            shown.append(_name("thread_name", rank, tid, f"{lane} {i + 1}" if i else lane))
            shown += [_complete(event, rank, tid) for event in row]
            tid += 1
    return shown


def _rows(events: list[Event]) -> list[list[Event]]:
    """Events that overlap in time in different rows."""
    rows: list[list[Event]] = []
    for event in sorted(events, key=lambda event: event.begun):
        row = next((row for row in rows if row[-1].ended <= event.begun), None)
        if row is None:
            rows.append([event])
        else:
            row.append(event)
    return rows


def _complete(event: Event, rank: int, tid: int) -> Json:
    return {
        "ph": "X", "name": event.name, "cat": event.category, "pid": rank, "tid": tid,
        "ts": event.begun * 1e6, "dur": (event.ended - event.begun) * 1e6, "args": event.args,
    }  # fmt: skip


def _name(what: str, rank: int, tid: int, name: str) -> Json:
    return {"ph": "M", "name": what, "pid": rank, "tid": tid, "args": {"name": name}}


def _boot() -> str:
    """What tells this host's monotonic clock from those of others."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _write(path: Path, content: Json) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    if path.suffix == ".gz":
        beside.write_bytes(gzip.compress(json.dumps(content).encode()))
    else:
        beside.write_text(json.dumps(content))
    beside.replace(path)
