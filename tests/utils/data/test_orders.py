"""Orders of samplers and loaders, and what they take from the random stream, are PyTorch's."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

import dtrain as torch
import dtrain.utils.data  # torch.utils.data in cases.py
from dtrain import ranks
from dtrain.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    random_split,
)
from tests.recorded import load_json
from tests.utils.data.cases import ITERABLE_LOADERS, MAP_LOADERS, SHARES, plain, read, shares

RECORDED = load_json("data_orders")
SEEDS = sorted(RECORDED)
NAMES = {
    cls.__name__: cls
    for cls in (DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
}


def order(expression, seed):
    """What the recorded expression gives over range(10), with g seeded as when recording."""
    g = torch.Generator()
    g.manual_seed(seed + 1)
    if expression.startswith("DistributedSampler"):
        return [shares(torch, (10, 3, True, False, seed % 1000, 2))[rank] for rank in range(3)]
    names = {**NAMES, "random_split": random_split, "data": range(10), "g": g}
    found = eval(expression, names)
    if isinstance(found, DataLoader):
        return [[plain(batch) for batch in found] for _ in range(2)]
    return [part.indices for part in found] if isinstance(found, list) else list(found)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("expression", RECORDED[SEEDS[0]])
def test_orders_are_those_of_torch(expression, seed):
    recorded = RECORDED[seed][expression]
    torch.manual_seed(int(seed))
    assert order(expression, int(seed)) == recorded["order"]
    assert torch.rand(1).item() == recorded["next"]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("options", MAP_LOADERS)
def test_map_loaders_are_those_of_torch_in_every_worker(options):
    assert read(torch, options, iterable=False) == load_json("data_loaders")[options]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("options", ITERABLE_LOADERS)
def test_iterable_loaders_are_those_of_torch_in_every_worker(options):
    recorded = load_json("data_loaders")[f"iterable, {options}"]
    assert read(torch, options, iterable=True) == recorded


@pytest.mark.parametrize("case", SHARES, ids=str)
def test_shares_of_ranks_are_those_of_torch(case):
    ours = shares(torch, case)
    assert ours == load_json("distributed_shares")[str(case)]
    assert len({len(order) for order in ours}) == 1


def test_random_sampler_with_replacement_is_lazy():
    sampler = RandomSampler(range(5), replacement=True, num_samples=10**10)
    assert len(sampler) == 10**10
    assert set(islice(sampler, 100)) <= set(range(5))


def test_nothing_is_drawn_before_the_first_index():
    torch.manual_seed(0)
    iter(RandomSampler(range(5)))
    iter(SubsetRandomSampler(range(5)))
    assert torch.rand(1).item() == np.float32(0.49625658988952637)


def test_batches_of_any_sampler():
    batches = BatchSampler(iter(range(7)), 3, drop_last=False)
    assert list(batches) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(BatchSampler(SequentialSampler(range(7)), 3, True)) == [[0, 1, 2], [3, 4, 5]]
    assert len(BatchSampler(range(7), 3, True)) == 2
    assert len(BatchSampler(range(7), 3, False)) == 3


def test_a_repeated_epoch_is_warned_of_once():
    sampler = DistributedSampler(range(4), 2, 0)
    first = list(sampler)
    with pytest.warns(UserWarning, match=r"order of epoch 0 again: call set_epoch"):
        assert list(sampler) == first
    list(sampler)


def test_epochs_that_are_set_or_not_shuffled_are_not_warned_of():
    sampler, plain_order = (
        DistributedSampler(range(9), 2, 1),
        DistributedSampler(range(9), 2, 1, shuffle=False),
    )
    orders = []
    for epoch in (0, 1, 2, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert list(plain_order) == [1, 3, 5, 7, 0]
    assert orders[0] == orders[3] != orders[1]


def test_ranks_come_from_whoever_knows_the_process_group(monkeypatch):
    monkeypatch.setattr(ranks, "_world", ranks.nobody)
    with pytest.raises(ValueError, match="Default process group has not been initialized"):
        DistributedSampler(range(4))
    ranks.set_world(lambda: (4, 3))
    sampler = DistributedSampler(range(8), shuffle=False)
    assert list(sampler) == [3, 7]
    assert list(DistributedSampler(range(8), rank=1, shuffle=False)) == [1, 5]


@pytest.mark.parametrize(
    ("build", "error", "sentence"),
    [
        (lambda: RandomSampler([]), ValueError, "num_samples should be a positive integer value"),
        (lambda: RandomSampler([1], "yes"), TypeError, "replacement should be a boolean value"),
        (lambda: RandomSampler([1], num_samples=0), ValueError, "but got num_samples=0"),
        (lambda: WeightedRandomSampler([1], 0), ValueError, "but got num_samples=0"),
        (lambda: WeightedRandomSampler([1], True), ValueError, "but got num_samples=True"),
        (lambda: WeightedRandomSampler([1], 1, 1), ValueError, "replacement should be a boolean"),
        (lambda: WeightedRandomSampler([[1]], 1), ValueError, r"given weights have shape \(1, 1\)"),
        (lambda: BatchSampler([1], 0, True), ValueError, "batch_size should be a positive integer"),
        (lambda: BatchSampler([1], 1, 1), ValueError, "drop_last should be a boolean value"),
        (lambda: DistributedSampler([1], 2, 2), ValueError, r"should be in the interval \[0, 1\]"),
    ],
)
def test_what_samplers_refuse(build, error, sentence):
    with pytest.raises(error, match=sentence):
        build()
