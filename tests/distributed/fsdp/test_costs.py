"""What a step costs: bytes and calls as closed forms, one copy of the parameters on a host."""

from __future__ import annotations

import functools

import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.testing.distributed import run_distributed
from tests.comm.hosts import islands
from tests.distributed.fsdp import training

UNITS = 3  # of the GPT: two blocks and the rest


def cost_of_a_step(reshard_after_forward):
    """(bytes sent, calls) of this rank in a later step; elements and parameters of the model."""
    model = training.sharded(
        "GPT", training.made("GPT"), reshard_after_forward=reshard_after_forward
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    arrays = dist.group.WORLD.arrays
    share = training.BATCH // dist.get_world_size()
    for step in range(3):
        before = arrays.statistics()
        model(*(t[:share] for t in training.MODELS["GPT"][1](step))).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = arrays.statistics()
    sizes = [p.numel() for p in model.parameters()]
    sent = after.bytes_sent - before.bytes_sent
    return sent, after.completed - before.completed, sum(sizes), len(sizes)


@pytest.mark.parametrize(("wanted", "gathers"), [(True, 2), (False, 1)])
@pytest.mark.parametrize(("transport", "ranks"), [("zmq", 2), ("zmq", 3), (islands(1, 1), 2)])
def test_bytes_and_calls_over_messages(transport, ranks, wanted, gathers):
    """Each gather sends every element to all others, a reduction does, too; and a flag for each
    parameter to and from everybody.
    """
    found = run_distributed(ranks, cost_of_a_step, wanted, transport=transport)
    elements, parameters = found[0][2:]
    sent = sum(each[0] for each in found)
    flags = ranks * (ranks - 1) * parameters
    assert sent == 4 * ((gathers + 1) * (ranks - 1) * elements + flags)
    assert {calls for _, calls, *_ in found} == {(gathers + 1) * UNITS}


@pytest.mark.parametrize("wanted", [True, False, None])
def test_on_one_host_a_step_is_a_barrier_and_a_reduction_for_each_unit(wanted):
    found = run_distributed(2, cost_of_a_step, wanted, transport="shm")
    assert {calls for _, calls, *_ in found} == {1 + UNITS}
    assert all(sent == 0 for sent, *_ in found)


def test_hosts_of_several_ranks_gather_once():
    """Each element goes to the other host once after a change, and once back as a gradient; each
    rank's flags go there, too.
    """
    found = run_distributed(4, functools.partial(cost_of_a_step, None), transport=islands(2, 2))
    elements = found[0][2]
    sent = sum(each[0] for each in found)
    assert {calls for _, calls, *_ in found} == {2 * UNITS}
    assert 4 * 2 * elements <= sent <= 4 * 3 * elements
