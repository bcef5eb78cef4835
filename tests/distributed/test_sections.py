"""What only rank 0 does: order, refusal of collectives, errors, and no timeout for the others."""

from __future__ import annotations

import threading

import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.errors import CollectiveTimeout, DistError, PeerLost
from dtrain.testing.distributed import run_distributed

N = 3


def test_rank0_first_goes_first():
    order = []

    def main():
        with dist.rank0_first() as mine:
            assert mine == (dist.get_rank() == 0)
            order.append(dist.get_rank())

    run_distributed(N, main)
    assert order[0] == 0
    assert sorted(order) == [0, 1, 2]


def test_rank0_section_holds_the_others_at_its_end():
    order = []

    def main():
        with dist.rank0_section() as mine:
            if mine:
                order.append(0)
        order.append("after")

    run_distributed(N, main)
    assert order == [0, "after", "after", "after"]


@pytest.mark.parametrize("block", ["rank0_first", "rank0_section"])
def test_a_collective_inside_is_refused(block):
    def main():
        with getattr(dist, block)():
            with pytest.raises(RuntimeError, match=f"{block} at .*test_sections.py:") as caught:
                dist.all_reduce(torch.ones(1))
            assert "all_reduce was called inside" in str(caught.value)
            with pytest.raises(RuntimeError, match="broadcast was called inside"):
                dist.broadcast_object_list([1])
        dist.barrier()

    run_distributed(N, main)


@pytest.mark.parametrize("block", ["rank0_first", "rank0_section"])
def test_the_others_hear_why_rank_0_failed(block):
    def load():
        with getattr(dist, block)() as mine:
            if mine:
                raise FileNotFoundError("no corpus")

    def main():
        error = FileNotFoundError if dist.get_rank() == 0 else DistError
        with pytest.raises(error, match="no corpus") as caught:
            load()
        assert dist.get_rank() == 0 or "rank 0 failed in its rank0_" in str(caught.value)
        dist.barrier()  # the group is as good as before

    run_distributed(N, main)


def test_the_group_timeout_does_not_count():
    others_wait = threading.Barrier(2, timeout=20)
    late = threading.Event()

    def main():
        dist.group.WORLD.set_timeout(0.05)
        if dist.get_rank():
            threading.Timer(0.3, late.set).start()
            others_wait.wait()
        with dist.rank0_section() as mine:
            if mine:
                others_wait.wait()
                assert late.wait(20)

    run_distributed(2, main)


def test_a_wait_may_be_bounded_and_ends_with_rank_0():
    gone = threading.Event()

    def section():
        with dist.rank0_section(timeout=0.05) as mine:
            assert not mine or gone.wait(20)

    def timed():
        with pytest.raises(CollectiveTimeout):
            section()
        gone.set()

    run_distributed(2, timed)

    def left():
        if dist.get_rank() == 0:
            dist.destroy_process_group()
        else:
            with pytest.raises(PeerLost), dist.rank0_first():
                raise AssertionError("rank 0 is gone")

    run_distributed(2, left)
