"""`import dtrain` is cheap: under 0.2 s, most of it NumPy's.

A busy machine only ever makes a run slower, so the fastest of several runs measures the code and
not the neighbours. A bare interpreter is run in turn with it and its fastest time taken off.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time

import pytest

BUDGET_SECONDS = 0.2
ROUNDS = 25

# An environment that forbids byte code would have every run compile the package again.
WITH_BYTE_CODE = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


def seconds(statement: str) -> float:
    """Wall-clock seconds of a fresh interpreter that runs `statement`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True, timeout=30, env=WITH_BYTE_CODE)
    return time.perf_counter() - start


def import_seconds(statement: str, rounds: int, enough: float = 0.0) -> float:
    """What `statement` adds to a bare interpreter: the difference of the two fastest runs.

    Stops before `rounds` as soon as the difference is below `enough` seconds.
    """
    seconds(statement)  # Writes the byte code: a first import compiles.
    bare = full = math.inf
    for _ in range(rounds):
        bare, full = min(bare, seconds("pass")), min(full, seconds(statement))
        if full - bare < enough:
            break
    return full - bare


@pytest.mark.timeout(120)
def test_importing_dtrain_stays_in_its_budget():
    took = import_seconds("import dtrain", ROUNDS, enough=BUDGET_SECONDS)
    assert took < BUDGET_SECONDS, (
        f"import dtrain took {took:.3f} s of {BUDGET_SECONDS} s: "
        'see python -X importtime -c "import dtrain"'
    )


def test_the_launcher_starts_before_numpy_would_be_loaded():
    assert import_seconds("import dtrun.cli", 5) < import_seconds("import numpy", 5)


def test_a_slow_import_would_be_seen():
    assert import_seconds(f"import time; time.sleep({BUDGET_SECONDS})", 1) >= BUDGET_SECONDS * 0.9
