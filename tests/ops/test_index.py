"""Indexing, gather and scatter: PyTorch's values and gradients.

Recorded expressions, then properties against NumPy and who shares memory.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

import dtrain as torch
from tests.ops.comparing import check_expression
from tests.ops.expressions import FAMILIES


@pytest.mark.parametrize("text", FAMILIES["index"])
def test_values_and_gradients_are_pytorchs(text):
    check_expression(text)


def test_views_and_copies():
    x = torch.zeros(3, 4)
    for view in (x[0], x[:, 1], x[..., None], x[1, 2], x[torch.tensor(1)], x[1:]):
        assert view._base is x
    for copy in (x[[0]], x[torch.tensor([0])], x[x > 0], x[True]):
        assert copy._base is None
    x[0][1] = 5
    assert x[0, 1].item() == 5


def test_uint8_masks_warn():
    with pytest.warns(UserWarning, match="dtype torch.uint8 is now deprecated"):
        found = torch.arange(3)[torch.tensor([1, 0, 1], dtype=torch.uint8)]
    assert found.tolist() == [0, 2]


PARTS = st.one_of(
    st.integers(-2, 1), st.slices(2), st.none(), st.just(...),
    st.lists(st.integers(-2, 1), min_size=2, max_size=2),
)  # fmt: skip


@given(st.lists(PARTS, max_size=3).filter(lambda p: p.count(...) < 2))
def test_assignment_and_gradient_agree_with_selection(parts):
    """x[i] = 1 marks what x[i] selects; the gradient of x[i].sum() counts it."""
    parts = [slice(p.start, p.stop, abs(p.step or 1)) if isinstance(p, slice) else p for p in parts]
    index = tuple(parts)
    numbers = torch.arange(8).reshape(2, 2, 2)
    chosen = numbers[index].reshape(-1).tolist()
    marked = torch.zeros(2, 2, 2)
    marked[index] = 1
    assert marked.reshape(-1).nonzero()[:, 0].tolist() == sorted(set(chosen))
    x = torch.zeros(2, 2, 2, requires_grad=True)
    x[index].sum().backward()
    assert x.grad.reshape(-1).tolist() == [chosen.count(k) for k in range(8)]


def test_the_index_is_remembered_as_it_was():
    x, index = torch.zeros(3, requires_grad=True), torch.tensor([0, 0])
    y = x[index].sum()
    index[:] = 2
    y.backward()
    assert x.grad.tolist() == [2, 0, 0]


def test_assignment_casts_and_wraps_as_torch():
    x = torch.zeros(3, dtype=torch.uint8)
    x[0], x[1], x[2] = -1, 2.7, True
    assert x.tolist() == [255, 2, 1]
    y = torch.zeros(3)
    y[:] = torch.ones(1, 1, 3, dtype=torch.float64)
    assert y.tolist() == [1, 1, 1]


def test_gradients_of_repeated_rows_are_reproducible():
    """200 rows of 3 into 5, as exact as float32 is, and the same bits every time."""
    r = np.random.RandomState(0)
    index, rows = r.randint(0, 5, 200), r.randn(200, 3).astype(np.float32)

    def gradient():
        x = torch.zeros(5, 3, requires_grad=True)
        x[torch.tensor(index)].backward(torch.tensor(rows))
        return x.grad.numpy()

    exact = np.zeros((5, 3))
    np.add.at(exact, index, rows.astype(np.float64))
    np.testing.assert_allclose(gradient(), exact, rtol=1e-5, atol=1e-5)
    assert np.array_equal(gradient(), gradient())
