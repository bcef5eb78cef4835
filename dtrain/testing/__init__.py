"""Helpers for testing distributed code: worlds of ranks, leak checks, conformance checks.

`run_world` runs a function on ranks that are threads or processes, `run_ranks` tells how each rank
ended; `check_leaks` shows what a block leaves behind; `conformance` checks any store, transport or
group against what all of them must do.
"""

from __future__ import annotations

from dtrain.autograd.gradcheck import GradcheckError, gradcheck, gradgradcheck
from dtrain.testing.leaks import LeakError, check_leaks
from dtrain.testing.world import Outcome, RankFailed, run_ranks, run_world

__all__ = [
    "GradcheckError",
    "LeakError",
    "Outcome",
    "RankFailed",
    "check_leaks",
    "gradcheck",
    "gradgradcheck",
    "run_ranks",
    "run_world",
]
