"""Pointwise functions: PyTorch's values, promotion and gradients.

Recorded expressions, then what the operators answer to what they do not know.
"""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, strategies as st

import dtrain as torch
from tests.ops.comparing import check_expression
from tests.ops.expressions import FAMILIES


@pytest.mark.parametrize("text", FAMILIES["elementwise"])
def test_values_and_gradients_are_pytorchs(text):
    check_expression(text)


@given(st.floats(-30, 30, width=32), st.floats(-30, 30, width=32))
def test_number_and_tensor_operands_agree(a, b):
    """Either operand may be a Python number: same value, same gradient for the other."""
    for op in (torch.add, torch.sub, torch.mul):
        x, y = (torch.tensor(v, requires_grad=True) for v in (a, b))
        both, right, left = op(x, y), op(x, b), op(a, y)
        assert both.item() == right.item() == left.item()
        both.backward()
        for number, tensor in ((right, x), (left, y)):
            assert torch.autograd.grad(number, tensor)[0].item() == tensor.grad.item()


def test_operators_leave_what_they_do_not_know_to_the_other_operand():
    class Other:
        def __radd__(self, left):
            return "mine"

        def __rmul__(self, left):
            return "mine too"

    x = torch.ones(2)
    assert x + Other() == "mine"
    assert x * Other() == "mine too"
    assert (x == None) is False  # noqa: E711
    assert (x == "a") is False
    with pytest.raises(TypeError, match="not supported between instances"):
        x < None  # noqa: B015


def test_arrays_and_numpy_numbers_are_operands():
    x = torch.ones(2, requires_grad=True)
    for y in (x * np.array([2.0, 3.0], np.float32), np.array([2.0, 3.0], np.float32) * x):
        assert y.requires_grad
        assert y.tolist() == [2, 3]
    assert (np.float64(2) * x).dtype is torch.float32
    assert (x * np.float64(2)).dtype is torch.float32
    assert (x + np.ones(2)).dtype is torch.float64


def test_unpickled_arrays_have_dtype_objects_of_their_own():
    x = pickle.loads(pickle.dumps(torch.ones(2)))
    assert (x + torch.ones(2)).tolist() == [2, 2]
    assert (torch.ones(2) * x).dtype is torch.float32
