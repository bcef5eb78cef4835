"""An epoch that stops and goes on with another number of ranks reads every sample exactly once."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import dtrain as torch
import dtrain.distributed as dist
from dtrain.nn.parallel import DistributedDataParallel as DDP
from dtrain.testing.distributed import run_distributed
from dtrain.utils.data import DataLoader, Dataset, DistributedSampler

nn = torch.nn


def samplers(length, ranks, state=None, **options):
    made = [DistributedSampler(range(length), ranks, rank, **options) for rank in range(ranks)]
    for sampler in made:
        if state is not None:
            sampler.load_state_dict(state)
        else:
            sampler.set_epoch(2)
    return made


def read(group, steps):
    """`steps` indices of every rank, in the global order: step by step, rank by rank."""
    shares = [list(islice(iter(sampler), steps)) for sampler in group]
    return [index for step in zip(*shares, strict=True) for index in step]


@settings(max_examples=80, deadline=None)
@given(
    length=st.integers(0, 40),
    worlds=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5)), min_size=1, max_size=3),
    last=st.integers(1, 6),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
def test_every_sample_exactly_once_over_changes_of_the_number_of_ranks(
    length, worlds, last, shuffle, drop_last
):
    """Besides, only what makes the rest of the epoch even is repeated, or left out by drop_last."""
    options = {"shuffle": shuffle, "drop_last": drop_last}
    whole = DistributedSampler(range(length), 1, 0, shuffle=shuffle)
    whole.set_epoch(2)
    order, seen, state = list(whole), [], None
    for ranks, steps in worlds:
        group = samplers(length, ranks, state, **options)
        seen += read(group, steps)[: length - len(seen)]  # behind it an epoch repeats what it must
        states = [sampler.state_dict() for sampler in group]
        assert all(s == states[0] for s in states)
        state = states[0]
        assert state["position"] == len(seen)
    group = samplers(length, last, state, **options)
    rest = length - len(seen)
    assert {len(sampler) for sampler in group} == {rest // last if drop_last else -(-rest // last)}
    tail = read(group, None)
    assert seen + tail[:rest] == order[: len(seen) + len(tail)]
    assert len(tail) - rest < last
    times = Counter(seen + tail)
    assert all(times[i] == 1 for i in order[: len(seen)])
    assert set(times) == set(order) or drop_last


def test_the_loaded_epoch_goes_on_and_others_begin_at_their_start():
    one, two = (DistributedSampler(range(10), 1, 0) for _ in range(2))
    one.set_epoch(3)
    order = list(islice(iter(one), 4))
    assert one.state_dict() == {
        "epoch": 3, "position": 4, "length": 10, "shuffle": True, "seed": 0,
    }  # fmt: skip
    two.load_state_dict(one.state_dict())
    assert two.state_dict() == one.state_dict()
    two.set_epoch(3)  # as the loop over epochs does
    assert len(two) == 6
    rest = list(two)
    assert sorted(order + rest) == list(range(10))
    assert two.state_dict()["position"] == 10
    two.set_epoch(4)
    assert two.state_dict()["position"] == 0
    assert len(list(two)) == 10
    two.load_state_dict(one.state_dict())
    two.set_epoch(5)
    assert len(list(two)) == 10


def test_a_finished_epoch_stays_finished():
    one, two = (DistributedSampler(range(7), 2, rank) for rank in range(2))
    list(one)
    two.load_state_dict(one.state_dict())
    assert list(two) == []
    assert len(two) == 0


def test_going_back_to_a_state_is_no_repeated_order():
    sampler = DistributedSampler(range(8), 1, 0)
    state = sampler.state_dict()
    first = list(sampler)
    sampler.load_state_dict(state)
    assert list(sampler) == first  # warnings are errors


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"seed": 1}, "with seed=0, this one has seed=1"),
        ({"shuffle": False}, "with shuffle=True, this one has shuffle=False"),
        ({"dataset": range(9)}, "with length=8, this one has length=9"),
    ],
)
def test_a_state_of_another_order_is_refused(other, sentence):
    state = DistributedSampler(range(8), 2, 0).state_dict()
    options = {"dataset": range(8), "num_replicas": 2, "rank": 0, **other}
    with pytest.raises(ValueError, match=sentence):
        DistributedSampler(**options).load_state_dict(state)


class Numbers(Dataset):
    def __len__(self):
        return 22

    def __getitem__(self, index):
        return index


LOADERS = [
    {"batch_size": 3},
    {"batch_size": 3, "drop_last": True},
    {"batch_size": None},
    {"batch_size": 2, "num_workers": 2, "prefetch_factor": 4},
    {"batch_size": 3, "num_workers": 1, "drop_last": True, "persistent_workers": True},
]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("options", LOADERS, ids=str)
def test_the_state_counts_what_the_loop_got_and_not_what_was_read_ahead(options):
    sampler = DistributedSampler(Numbers(), 2, 1)
    loader = DataLoader(Numbers(), sampler=sampler, **options)
    assert sampler.state_dict()["position"] == 0
    batches, got = iter(loader), 0
    assert sampler.state_dict()["position"] == 0
    for batch in batches:
        got += 1 if options["batch_size"] is None else len(batch)
        assert sampler.state_dict()["position"] == min(2 * got, 22)
    assert got == (9 if options.get("drop_last") else 11)
    assert sampler.state_dict()["position"] == 22  # what drop_last leaves out is used up
    if loader._workers is not None:
        loader._workers.close()


# --- a training run that goes on with half the ranks ----------------------------------------------

EPOCHS, SAMPLES, GLOBAL_BATCH = 2, 24, 8


class Points(Dataset):
    """Sample i is its number and a row; what is read is noted by the loop."""

    def __init__(self):
        self.x = torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(4))

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return index, self.x[index]


def train(checkpoint, stop_after):
    """Steps from a checkpoint on, at most `stop_after`: samples of this rank, and a checkpoint."""
    torch.manual_seed(0)
    model = DDP(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = Points()
    sampler = DistributedSampler(data, seed=7)
    loader = DataLoader(data, GLOBAL_BATCH // dist.get_world_size(), sampler=sampler)
    if checkpoint is not None:
        for part, state in zip((model, optimizer, sampler), checkpoint, strict=True):
            part.load_state_dict(state)
    used, steps = [], 0
    for epoch in range(sampler.epoch, EPOCHS):
        sampler.set_epoch(epoch)
        for indices, x in loader:
            optimizer.zero_grad()
            (model(x) ** 2).mean().backward()
            optimizer.step()
            used += [(epoch, i) for i in indices.tolist()]
            steps += 1
            if steps == stop_after:
                return used, [part.state_dict() for part in (model, optimizer, sampler)]
    return used, [part.state_dict() for part in (model, optimizer, sampler)]


@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_a_run_that_goes_on_with_2_of_4_ranks_reads_every_sample_exactly_once(stop_after):
    """And ends with the model of one process that never stopped."""
    _, whole = run_distributed(1, train, None, None)[0]
    before = run_distributed(4, train, None, stop_after)
    after = run_distributed(2, train, before[0][1], None)
    times = Counter(key for used, _ in before + after for key in used)
    assert times == {(epoch, i): 1 for epoch in range(EPOCHS) for i in range(SAMPLES)}
    for name, value in after[0][1][0].items():
        np.testing.assert_allclose(value.numpy(), whole[0][name].numpy(), rtol=1e-5, atol=1e-6)
