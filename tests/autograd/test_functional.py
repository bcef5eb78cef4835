"""Jacobians, Hessians and products with vectors, against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

import dtrain as torch
from dtrain.autograd.functional import hessian, hvp, jacobian, jvp, vhp, vjp

MATRIX = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])


def linear(x):
    """J = MATRIX."""
    return torch.tensor(MATRIX) @ x


def cubic(x):
    """H = diag(6 x)."""
    return (x**3).sum()


def product(x, y):
    """x_i y_i: dx = diag(y), dy = diag(x)."""
    return x * y


X, Y = np.array([1.0, -2.0, 0.5]), np.array([3.0, 1.0, 2.0])


def tensors():
    return torch.tensor(X), torch.tensor(Y)


def test_jacobian():
    x, y = tensors()
    np.testing.assert_allclose(jacobian(linear, x).numpy(), MATRIX)
    dx, dy = jacobian(product, (x, y))
    np.testing.assert_allclose(dx.numpy(), np.diag(Y))
    np.testing.assert_allclose(dy.numpy(), np.diag(X))
    both = jacobian(lambda t: (linear(t), t * t), x)
    np.testing.assert_allclose(both[1].numpy(), np.diag(2 * X))
    assert jacobian(lambda t: t.sum(), x).shape == (3,)
    assert jacobian(lambda t: t[:0], x).shape == (0, 3)


def test_hessian():
    x, y = tensors()
    np.testing.assert_allclose(hessian(cubic, x).numpy(), np.diag(6 * X))
    blocks = hessian(lambda a, b: (a * a * b).sum(), (x, y))
    np.testing.assert_allclose(blocks[0][0].numpy(), np.diag(2 * Y))
    np.testing.assert_allclose(blocks[0][1].numpy(), np.diag(2 * X))
    np.testing.assert_allclose(blocks[1][1].numpy(), np.zeros((3, 3)))


def test_products():
    x, y = tensors()
    value, found = vjp(linear, x, torch.tensor([1.0, 10.0], dtype=torch.float64))
    np.testing.assert_allclose(value.numpy(), MATRIX @ X)
    np.testing.assert_allclose(found.numpy(), np.array([1, 10]) @ MATRIX)
    np.testing.assert_allclose(jvp(linear, x, y)[1].numpy(), MATRIX @ Y)
    for function in (hvp, vhp):
        value, found = function(cubic, x, y)
        assert value.item() == pytest.approx((X**3).sum())
        np.testing.assert_allclose(found.numpy(), 6 * X * Y)
    assert vjp(lambda t: t.sum(), x)[1].tolist() == [1, 1, 1]
    pair = jvp(product, (x, y), (y, x))[1]
    np.testing.assert_allclose(pair.numpy(), Y * Y + X * X)


def test_results_carry_a_graph_only_when_asked():
    x = torch.tensor(X, requires_grad=True)
    assert not jacobian(cubic, x).requires_grad
    found = jacobian(cubic, x, create_graph=True)
    found.sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), 6 * X)
    assert not hvp(cubic, x, torch.tensor(Y))[1].requires_grad


def test_what_does_not_depend_is_zero_or_an_error():
    x, y = tensors()
    assert jacobian(lambda a, b: a * 2, (x, y))[1].tolist() == np.zeros((3, 3)).tolist()
    with pytest.raises(RuntimeError, match="independent of an input"):
        jacobian(lambda a, b: a * 2, (x, y), strict=True)
    assert vjp(lambda a: torch.ones(()), x)[1].tolist() == [0, 0, 0]


def test_wrong_arguments():
    x, y = tensors()
    with pytest.raises(TypeError, match="must be either a Tensor or a tuple of Tensors"):
        jacobian(cubic, [1.0])
    with pytest.raises(RuntimeError, match="v can only be None"):
        vjp(linear, x)
    with pytest.raises(RuntimeError, match="v has invalid size"):
        jvp(linear, x, y[:2])
    with pytest.raises(RuntimeError, match="single element"):
        hessian(linear, x)
