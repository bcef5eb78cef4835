"""Factories: PyTorch's values, dtypes and aliasing.

Recorded expressions, then what a recording cannot say: who shares memory with whom.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

import dtrain as torch
from tests.ops.comparing import check_expression
from tests.ops.expressions import FAMILIES


@pytest.mark.parametrize("text", FAMILIES["create"])
def test_values_and_gradients_are_pytorchs(text):
    check_expression(text)


def test_from_numpy_shares_memory_and_tensor_does_not():
    array = np.zeros(3)
    shared, copied = torch.from_numpy(array), torch.tensor(array)
    array[0] = 7
    assert (shared[0].item(), copied[0].item()) == (7, 0)
    assert torch.as_tensor(array).data_ptr() == shared.data_ptr()
    assert torch.as_tensor(shared) is shared
    assert torch.as_tensor([1, 2], dtype=torch.float64).dtype is torch.float64


def test_factories_take_device_and_requires_grad():
    x = torch.zeros(2, device="cpu", requires_grad=True)
    assert x.requires_grad
    assert x.is_leaf
    with pytest.raises(RuntimeError, match="can require gradients"):
        torch.zeros(2, dtype=torch.int64, requires_grad=True)
    with pytest.raises(RuntimeError, match="dtrain runs on the CPU"):
        torch.zeros(2, device="cuda")


def test_the_default_dtype_is_that_of_factories():
    torch.set_default_dtype(torch.float64)
    try:
        assert {torch.zeros(1).dtype, torch.tensor(1.5).dtype, (torch.arange(2) / 2).dtype} == {
            torch.float64
        }
    finally:
        torch.set_default_dtype(torch.float32)


def test_legacy_types_ask_for_the_dtype():
    x = torch.LongTensor([1])
    assert isinstance(x, torch.LongTensor)
    assert not isinstance(x, torch.FloatTensor)
    assert x.type() == "dtrain.LongTensor"
    assert x.new([1.5]).dtype is torch.int64
    assert torch.Tensor(torch.zeros(2, 3).size()).shape == (2, 3)
    with pytest.raises(ValueError, match="invalid type"):
        x.type("torch.NoTensor")


@given(
    start=st.integers(-50, 50), length=st.integers(0, 40),
    step=st.integers(-7, 7).filter(bool),
)  # fmt: skip
def test_arange_is_range(start, length, step):
    stop = start + step * length
    assert torch.arange(start, stop, step).tolist() == list(range(start, stop, step))
