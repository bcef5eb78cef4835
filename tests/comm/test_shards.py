"""Arrays that the ranks of a host share, and what the collectives of shards have of their own.

That `ReduceShards` and `GatherShards` do what their `reference` says, on every transport, is in
test_collectives and test_hosts.
"""

from __future__ import annotations

import gc

import ml_dtypes
import numpy as np
import pytest

from dtrain.comm import collectives as c
from dtrain.comm.parts import packed, unpack, whence, where
from dtrain.comm.reduce import AVG, combine
from dtrain.comm.shards import GatherShards, ReduceShards
from dtrain.comm.sharing import share
from dtrain.comm.transports import futex
from dtrain.testing.conformance import check_group
from dtrain.testing.world import run_world
from tests.comm.hosts import islands

SHARING = ["local"] + ["shm"] * futex.AVAILABLE
CUTS = [slice(2, 5), slice(5, 6), slice(9, 12)]


def test_packed_and_unpack_are_inverse():
    flat = np.arange(12)
    back = np.zeros(12, int)
    unpack(packed(flat, CUTS), back, CUTS)
    assert back.tolist() == [0, 0, 2, 3, 4, 5, 0, 0, 0, 9, 10, 11]


@pytest.mark.parametrize("step", [1, 3, 4, 12])
def test_windows_over_the_pieces_meet_each_element_once(step):
    flat = np.arange(12)
    found, back = np.full(7, -1), np.full(12, -1)
    for start in range(0, 12, step):
        for there, here in where(CUTS, slice(start, start + step)):
            found[here] = flat[start : start + step][there]
    for start in range(0, 7, step):
        for there, here in whence(CUTS, slice(start, start + step)):
            back[here] = found[start : start + step][there]
    assert found.tolist() == packed(flat, CUTS).tolist()
    assert [n for n in back if n >= 0] == found.tolist()


def write_and_read(group):
    array = share(group, (3, group.size), np.float32)
    array[:, group.rank] = group.rank
    group.submit(c.Barrier())
    return array.tolist()


@pytest.mark.parametrize("transport", SHARING)
def test_what_one_rank_writes_the_others_see(transport):
    assert run_world(3, write_and_read, transport=transport) == [[[0, 1, 2]] * 3] * 3


@pytest.mark.skipif(not futex.AVAILABLE, reason="windows need x86-64 Linux")
def test_processes_see_it_too():
    assert run_world(2, write_and_read, transport="shm", processes=True) == [[[0, 1]] * 3] * 2


def test_each_host_has_its_own():
    found = run_world(3, write_and_read, transport=islands(2, 1))
    assert found[0] == found[1]
    assert [row[:2] for row in found[0]] == [[0, 1]] * 3
    assert [row[2] for row in found[2]] == [2] * 3


@pytest.mark.parametrize(("transport", "size"), [("zmq", 2), ("local", 1)])
def test_without_memory_to_share(transport, size):
    found = run_world(size, lambda group: share(group, 4, np.int8), transport=transport)
    assert [array is None for array in found] == [size > 1] * size


def reuse(group):
    """The places of three arrays; the second is made when the first is gone, the third not."""
    places = []
    for _ in range(2):
        array = share(group, 5000, np.uint8)
        places.append(array.__array_interface__["data"][0])
        view = array[100:200]
        del array
        gc.collect()
        group.submit(c.Barrier())
        again = [share(group, 5000, np.uint8) for _ in range(2 * group.size - 1)]  # `view` lives
        assert not any(np.may_share_memory(view, other) for other in again)
        del view, again
        gc.collect()
        group.submit(c.Barrier())
    return places[0] == places[1]


@pytest.mark.skipif(not futex.AVAILABLE, reason="windows need x86-64 Linux")
def test_memory_is_used_again_when_all_have_let_go():
    assert run_world(2, reuse, transport="shm") == [True, True]


def gather_shared(group):
    out = share(group, 6, np.int32)
    cuts = [[slice(2 * r, 2 * r + 2)] for r in range(3)]
    group.submit(GatherShards(np.full(2, group.rank, np.int32), out, cuts, shared=True))
    return out.tolist()


@pytest.mark.parametrize("transport", [*SHARING, islands(2, 1)], ids=str)
def test_gather_into_a_shared_array(transport):
    assert run_world(3, gather_shared, transport=transport) == [[0, 0, 1, 1, 2, 2]] * 3


CONTRIBUTIONS = [np.full(40_000, v, ml_dtypes.bfloat16) for v in (1.0, 2.0**-9, 3.0)]


def reduce_wide(group):
    own = group.empty(40_000, ml_dtypes.bfloat16)
    own[:] = CONTRIBUTIONS[group.rank]
    cuts = [[slice(0, 20_000)], [slice(20_000, 40_000)], []]
    out = np.zeros(20_000 if group.rank < 2 else 0, np.float32)
    group.submit(ReduceShards(own, out, cuts, AVG))
    return out


@pytest.mark.parametrize("transport", [*SHARING, "zmq", islands(2, 1)], ids=str)
def test_sums_of_bfloat16_are_not_rounded_in_float32(transport):
    expected = np.empty(40_000, np.float32)
    combine(AVG, [a.astype(np.float32) for a in CONTRIBUTIONS], expected)
    assert expected[0] != expected.astype(ml_dtypes.bfloat16)[0]
    found = run_world(3, reduce_wide, transport=transport)
    assert np.concatenate(found).tobytes() == expected.tobytes()


def refuse(group):
    flat, cuts = np.zeros(4, np.float32), [[slice(0, 2)], [slice(2, 4)]]
    for call, error in (
        (ReduceShards(flat, np.zeros(3, np.float32), cuts), ValueError),
        (ReduceShards(flat, flat[:2], cuts), ValueError),
        (ReduceShards(flat, np.zeros(2, np.float64), cuts), TypeError),
        (GatherShards(np.zeros(2, np.int8), flat, cuts), TypeError),
        (GatherShards(flat[:2], flat, [[slice(0, 9)]] * 2), ValueError),
        (GatherShards(flat[:2], flat, cuts[:1]), ValueError),
    ):
        with pytest.raises(error):
            group.submit(call)


def test_nonsense_is_refused_before_anything_is_sent():
    run_world(2, refuse)


def test_pieces_over_hosts_of_unequal_size():
    check_group(islands(1, 2), [3], ["reduce_shards", "gather_shards"], (7, 30_000))
