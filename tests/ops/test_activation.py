"""Activations where recordings do not reach: extremes, blocks, strides, and torch's sentences."""

from __future__ import annotations

import math

import numpy as np
import pytest

import dtrain
from dtrain.nn import functional as F
from dtrain.ops.special import BLOCK

SMOOTH = {
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "logsigmoid": lambda x: -math.log1p(math.exp(-x)),
    "softplus": lambda x: math.log1p(math.exp(x)),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_more_than_a_block_and_any_strides(name):
    rows = BLOCK // 50 + 3
    x = np.random.RandomState(0).randn(100, rows).T  # more than a block, not contiguous
    found = getattr(F, name)(dtrain.from_numpy(x)).numpy()
    np.testing.assert_allclose(found, np.vectorize(SMOOTH[name])(x), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("function", "low", "high"),
    [
        (F.gelu, 0.0, 1e4),
        (lambda x: F.gelu(x, approximate="tanh"), 0.0, 1e4),
        (F.silu, 0.0, 1e4),
        (F.softplus, 0.0, 1e4),
        (F.logsigmoid, -1e4, 0.0),
        (F.sigmoid, 0.0, 1.0),
        (F.elu, -1.0, 1e4),
    ],
)
def test_far_from_zero_nothing_overflows(function, low, high):
    x = dtrain.tensor([-1e4, 1e4], requires_grad=True)
    y = function(x)
    np.testing.assert_allclose(y.tolist(), [low, high], atol=1e-30)
    y.sum().backward()
    assert np.isfinite(x.grad.numpy()).all()


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_keeps_nan_and_dtype(approximate):
    y = F.gelu(dtrain.tensor([float("nan"), 1.0]), approximate=approximate)
    assert y.dtype is dtrain.float32
    assert math.isnan(y[0].item())
    assert F.gelu(dtrain.tensor(1.0), approximate=approximate).shape == ()
    assert F.gelu(dtrain.zeros(0, 3), approximate=approximate).shape == (0, 3)


def test_tanh_gelu_is_the_formula_of_the_paper():
    x = np.linspace(-5, 5, 101)
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    y = F.gelu(dtrain.from_numpy(x), approximate="tanh")
    np.testing.assert_allclose(y.numpy(), 0.5 * x * (1 + np.tanh(inner)), atol=1e-15)


def test_hardsigmoid():
    x = dtrain.tensor([-4.0, -1.5, 0.0, 1.5, 4.0], requires_grad=True)
    y = F.hardsigmoid(x)
    np.testing.assert_allclose(y.tolist(), [0, 0.25, 0.5, 0.75, 1], rtol=1e-6)
    y.sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), [0, 1 / 6, 1 / 6, 1 / 6, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "kind", "sentence"),
    [
        (lambda x: F.gelu(x, approximate="x"), RuntimeError,
         "approximate argument must be either none or tanh."),
        (lambda x: F.glu(x), RuntimeError,
         "Halving dimension must be even, but dimension 0 is size 3"),
        (lambda x: F.hardtanh(x, 1, -1), ValueError, "min_val cannot be greater than max_val"),
        (lambda x: F.prelu(x.reshape(1, 3), dtrain.zeros(2)), RuntimeError,
         "Found parameter numbers = 2 and channel size = 3."),
        (lambda x: F.prelu(x, dtrain.zeros(1, 1)), RuntimeError,
         "Expected `weight` to be a scalar or 1D tensor"),
        (lambda x: F.dropout(x, 1.5), ValueError,
         "dropout probability has to be between 0 and 1, but got 1.5"),
    ],
)  # fmt: skip
def test_refusals(call, kind, sentence):
    with pytest.raises(kind) as refusal:
        call(dtrain.zeros(3))
    assert sentence in str(refusal.value)


def test_dropout_at_its_limits_draws_nothing():
    x = dtrain.ones(5)
    dtrain.manual_seed(0)
    expected = dtrain.rand(1).item()
    dtrain.manual_seed(0)
    assert F.dropout(x, 0.0) is x
    assert F.dropout(x, 0.5, training=False) is x
    assert F.dropout(x, 1.0).tolist() == [0.0] * 5
    assert dtrain.rand(1).item() == expected
