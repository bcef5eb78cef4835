"""Random tensors: forms, dtypes, errors. The numbers are tested in tests/test_random.py."""

from __future__ import annotations

import pytest

import dtrain as torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("draw", [torch.rand, torch.randn])
def test_forms_of_sizes(draw):
    assert draw(2, 3).shape == draw((2, 3)).shape == draw([2, 3]).shape == (2, 3)
    assert draw(()).shape == ()
    assert draw(0).numel() == 0
    x = draw(2, dtype=torch.float64, requires_grad=True)
    assert (x.dtype, x.requires_grad, x.is_leaf) == (torch.float64, True, True)


def test_the_same_seed_gives_the_same_numbers():
    source = torch.Generator().manual_seed(7)
    first = torch.randn(3, generator=source)
    again = torch.randn(3, generator=torch.Generator().manual_seed(7))
    assert torch.equal(first, again)
    torch.manual_seed(7)
    assert torch.equal(torch.randn(3), first)


def test_like_takes_shape_and_dtype():
    x = torch.zeros(2, 3, dtype=torch.float64)
    assert torch.rand_like(x).dtype is torch.float64
    assert torch.randn_like(x, dtype=torch.float32).shape == (2, 3)


def test_integers():
    x = torch.randint(3, (100,))
    assert (x.dtype, x.min().item(), x.max().item()) == (torch.int64, 0, 2)
    assert torch.randint(-5, 5, (2, 2), dtype=torch.int32).dtype is torch.int32
    assert sorted(torch.randperm(5).tolist()) == [0, 1, 2, 3, 4]
    with pytest.raises(RuntimeError, match="expects 'from' to be less than 'to'"):
        torch.randint(5, 5, (1,))


def test_filling_in_place():
    x = torch.zeros(1000)
    memory = x.data_ptr()
    for fill, low, high in (
        (x.uniform_, 0, 1), (x.bernoulli_, 0, 1), (x.exponential_, 0, 100), (x.normal_, -9, 9),
    ):  # fmt: skip
        assert fill() is x
        assert low <= x.min().item() < x.max().item() <= high
    x.random_(4)
    assert sorted(set(x.tolist())) == [0, 1, 2, 3]
    assert x.data_ptr() == memory
    with pytest.raises(RuntimeError, match="normal expects std >= 0"):
        x.normal_(0, -1)


def test_choices():
    weights = torch.tensor([0.0, 1.0, 0.0])
    assert torch.multinomial(weights, 5, replacement=True).tolist() == [1] * 5
    assert weights.multinomial(1).tolist() == [1]
    assert torch.bernoulli(torch.tensor([0.0, 1.0])).tolist() == [0, 1]
    assert torch.normal(torch.tensor([1.0, 2.0]), 0.0).tolist() == [1, 2]
    assert torch.normal(3.0, 0.0, (2,)).tolist() == [3, 3]


def test_leaves_that_require_grad_are_filled_under_no_grad():
    x = torch.zeros(3, requires_grad=True)
    with torch.no_grad():
        x.normal_()
    assert x.requires_grad
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        x.normal_()
