"""Killed for memory: told from the control group's counters, and from nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dtrun.shortage import Shortage

MIB = 1 << 20


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def version_2(folder, kills):
    write(folder / "proc/self/cgroup", "0::/job/step\n")
    own = folder / "cgroup/job/step"
    write(own / "memory.events", f"low 0\nhigh 3\nmax 9\noom {kills}\noom_kill {kills}\n")
    write(own / "memory.max", f"{256 * MIB}\n")
    write(own / "memory.peak", f"{255 * MIB}\n")


def version_1(folder, kills):
    write(folder / "proc/self/cgroup", "7:cpu,cpuacct:/x\n4:memory:/job\n1:name=systemd:/\n")
    own = folder / "cgroup/memory/job"
    write(own / "memory.oom_control", f"oom_kill_disable 0\nunder_oom 0\noom_kill {kills}\n")
    write(own / "memory.limit_in_bytes", f"{256 * MIB}\n")
    write(own / "memory.max_usage_in_bytes", f"{255 * MIB}\n")


def in_a_container(folder, kills):
    version_2(folder, kills)
    write(folder / "proc/self/cgroup", "0::/docker/not-seen-from-here\n")
    (folder / "cgroup/job/step").rename(folder / "cgroup/own")
    for file in (folder / "cgroup/own").iterdir():
        file.rename(folder / "cgroup" / file.name)


@pytest.mark.parametrize("group", [version_1, version_2, in_a_container])
def test_a_counter_that_rises_says_so_with_the_limit(group, tmp_path):
    group(tmp_path, 2)
    shortage = Shortage(tmp_path / "cgroup", tmp_path / "proc")
    assert shortage.words() == ""  # two were killed before
    counter = next(tmp_path.glob("cgroup/**/memory.[eo]*"))
    counter.write_text(counter.read_text().replace("oom_kill 2", "oom_kill 3"))
    words = shortage.words()
    assert words.startswith("killed for memory: ")
    assert words.endswith("its limit of 256 MiB, with at most 255 MiB")


def test_the_whole_machine(tmp_path):
    write(tmp_path / "proc/vmstat", "nr_free_pages 5\noom_kill 0\n")
    shortage = Shortage(tmp_path / "cgroup", tmp_path / "proc")
    write(tmp_path / "proc/vmstat", "nr_free_pages 5\noom_kill 1\n")
    assert "the machine had none left" in shortage.words()


def test_where_the_kernel_tells_nothing_nothing_is_said(tmp_path):
    assert Shortage(tmp_path / "cgroup", tmp_path / "proc").words() == ""


@pytest.fixture
def limited():
    """A control group with 200 MiB, for root; gone afterwards."""
    path = Path(f"/sys/fs/cgroup/memory/dtrun-test-{os.getpid()}")
    if os.geteuid() or not path.parent.is_dir():
        pytest.skip("not run: needs root and cgroup v1's memory controller")
    path.mkdir()
    (path / "memory.limit_in_bytes").write_text(str(200 * MIB))
    yield path
    path.rmdir()


def test_a_rank_that_takes_too_much_memory(limited, tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import os\nif os.environ['RANK'] == '1': bytearray(1 << 30)\n")
    enter = f"echo $$ > {limited}/cgroup.procs; exec {sys.executable} -m dtrun"
    done = subprocess.run(
        ["sh", "-c", f"{enter} --nproc-per-node 2 {script}"],
        capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 128 + 9, done.stderr
    assert "killed for memory: the kernel, because" in done.stderr
    assert "limit of 200 MiB" in done.stderr
