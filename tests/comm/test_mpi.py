"""The backend "mpi": `mpi_rank.py` under mpiexec, on 1 to 4 ranks. Not run without mpi4py."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dtrain.distributed as dist

ROOT = Path(__file__).parents[2]
MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH')}")

CHECKS = {
    1: ("check_conformance",),
    2: ("check_conformance", "check_properties"),
    3: ("check_nan", "check_bridge", "check_groups_and_messages"),
    4: ("check_properties",),
}

needs_mpi = pytest.mark.skipif(
    MPIEXEC is None or importlib.util.find_spec("mpi4py") is None,
    reason="needs mpi4py and mpiexec (pip install 'dtrain[mpi]' mpich)",
)


def run(ranks, *checks):
    """The finished job; every rank says "done" when its checks have passed."""
    return subprocess.run(
        [MPIEXEC, "-n", str(ranks), sys.executable, "-m", "tests.comm.mpi_rank", *checks],
        cwd=ROOT, capture_output=True, text=True, timeout=50,
    )  # fmt: skip


@needs_mpi
@pytest.mark.parametrize("ranks", CHECKS)
def test_mpi(ranks):
    """One job for all checks: most of the time goes into starting it."""
    done = run(ranks, *CHECKS[ranks])
    assert (done.returncode, done.stdout.count("done")) == (0, ranks), done.stderr


@needs_mpi
def test_a_failed_group_ends_the_job():
    done = run(2, "check_failures")
    assert done.stdout.count("done") == 2, done.stderr
    assert done.returncode != 0
    assert "MPI_Abort" in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("mpi4py") is not None, reason="mpi4py is installed")
def test_without_mpi4py_the_extra_is_named():
    assert not dist.is_mpi_available()
    with pytest.raises(ImportError, match=r"pip install 'dtrain\[mpi\]'"):
        dist.init_process_group("mpi")
