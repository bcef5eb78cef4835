"""Gradient clipping against closed forms; PyTorch's values are compared in the scenarios."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import dtrain
from dtrain import nn


def with_grads(*arrays):
    parameters = []
    for array in arrays:
        parameter = nn.Parameter(dtrain.zeros(array.shape, dtype=dtrain.from_numpy(array).dtype))
        parameter.grad = dtrain.from_numpy(array)
        parameters.append(parameter)
    return parameters


@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=4),
    max_norm=st.floats(0.01, 10),
    order=st.sampled_from([1.0, 2.0, 3.0, float("inf")]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_clipping_scales_everything_by_one_factor(sizes, max_norm, order, seed):
    draw = np.random.RandomState(seed)
    arrays = [draw.randn(n).astype(np.float32) for n in sizes]
    parameters = with_grads(*[a.copy() for a in arrays])
    norm = nn.utils.clip_grad_norm_(parameters, max_norm, order).item()
    whole = np.concatenate(arrays).astype(np.float64)
    assert norm == pytest.approx(np.linalg.norm(whole, order) if whole.size else 0, rel=1e-5)
    scale = min(1.0, max_norm / (norm + 1e-6))
    for parameter, array in zip(parameters, arrays, strict=True):
        np.testing.assert_allclose(parameter.grad.numpy(), array * scale, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_squares_that_leave_float32_do_not_spoil_the_norm(size):
    parameters = with_grads(np.full(4, size, np.float32), np.full(5, size, np.float32))
    assert nn.utils.clip_grad_norm_(parameters, 1.0).item() == pytest.approx(3 * size, rel=1e-6)


def test_grads_of_any_layout_and_dtype():
    wide = np.arange(12, dtype=np.float32).reshape(3, 4)
    parameters = with_grads(wide.T, wide[:, ::2], wide.astype(np.float16))
    expected = np.sqrt((wide**2).sum() * 2 + (wide[:, ::2] ** 2).sum())
    norm = nn.utils.clip_grad_norm_(parameters, 1e9)
    assert norm.item() == pytest.approx(expected, rel=1e-6)
    assert norm.dtype is dtrain.float32


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_norm_that_is_no_number(bad):
    parameters = with_grads(np.array([1.0, bad], np.float32))
    with pytest.raises(RuntimeError, match=r"The total norm of order 2.0 .* is non-finite"):
        nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
    nn.utils.clip_grad_norm_(parameters, 1.0)
    expected = [0.0, np.nan] if np.isinf(bad) else [np.nan, np.nan]  # as in PyTorch
    np.testing.assert_array_equal(parameters[0].grad.numpy(), np.array(expected, np.float32))


def test_nothing_to_clip():
    assert nn.utils.clip_grad_norm_([], 1.0).item() == 0
    assert nn.utils.clip_grad_norm_(nn.Linear(2, 2).parameters(), 1.0).item() == 0
    with pytest.warns(UserWarning, match="`parameters` is an empty generator"):
        nn.utils.clip_grad_norm_(nn.ReLU().parameters(), 1.0)
    one = with_grads(np.ones(3, np.float32))[0]
    nn.utils.clip_grad_value_(one, 0.5)
    nn.utils.clip_grad_norm_(one, 0.1)
    assert np.linalg.norm(one.grad.numpy()) == pytest.approx(0.1, rel=1e-4)
