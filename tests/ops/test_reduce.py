"""Reductions and scans: PyTorch's values, dtypes and gradients.

Recorded expressions, then precision and NumPy's names.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

import dtrain as torch
from tests.ops.comparing import check_expression
from tests.ops.expressions import FAMILIES


@pytest.mark.parametrize("text", FAMILIES["reduce"])
def test_values_and_gradients_are_pytorchs(text):
    check_expression(text)


def test_half_precision_adds_up_in_single():
    x = torch.full((4096,), 0.1, dtype=torch.float16)
    assert abs(x.sum().item() - 4096 * x[0].item()) < 0.5
    big = torch.full((4,), 60000.0, dtype=torch.float16)
    assert big.mean().item() == 60000
    brain = torch.full((1000,), 1.0, dtype=torch.bfloat16)
    assert brain.sum().item() == 1000
    assert brain.sum().dtype is torch.bfloat16


def test_numpys_names_of_arguments():
    x = torch.arange(6.0).reshape(2, 3)
    assert x.sum(axis=0, keepdims=True).shape == (1, 3)
    assert torch.max(x, axis=1).indices.tolist() == [2, 2]
    assert torch.cumsum(x, axis=1).tolist() == [[0, 1, 3], [3, 7, 12]]


def test_names_of_results():
    found = torch.tensor([3.0, 5.0]).max(0)
    assert (found.values.item(), found.indices.item()) == (5, 1)
    value, index = found
    assert (value.item(), index.item()) == (5, 1)


@given(st.lists(st.sampled_from([-1.5, 0.0, 2.0, 3.0]), min_size=1, max_size=6))
def test_products_have_gradients_with_zeros_too(values):
    """d prod / dx_i is the product of the others; d cumprod the same for every prefix."""
    x = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    x.prod().backward()
    others = [np.prod(values[:i] + values[i + 1 :]) for i in range(len(values))]
    np.testing.assert_allclose(x.grad.numpy(), others)
    (found,) = torch.autograd.grad(x.cumprod(0).sum(), x)
    expected = [
        sum(np.prod(values[:i] + values[i + 1 : j]) for j in range(i + 1, len(values) + 1))
        for i in range(len(values))
    ]
    np.testing.assert_allclose(found.numpy(), expected)
