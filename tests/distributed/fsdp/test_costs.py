"""What a step costs: bytes and calls as closed forms, one copy of the parameters on a host."""

from __future__ import annotations

import functools

import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.comm.parts import length
from dtrain.testing.distributed import run_distributed
from tests.comm.hosts import islands
from tests.distributed.fsdp import training

UNITS = 3  # of the GPT: two blocks and the rest


def cost_of_a_step(reshard_after_forward):
    """(bytes sent, calls) of this rank in a later step; elements and parameters of the model;
    for each unit the most elements that a rank owns, and its parameters.
    """
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
    units = [
        (max(map(length, unit.layout.cuts)), len(unit.sharded))
        for unit in model._fsdp_state.root.units
    ]
    return sent, after.completed - before.completed, sum(sizes), len(sizes), units


@pytest.mark.parametrize(("wanted", "gathers"), [(True, 2), (False, 1)])
@pytest.mark.parametrize(("transport", "ranks"), [("zmq", 2), ("zmq", 3), (islands(1, 1), 2)])
def test_bytes_and_calls_over_messages(transport, ranks, wanted, gathers):
    """Each gather sends every element to all others, a reduction does, too; and a flag for each
    parameter to and from everybody.
    """
    found = run_distributed(ranks, cost_of_a_step, wanted, transport=transport)
    elements, parameters = found[0][2:4]
    sent = sum(each[0] for each in found)
    flags = ranks * (ranks - 1) * parameters
    assert sent == 4 * ((gathers + 1) * (ranks - 1) * elements + flags)
    assert {calls for _, calls, *_ in found} == {(gathers + 1) * UNITS}


@pytest.mark.parametrize("wanted", [True, False, None])
def test_on_one_host_a_step_is_a_barrier_and_a_reduction_for_each_unit(wanted):
    found = run_distributed(2, cost_of_a_step, wanted, transport="shm")
    assert {calls for _, calls, *_ in found} == {1 + UNITS}
    assert all(sent == 0 for sent, *_ in found)


@pytest.mark.parametrize(("wanted", "gathers"), [(None, 1), (True, 2)])
@pytest.mark.parametrize("hosts", [(2, 2), (2, 1), (2, 2, 2)])
def test_what_crosses_between_hosts_of_several_ranks(hosts, wanted, gathers):
    """What a rank owns goes to each other host once a gather. Gradients of all ranks' rows go up
    from host to host, as one sum, and those that the hosts before want come back.
    """
    world = functools.partial(cost_of_a_step, wanted)
    found = run_distributed(sum(hosts), world, transport=islands(*hosts))
    assert {calls for _, calls, *_ in found} == {(gathers + 1) * UNITS}
    owned = sum(longest for longest, _ in found[0][4])
    flags = sum(parameters for _, parameters in found[0][4])
    first = 0
    for host, ranks in enumerate(hosts):
        gathered = gathers * ranks * (len(hosts) - 1) * owned
        up = sum(hosts) * (host < len(hosts) - 1)
        reduced = (up + first) * (owned + flags)  # `first` ranks are on the hosts before
        assert sum(each[0] for each in found[first : first + ranks]) == 4 * (gathered + reduced)
        first += ranks
    if len(set(hosts)) == 1:  # then all hosts together send as the page says, but for padding
        shares, elements = len(hosts) - 1, found[0][2]
        sent = sum(each[0] for each in found)
        assert sent == pytest.approx(4 * (gathers + 1.5) * elements * shares, rel=0.05)
