"""Datasets, and how samples become a batch."""

from __future__ import annotations

from collections import OrderedDict, namedtuple

import numpy as np
import pytest

import dtrain as torch
from dtrain.utils.data import (
    ChainDataset,
    ConcatDataset,
    Dataset,
    IterableDataset,
    StackDataset,
    Subset,
    TensorDataset,
    default_collate,
    default_convert,
    random_split,
)

Point = namedtuple("Point", "x y")


class Numbers(IterableDataset):
    def __init__(self, *numbers):
        self.numbers = numbers

    def __iter__(self):
        return iter(self.numbers)

    def __len__(self):
        return len(self.numbers)


class Squares(Dataset[int]):
    """Knows how to read several at once."""

    def __getitem__(self, index):
        return index**2

    def __getitems__(self, indices):
        return [(i**2, "at once") for i in indices]

    def __len__(self):
        return 5


def test_tensor_dataset():
    data = TensorDataset(torch.arange(6).view(3, 2), torch.tensor([5, 6, 7]))
    assert len(data) == 3
    assert [part.tolist() for part in data[1]] == [[2, 3], 6]
    with pytest.raises(AssertionError, match=r"Size mismatch between tensors: first sizes \[2, 3"):
        TensorDataset(torch.zeros(2), torch.zeros(3))


def test_datasets_after_each_other():
    data = ConcatDataset([range(3), [], range(10, 12)])
    assert len(data) == 5
    assert [data[i] for i in (0, 2, 3, 4, -1, -5)] == [0, 2, 10, 11, 11, 0]
    assert list(data) == [0, 1, 2, 10, 11]  # ends by IndexError, as any sequence
    with pytest.raises(ValueError, match="absolute value of index"):
        data[-6]
    assert len(Squares() + Squares()) == 10
    assert list(Numbers(1, 2) + Numbers(3)) == [1, 2, 3]
    assert len(ChainDataset([Numbers(1, 2), Numbers(3)])) == 3
    for build in (
        lambda: ConcatDataset([]),
        lambda: ConcatDataset([Numbers()]),
        lambda: ChainDataset([[1]]),
    ):
        with pytest.raises(AssertionError):
            build()


def test_datasets_beside_each_other():
    assert StackDataset(range(3), "abc")[1] == (1, "b")
    assert StackDataset(n=range(3), c="abc")[2] == {"n": 2, "c": "c"}
    assert len(StackDataset(n=range(3))) == 3
    for args, kwargs in (
        ((), {}),
        (([1],), {"a": [1]}),
        (([1], []), {}),
        ((), {"a": [1], "b": []}),
    ):
        with pytest.raises(ValueError, match=r"at least|At least|both types|Size mismatch"):
            StackDataset(*args, **kwargs)


def test_subset():
    subset = Subset(Squares(), [4, 2])
    assert (len(subset), subset[0]) == (2, 16)
    assert subset.__getitems__([1, 0]) == [(4, "at once"), (16, "at once")]
    assert Subset("abcde", [4, 2]).__getitems__([0, 1]) == ["e", "c"]
    assert Subset(np.arange(9) * 2, [4, 2])[[0, 1]].tolist() == [8, 4]

    class Upper(Subset):
        def __getitem__(self, index):
            return super().__getitem__(index).upper()

    assert Upper("abcde", [4, 2]).__getitems__([0, 1]) == ["E", "C"]


def test_random_split_refuses_and_warns():
    with pytest.raises(ValueError, match="Expected 10, got 9"):
        random_split(range(10), [4, 5])
    with pytest.raises(ValueError, match="Fraction at index 0 is not between 0 and 1"):
        random_split(range(10), [1.5, -0.5])
    with pytest.warns(UserWarning, match="Length of split at index 1 is 0"):
        parts = random_split(range(3), [0.9, 0.1])
    assert [len(part) for part in parts] == [3, 0]


def test_bases_say_what_is_missing():
    with pytest.raises(NotImplementedError, match="should implement __getitem__"):
        Dataset()[0]
    with pytest.raises(NotImplementedError, match="should implement __iter__"):
        iter(IterableDataset())


@pytest.mark.parametrize(
    ("samples", "dtype", "values"),
    [
        ([1, 2], torch.int64, [1, 2]),
        ([1.5, 2.0], torch.float64, [1.5, 2.0]),
        ([True, False], torch.bool, [True, False]),
        ([np.float32(1), np.float32(2)], torch.float32, [1, 2]),
        ([np.array([1, 2], np.int16)] * 2, torch.int16, [[1, 2], [1, 2]]),
        ([torch.zeros(2), torch.ones(2)], torch.float32, [[0, 0], [1, 1]]),
        ([torch.zeros(1), torch.tensor([1])], torch.float32, [[0], [1]]),
    ],
)
def test_leaves_are_stacked(samples, dtype, values):
    batch = default_collate(samples)
    assert batch.dtype is dtype
    assert batch.tolist() == values


def test_containers_keep_their_types():
    assert default_collate(["a", "b"]) == ["a", "b"]
    collated = default_collate([(1, "a"), (2, "b")])
    assert (collated[0].tolist(), collated[1]) == ([1, 2], ("a", "b"))
    point = default_collate([Point(1, [2.0]), Point(3, [4.0])])
    assert isinstance(point, Point)
    assert point.y[0].tolist() == [2, 4]
    mapping = default_collate([OrderedDict(a=1, b=(2,)), OrderedDict(a=3, b=(4,))])
    assert isinstance(mapping, OrderedDict)
    assert (mapping["a"].tolist(), mapping["b"][0].tolist()) == ([1, 3], [2, 4])


def test_gradients_flow_through_a_batch():
    weight = torch.ones(2, requires_grad=True)
    default_collate([weight * 2, weight * 3]).sum().backward()
    assert weight.grad.tolist() == [5, 5]


@pytest.mark.parametrize(
    ("samples", "error", "sentence"),
    [
        ([object()], TypeError, "must contain tensors, numpy arrays, numbers, dicts or lists; fo"),
        ([np.array(["a"])], TypeError, "found <U1"),
        (
            [torch.ones(2), torch.ones(3)],
            RuntimeError,
            "stack expects each tensor to be equal size",
        ),
        ([np.ones(2), np.ones(3)], RuntimeError, "stack expects each tensor to be equal size"),
        ([[1, 2], [3]], RuntimeError, "each element in list of batch should be of equal size"),
    ],
)
def test_what_collate_refuses(samples, error, sentence):
    with pytest.raises(error, match=sentence):
        default_collate(samples)


def test_convert_makes_tensors_only():
    text, thing = np.array(["a"]), object()
    converted = default_convert({"a": [np.ones(2), "s", thing], "p": Point(np.int64(3), text)})
    assert isinstance(converted["a"][0], torch.Tensor)
    assert converted["a"][1:] == ["s", thing]
    assert (converted["p"].x.item(), converted["p"].y) == (3, text)
    assert [part.item() for part in default_convert((np.float64(1), np.bool_(True)))] == [1, True]
