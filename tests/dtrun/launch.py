"""Runs dtrun as a user does, from a directory of one test, with a deadline on everything."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

DEADLINE = 20.0
LAUNCHER_VARIABLES = ("PET_", "TORCHELASTIC_", "OMP_NUM_", "OPENBLAS_NUM_", "MKL_NUM_")


class Launches:
    """Starts dtrun in `folder`; its run directories are made in there too, so that leaks show."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_dirs = Path(tempfile.mkdtemp(prefix="dtrun-test-", dir="/tmp"))
        self._started: list[subprocess.Popen[str]] = []

    def script(self, text: str, name: str = "train.py") -> str:
        """Write a script that finds os, sys, time and its RANK in place."""
        head = "import os, sys, time\nrank = int(os.environ['RANK'])\n"
        (self.folder / name).write_text(head + textwrap.dedent(text))
        return name

    def start(
        self,
        *args: str,
        env: Mapping[str, str] | None = None,
        program: Sequence[str] = ("-m", "dtrun"),
        **options,
    ):
        """Start dtrun with pipes for its output; `options` are Popen's."""
        base = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_VARIABLES)}
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(
            [sys.executable, *program, *args],
            cwd=self.folder,
            env=base | {"XDG_RUNTIME_DIR": str(self.run_dirs)} | dict(env or {}),
            text=True,
            **(pipes | options),
        )
        self._started.append(process)
        return process

    def run(self, *args: str, **options) -> subprocess.CompletedProcess:
        """Run dtrun to its end."""
        process = self.start(*args, **options)
        out, err = process.communicate(timeout=DEADLINE)
        return subprocess.CompletedProcess(args, process.returncode, out, err)

    def close(self, seconds: float = 5.0) -> None:
        """Nothing may be left: end what a failed test left, then look at the run directories."""
        try:
            for process in self._started:
                if process.poll() is None:
                    process.kill()
                    process.wait(DEADLINE)
                for pipe in (process.stdout, process.stderr):
                    if pipe is not None:
                        pipe.close()
            wait_until(lambda: not os.listdir(self.run_dirs), seconds)
        finally:  # whoever fails here does not spoil the next test
            shutil.rmtree(self.run_dirs)


def read_lines(process: subprocess.Popen, count: int) -> list[str]:
    """The next `count` lines or more of dtrun's output; TimeoutError when they do not come.

    Reads the descriptor: what a file object has buffered, select() does not see.
    """
    text = b""
    while text.count(b"\n") < count:
        if not select.select([process.stdout], [], [], DEADLINE)[0]:
            raise TimeoutError(f"dtrun printed {text!r} and then nothing")
        text += os.read(process.stdout.fileno(), 4096)
    return text.decode().splitlines()


def wait_until(condition, seconds: float = 5.0) -> float:
    """How long it took until `condition()` held; TimeoutError when it never did."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > seconds:
            raise TimeoutError("the condition did not come true")
        time.sleep(0.005)
    return time.monotonic() - start


def living(pids: list[int]) -> list[int]:
    """Those of `pids` that still run; a zombie does not."""
    return [pid for pid in pids if _runs(pid)]


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
