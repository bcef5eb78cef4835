"""Losses: extremes, ignored rows, and torch's sentences; the rest is recorded."""

from __future__ import annotations

import math

import numpy as np
import pytest

import dtrain
from dtrain.nn import functional as F

R = dtrain.zeros


def ints(*values):
    return dtrain.tensor(values, dtype=dtrain.int64)


def test_cross_entropy_of_huge_scores_is_finite():
    x = dtrain.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = F.cross_entropy(x, ints(1))
    loss.backward()
    assert loss.item() == 2e4
    assert x.grad.tolist() == [[1.0, -1.0, 0.0]]


@pytest.mark.parametrize("dtype", [dtrain.bfloat16, dtrain.float16, dtrain.float64])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_gradient_of_cross_entropy_has_the_dtype_of_the_scores(dtype, smoothing):
    x = dtrain.tensor([[1.0, 2.0, 0.0]], dtype=dtype, requires_grad=True)
    scores, seen = x * 1, []
    scores.register_hook(lambda grad: seen.append(grad.dtype))
    F.cross_entropy(scores, ints(1), label_smoothing=smoothing).backward()
    assert seen == [dtype]


def test_cross_entropy_of_nothing_counted_is_nan():
    assert math.isnan(F.cross_entropy(R(2, 5), ints(-100, -100)).item())


def test_ignored_rows_get_no_gradient():
    x = dtrain.randn(3, 4, requires_grad=True)
    F.cross_entropy(x, ints(1, -100, 2), label_smoothing=0.1).backward()
    assert x.grad[1].tolist() == [0.0] * 4
    np.testing.assert_allclose(x.grad.numpy().sum(1), 0, atol=1e-7)


def test_a_retained_graph_gives_the_same_gradient_twice():
    x = dtrain.randn(3, 4, requires_grad=True)
    loss = F.cross_entropy(x, ints(1, 0, 2))
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    x.grad = None
    loss.backward()
    np.testing.assert_array_equal(first.numpy(), x.grad.numpy())


def test_binary_cross_entropy_is_at_most_100():
    x = dtrain.tensor([0.0, 1.0], requires_grad=True)
    loss = F.binary_cross_entropy(x, dtrain.tensor([1.0, 0.0]))
    assert loss.item() == 100
    loss.backward()
    assert np.isfinite(x.grad.numpy()).all()


def test_binary_cross_entropy_of_huge_scores_is_finite():
    x = dtrain.tensor([1e4, -1e4])
    loss = F.binary_cross_entropy_with_logits(x, dtrain.tensor([0.0, 1.0]), reduction="none")
    assert loss.tolist() == [1e4, 1e4]


def test_kl_div_of_zero_probability_is_zero():
    target = dtrain.tensor([[0.0, 1.0]], requires_grad=True)
    loss = F.kl_div(dtrain.tensor([[-3.0, -1.0]]), target, reduction="none")
    assert loss.tolist() == [[0.0, 1.0]]


def test_cosine_of_a_zero_vector_is_zero():
    assert F.cosine_similarity(R(1, 3), dtrain.ones(1, 3)).item() == 0


@pytest.mark.parametrize("name", ["mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"])
def test_sizes_that_broadcast_are_warned_of(name):
    with pytest.warns(UserWarning, match="Using a target size .* that is different to the input"):
        getattr(F, name)(R(2, 3), R(3))


@pytest.mark.parametrize(
    ("call", "kind", "sentence"),
    [
        (lambda: F.cross_entropy(R(2, 5), ints(1, 7)), IndexError, "Target 7 is out of bounds."),
        (lambda: F.nll_loss(R(2, 5), ints(1, -2)), IndexError, "Target -2 is out of bounds."),
        (lambda: F.cross_entropy(R(2, 5), ints(1, 2, 3)), ValueError,
         "Expected input batch_size (2) to match target batch_size (3)."),
        (lambda: F.cross_entropy(R(2, 5), R(2)), RuntimeError,
         "expected target dtype to be Long or Byte, but got Float"),
        (lambda: F.cross_entropy(R(2, 5), ints(1, 2).int()), RuntimeError,
         "expected target dtype to be Long or Byte, but got Int"),
        (lambda: F.cross_entropy(R(2, 5, 3), R(2, 4).long()), RuntimeError,
         "Expected target size [2, 3], got [2, 4]"),
        (lambda: F.cross_entropy(R(2, 5), ints(1, 2), weight=R(4)), RuntimeError,
         "weight tensor should be defined either for all 5 classes or no classes but got weight "
         "tensor of shape: [4]"),
        (lambda: F.cross_entropy(R(2, 5), ints(1, 2), reduction="foo"), ValueError,
         "foo is not a valid value for reduction"),
        (lambda: F.cross_entropy(R(2, 5), ints(1, 2), label_smoothing=2.0), RuntimeError,
         "label_smoothing must be between 0.0 and 1.0. Got: 2"),
        (lambda: F.cross_entropy(R(2, 5), R(2, 5), ignore_index=1), RuntimeError,
         "ignore_index is not supported for floating point target"),
        (lambda: F.binary_cross_entropy(R(2) - 1, R(2)), RuntimeError,
         "all elements of input should be between 0 and 1"),
        (lambda: F.binary_cross_entropy(R(2, 3), R(3)), ValueError,
         "that is different to the input size"),
        (lambda: F.binary_cross_entropy_with_logits(R(2, 3), R(3)), ValueError,
         "must be the same as input size"),
        (lambda: F.huber_loss(R(2), R(2), delta=0), RuntimeError,
         "huber_loss does not support non-positive values for delta."),
        (lambda: F.smooth_l1_loss(R(2), R(2), beta=-1), RuntimeError,
         "smooth_l1_loss does not support negative values for beta."),
        (lambda: F.gaussian_nll_loss(R(2), R(2), R(2) - 1), ValueError,
         "var has negative entry/entries"),
    ],
)  # fmt: skip
def test_refusals(call, kind, sentence):
    with pytest.raises(kind) as refusal:
        call()
    assert sentence in str(refusal.value)


@pytest.mark.parametrize("dtype", [dtrain.bfloat16, dtrain.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"reduction": "none"}], ids=str)
def test_cross_entropy_of_half_precision_is_that_of_single_rounded(dtype, options):
    """Sums are made in float32: only the result and the gradient are rounded."""
    scores = dtrain.tensor(np.random.RandomState(0).randn(6, 40)).to(dtype).requires_grad_()
    weight = dtrain.tensor(np.linspace(0.5, 2, 40)).to(dtype)
    single = scores.detach().float().requires_grad_()
    target = dtrain.arange(6)
    loss = F.cross_entropy(scores, target, weight, **options)
    wide = F.cross_entropy(single, target, weight.float(), **options)
    assert loss.dtype is dtype
    assert dtrain.equal(loss, wide.to(dtype))
    loss.sum().backward()
    wide.sum().backward()
    assert dtrain.equal(scores.grad, single.grad.to(dtype))
