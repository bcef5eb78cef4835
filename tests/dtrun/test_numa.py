"""Cores for local ranks, on machines that the kernel's files describe."""

from __future__ import annotations

import pytest

from dtrun import numa


def machine(folder, nodes, packages, caches=(), siblings=()):
    """A /sys/devices/system: cores of each node as the kernel lists them, and who shares what."""
    for number, listed in enumerate(nodes):
        write(folder / f"node/node{number}/cpulist", listed)
    for core, package in packages.items():
        write(folder / f"cpu/cpu{core}/topology/physical_package_id", package)
    for group in caches:
        for core in group:
            write(folder / f"cpu/cpu{core}/cache/index3/shared_cpu_list", ",".join(map(str, group)))
    for pair in siblings:
        for core in pair:
            listed = ",".join(map(str, pair))
            write(folder / f"cpu/cpu{core}/topology/thread_siblings_list", listed)
    return folder


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


@pytest.fixture
def system(tmp_path):
    """Two sockets of two nodes each; a node has two cores of two threads, each core its cache."""
    return machine(
        tmp_path,
        ["0-1,8-9", "2-3,10-11", "4-5,12-13", "6-7,14-15"],
        {core: core % 8 // 4 for core in range(16)},
        caches=[(core, core + 8) for core in range(8)],
        siblings=[(core, core + 8) for core in range(8)],
    )


def test_nodes_are_dealt_out_in_blocks(system):
    found = numa.shares("node", 8, system, range(16))
    assert found[0] == found[1] == (0, 1, 8, 9)
    assert found[6] == found[7] == (6, 7, 14, 15)
    assert numa.shares("node", 2, system, range(16)) == [(0, 1, 8, 9), (4, 5, 12, 13)]


def test_a_socket_is_all_its_nodes(system):
    assert numa.shares("socket", 2, system, range(16)) == [
        (0, 1, 2, 3, 8, 9, 10, 11),
        (4, 5, 6, 7, 12, 13, 14, 15),
    ]


def test_exclusive_shares_are_whole_cores_that_nobody_else_has(system):
    found = numa.shares("exclusive", 8, system, range(16))
    assert found[:2] == [(0, 8), (1, 9)]
    assert sorted(core for share in found for core in share) == list(range(16))
    with pytest.raises(ValueError, match="exclusive: 3 ranks on a memory node with 2 cores"):
        numa.shares("exclusive", 12, system, range(16))


def test_core_complexes_are_taken_in_turn(system):
    found = numa.shares("core-complex", 12, system, range(16))
    assert found[:3] == [(0, 8), (1, 9), (0, 8)]


def test_cores_that_may_not_be_used_are_left_out(system):
    assert numa.shares("node", 2, system, {2, 3, 4}) == [(2, 3), (4,)]


@pytest.mark.parametrize("mode", numa.MODES)
def test_where_the_kernel_shows_nothing_the_machine_is_one_node(mode, tmp_path):
    found = numa.shares(mode, 2, tmp_path, {4, 5})
    shared = mode in ("node", "socket")
    assert found == ([(4, 5), (4, 5)] if shared else [(4,), (5,)])


def test_without_a_mode_nobody_is_bound():
    assert numa.shares(None, 2) == [(), ()]


def test_ranks_run_where_they_are_bound(dtrun):
    dtrun.script("print(sorted(os.sched_getaffinity(0)))")
    try:
        expected = numa.shares("exclusive", 2)
    except ValueError:
        pytest.skip("not run: this machine has less than two cores")
    done = dtrun.run("--nproc-per-node", "2", "--numa-binding", "exclusive", "train.py")
    assert done.returncode == 0, done.stderr
    found = sorted(done.stdout.splitlines())
    assert found == [f"[rank{rank}]: {list(cores)}" for rank, cores in enumerate(expected)]
