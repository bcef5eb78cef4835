"""Pooling: ties, nan, integers, and torch's sentences; the rest is recorded."""

from __future__ import annotations

import numpy as np
import pytest

import dtrain
from dtrain.nn import functional as F


def test_the_first_of_equal_maxima_gets_the_gradient():
    x = dtrain.zeros(1, 1, 4, 4, requires_grad=True)
    y, index = F.max_pool2d(x, 2, return_indices=True)
    assert index.flatten().tolist() == [0, 2, 8, 10]
    y.sum().backward()
    expected = np.zeros((4, 4))
    expected[::2, ::2] = 1
    np.testing.assert_array_equal(x.grad[0, 0].numpy(), expected)


def test_overlapping_windows_add_their_gradients():
    x = dtrain.tensor([[[0.0, 5.0, 0.0, 0.0]]], requires_grad=True)
    F.max_pool1d(x, 2, 1).sum().backward()
    assert x.grad.tolist() == [[[0.0, 2.0, 1.0, 0.0]]]


def test_nan_is_a_maximum():
    x = dtrain.tensor([[[float("nan"), 1.0, 2.0, 3.0]]])
    y = F.max_pool1d(x, 2)
    assert np.isnan(y[0, 0, 0].item())
    assert y[0, 0, 1].item() == 3


def test_integers_and_padding():
    x = dtrain.tensor([[[-5, -7, -6]]])
    assert F.max_pool1d(x, 3, 1, 1).tolist() == [[[-5, -5, -6]]]


def test_the_indices_of_every_window_point_at_its_maximum():
    x = dtrain.tensor(np.random.RandomState(0).randn(2, 3, 7, 6))
    y, index = F.max_pool2d(x, (3, 2), (2, 1), (1, 1), return_indices=True)
    picked = x.flatten(2).gather(2, index.flatten(2)).reshape(y.shape)
    np.testing.assert_array_equal(picked.numpy(), y.numpy())


R = dtrain.zeros


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: F.max_pool2d(R(1, 1, 4, 4), 2, padding=2),
         "pad should be at most half of effective kernel size, but got pad=2, kernel_size=2 and "
         "dilation=1"),
        (lambda: F.max_pool2d(R(1, 1, 4, 4), 2, padding=-1),
         "pad must be non-negative, but got pad: -1"),
        (lambda: F.max_pool2d(R(1, 1, 1, 4), 2),
         "Given input size: (1x1x4). Calculated output size: (1x0x2). Output size is too small"),
        (lambda: F.max_pool2d(R(1, 4), 2), "tensor expected for input"),
        (lambda: F.max_pool2d(R(1, 1, 4, 4), 2, 0), "stride should not be zero"),
        (lambda: F.max_pool2d(R(1, 1, 4, 4), (1, 2, 3)),
         "kernel_size must either be a single int, or a tuple of 2 ints"),
        (lambda: F.avg_pool2d(R(1, 1, 4, 4), 2, divisor_override=0), "divisor must be not zero"),
        (lambda: F.adaptive_avg_pool2d(R(1, 4), 2),
         "adaptive_avg_pool2d(): Expected 3D or 4D tensor, but got [1, 4]"),
    ],
)  # fmt: skip
def test_refusals(call, sentence):
    with pytest.raises(RuntimeError) as refusal:
        call()
    assert sentence in str(refusal.value)
