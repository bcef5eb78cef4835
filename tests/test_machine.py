"""dtrain.machine: limits as control groups of both versions write them."""

from __future__ import annotations

import os

import pytest

from dtrain import machine

GIB = 1 << 30


@pytest.fixture
def host(tmp_path):
    """Writes control groups: {path below the root: content}; returns where they are."""

    def write(own, files):
        (tmp_path / "own").write_text(own)
        for name, content in files.items():
            path = tmp_path / "groups" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return tmp_path / "groups", tmp_path / "own"

    return write


def test_the_least_limit_of_all_groups_above_counts(host):
    """Version 2: 4 GiB for the slice, of which 1 GiB is used, 8 GiB for the job below it."""
    groups = host(
        "0::/slice/job\n",
        {
            "slice/memory.max": f"{4 * GIB}\n",
            "slice/memory.current": f"{2 * GIB}\n",
            "slice/memory.stat": f"anon 5\ninactive_file {GIB}\n",
            "slice/job/memory.max": f"{8 * GIB}\n",
            "slice/job/memory.current": "0\n",
            "slice/cpu.max": "max 100000\n",
            "slice/job/cpu.max": "150000 100000\n",
        },
    )
    assert machine.memory_limit(*groups) == 4 * GIB
    assert machine.processor_quota(*groups) == 1.5
    assert machine.available_memory(*groups, groups[0] / "none") == 3 * GIB


def test_version_1_has_a_tree_for_each_controller(host):
    groups = host(
        "4:memory:/job\n2:cpu,cpuacct:/job\n0::/\n",
        {
            "memory/memory.limit_in_bytes": f"{(1 << 63) - 4096}\n",
            "memory/job/memory.limit_in_bytes": f"{GIB}\n",
            "memory/job/memory.usage_in_bytes": f"{GIB // 4}\n",
            "cpu,cpuacct/job/cpu.cfs_quota_us": "50000\n",
            "cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
        },
    )
    assert machine.memory_limit(*groups) == GIB
    assert machine.processor_quota(*groups) == 0.5
    assert machine.available_memory(*groups, groups[0] / "none") == GIB * 3 // 4


def test_no_limit_is_none_and_the_machine_itself_is_one(host, tmp_path):
    groups = host("0::/job\n2:cpu:/job\n", {"cpu/job/cpu.cfs_quota_us": "-1\n"})
    assert machine.memory_limit(*groups) is None
    assert machine.processor_quota(*groups) is None
    assert machine.available_memory(*groups, tmp_path / "none") is None
    (tmp_path / "meminfo").write_text("MemTotal: 10 kB\nMemAvailable:       7 kB\n")
    assert machine.available_memory(*groups, tmp_path / "meminfo") == 7 * 1024


def test_this_machine_can_be_asked():
    assert 1 <= machine.cores() <= os.cpu_count()
    assert machine.available_memory() > 0
    assert machine.processor()
