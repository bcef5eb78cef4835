"""Records torch.profiler: what schedules do in each step, and what is ready when."""

from __future__ import annotations

from typing import Any

import torch

from tests.profiler_cases import SCHEDULES, actions_of, cycles_of
from tests.recorded.registry import recording


@recording
def profiler_schedules() -> dict[str, Any]:
    """{arguments: [the action of each step, [[number, steps shown] for each call when ready]]}."""
    return {
        name: [actions_of(torch.profiler, options), cycles_of(torch.profiler, options)]
        for name, options in SCHEDULES.items()
    }
