"""Normalisation: running statistics, far-off means, and torch's sentences."""

from __future__ import annotations

import numpy as np
import pytest

import dtrain
from dtrain.nn import functional as F
from dtrain.ops import norm


def test_running_statistics_move_in_place_by_momentum():
    x = np.random.RandomState(0).randn(4, 3, 5).astype(np.float32)
    mean, var = dtrain.zeros(3), dtrain.ones(3)
    memory = mean.data_ptr()
    F.batch_norm(dtrain.from_numpy(x), mean, var, training=True, momentum=0.25)
    assert mean.data_ptr() == memory
    np.testing.assert_allclose(mean.numpy(), 0.25 * x.mean((0, 2)), rtol=1e-5, atol=1e-7)
    unbiased = x.var((0, 2), ddof=1)
    np.testing.assert_allclose(var.numpy(), 0.75 + 0.25 * unbiased, rtol=1e-5)


def test_evaluation_leaves_the_running_statistics_alone():
    mean, var = dtrain.tensor([1.0]), dtrain.tensor([4.0])
    y = F.batch_norm(dtrain.tensor([[3.0], [5.0]]), mean, var, eps=0.0)
    assert y.flatten().tolist() == [1.0, 2.0]
    assert (mean.item(), var.item()) == (1.0, 4.0)


@pytest.mark.parametrize("function", ["layer", "batch", "group"])
def test_a_far_off_mean_does_not_spoil_the_variance(function):
    # a variance taken as mean(x^2) - mean(x)^2 would be nothing but rounding here
    x = np.random.RandomState(0).randn(64, 8, 32).astype(np.float32)
    far = dtrain.from_numpy(x + 1000)
    if function == "layer":
        y, axes = F.layer_norm(far, (32,)), (2,)
    elif function == "batch":
        y, axes = F.batch_norm(far, None, None, training=True), (0, 2)
    else:
        y, axes = F.group_norm(far, 8), (2,)
    assert y.dtype is dtrain.float32
    np.testing.assert_allclose(y.numpy().var(axes), 1, rtol=2e-3)
    np.testing.assert_allclose(y.numpy().mean(axes), 0, atol=2e-3)


def test_layer_norm_of_many_rows_in_blocks_of_a_few(monkeypatch):
    """Rows are taken together a few at a time: the last ones, fewer, are done too."""
    monkeypatch.setattr(norm, "ROWS", 40)
    dtrain.manual_seed(0)
    x = dtrain.randn(23, 10, dtype=dtrain.float64, requires_grad=True)
    weight, bias = (dtrain.randn(10, dtype=dtrain.float64, requires_grad=True) for _ in range(2))
    seed = dtrain.randn(23, 10, dtype=dtrain.float64)
    found = F.layer_norm(x, (10,), weight, bias)
    centred = x - x.mean(1, keepdim=True)
    wanted = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * weight + bias
    gradients = []
    for result in (found, wanted):
        result.backward(seed)
        gradients.append([t.grad.clone() for t in (x, weight, bias)])
        x.grad = weight.grad = bias.grad = None
    np.testing.assert_allclose(found.detach().numpy(), wanted.detach().numpy(), rtol=1e-12)
    for ours, theirs in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-10, atol=1e-12)


def test_many_samples_in_groups_of_a_few():
    x = np.random.RandomState(0).randn(37, 3, 20000)
    leaf = dtrain.tensor(x, requires_grad=True)
    y = F.batch_norm(leaf, None, None, training=True, eps=0.0)
    axes = {"axis": (0, 2), "keepdims": True}
    np.testing.assert_allclose(y.detach().numpy(), (x - x.mean(**axes)) / x.std(**axes), atol=1e-10)
    (y * y).sum().backward()  # the sum of squares is constant
    np.testing.assert_allclose(leaf.grad.numpy(), 0, atol=1e-10)


R = dtrain.zeros


@pytest.mark.parametrize(
    ("call", "kind", "sentence"),
    [
        (lambda: F.layer_norm(R(2, 3), (4,)), RuntimeError,
         "Given normalized_shape=[4], expected input with shape [*, 4], but got input of size"
         "[2, 3]"),
        (lambda: F.layer_norm(R(2, 3), (3,), weight=R(4)), RuntimeError,
         "Expected weight to be of same shape as normalized_shape, but got weight of shape [4] and "
         "normalized_shape = [3]"),
        (lambda: F.layer_norm(R(2, 3), ()), RuntimeError,
         "Expected normalized_shape to be at least 1-dimensional"),
        (lambda: F.group_norm(R(2, 6), 4), RuntimeError,
         "Expected number of channels in input to be divisible by num_groups, but got input of "
         "shape [2, 6] and num_groups=4"),
        (lambda: F.group_norm(R(2), 1), RuntimeError,
         "Expected at least 2 dimensions for input tensor but received 1"),
        (lambda: F.batch_norm(R(1, 3), None, None, training=True), ValueError,
         "Expected more than 1 value per channel when training, got input size"),
        (lambda: F.batch_norm(R(2, 3), None, None), RuntimeError,
         "running_mean must be defined in evaluation mode"),
        (lambda: F.batch_norm(R(2, 3), R(3), None), RuntimeError,
         "running_var must be defined in evaluation mode"),
        (lambda: F.batch_norm(R(2, 3), R(4), R(4)), RuntimeError,
         "running_mean should contain 3 elements not 4"),
    ],
)  # fmt: skip
def test_refusals(call, kind, sentence):
    with pytest.raises(kind) as refusal:
        call()
    assert sentence in str(refusal.value)


@pytest.mark.parametrize("dtype", [dtrain.bfloat16, dtrain.float16], ids=str)
def test_rms_norm_of_half_precision_is_that_of_single_rounded(dtype):
    x = dtrain.tensor(np.random.RandomState(0).randn(3, 50)).to(dtype).requires_grad_()
    weight = dtrain.tensor(np.linspace(0.5, 2, 50)).to(dtype).requires_grad_()
    single, wide_weight = (t.detach().float().requires_grad_() for t in (x, weight))
    y, wide = F.rms_norm(x, (50,), weight, 1e-5), F.rms_norm(single, (50,), wide_weight, 1e-5)
    assert dtrain.equal(y, wide.to(dtype))
    y.sum().backward()
    wide.sum().backward()
    assert dtrain.equal(x.grad, single.grad.to(dtype))
    assert dtrain.equal(weight.grad, wide_weight.grad.to(dtype))
