"""Schedules of a profile, and what a profiler, ours or PyTorch's, does with them.

Every warmup is 1 or more: PyTorch warns without one.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

STEPS = 14
SCHEDULES: dict[str, dict[str, int]] = {
    ", ".join(f"{key}={value}" for key, value in options.items()): options
    for options in (
        {"wait": 1, "warmup": 1, "active": 2},
        {"wait": 1, "warmup": 1, "active": 3, "repeat": 2},
        {"wait": 0, "warmup": 1, "active": 1, "skip_first": 3},
        {"wait": 3, "warmup": 2, "active": 1, "repeat": 1, "skip_first": 2, "skip_first_wait": 1},
        {"wait": 2, "warmup": 1, "active": 4, "skip_first_wait": 1},
    )
}


def actions_of(profiler: Any, options: dict[str, int]) -> list[str]:
    """The names of the actions of the first steps."""
    action = profiler.schedule(**options)
    return [action(step).name for step in range(STEPS)]


def cycles_of(profiler: Any, options: dict[str, int]) -> list[Any]:
    """For each call of on_trace_ready the number of the step, and the steps that are shown."""
    found: list[Any] = []

    def ready(prof: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            prof.export_chrome_trace(str(file))
            events = json.loads(file.read_text())["traceEvents"]
        names = {e["name"] for e in events if e["name"].startswith("ProfilerStep")}
        found.append([prof.step_num, sorted(names, key=lambda name: int(name.split("#")[1]))])

    with profiler.profile(schedule=profiler.schedule(**options), on_trace_ready=ready) as prof:
        for _ in range(STEPS - 1):
            prof.step()
    return found
