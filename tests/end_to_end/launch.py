"""Running programs under dtrun, as a user does, with a deadline and nothing inherited."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]

# A user's interpreter keeps byte code; without it every rank would compile the package again.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


class Ended(NamedTuple):
    """How a run ended: exit code, what it printed, and after how many seconds."""

    code: int
    out: str
    err: str
    seconds: float


def run(*command: object, timeout: float = 60, **environment: str) -> Ended:
    """Run a command in a fresh session and wait for it."""
    begin = time.monotonic()
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        env={**ENVIRONMENT, **environment},
    )
    return Ended(done.returncode, done.stdout, done.stderr, time.monotonic() - begin)


def dtrun(ranks: int, script: object, *arguments: object, timeout: float = 60) -> Ended:
    """`dtrun --standalone --nproc-per-node RANKS SCRIPT ARGUMENTS`."""
    head = [sys.executable, "-m", "dtrun", "--standalone", "--nproc-per-node", ranks]
    return run(*head, script, *arguments, timeout=timeout)
