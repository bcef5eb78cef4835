"""The gradient checker: what it accepts, what it refuses, what it says."""

from __future__ import annotations

import pytest

import dtrain as torch
from dtrain.autograd import Function, GradcheckError, gradcheck, gradgradcheck


def leaf(*values):
    return torch.tensor(values or (1.0, 2.0), dtype=torch.float64, requires_grad=True)


def scaled(factor):
    """x^2 with a gradient that is `factor` times what it should be."""

    class Square(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, g):
            return g * ctx.saved_tensors[0] * 2 * factor

    return Square.apply


@pytest.mark.parametrize("fast", [True, False])
def test_a_tenth_of_a_percent_is_the_limit(fast):
    """rtol is 1e-3: 0.05 % off passes, 0.3 % does not."""
    assert gradcheck(scaled(1.0005), leaf(), fast_mode=fast)
    assert not gradcheck(scaled(1.003), leaf(), raise_exception=False, fast_mode=fast)
    with pytest.raises(GradcheckError, match="Jacobian mismatch for output 0 with respect to inp"):
        gradcheck(scaled(1.003), leaf(), fast_mode=fast)


def test_several_inputs_and_outputs():
    """The message names the third input: it is the one whose gradient is missing."""

    def function(a, number, b):
        return a * 2, (b.detach() * a).sum()

    with pytest.raises(GradcheckError, match="for output 1 with respect to input 2"):
        gradcheck(function, (leaf(), 3, leaf()))
    assert gradcheck(lambda a, b: (a * b, a + b), (leaf(), leaf()))


def test_backward_must_be_repeatable():
    calls = []

    class Moody(Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, g):
            calls.append(1)
            return g * (1 + 1e-8 * len(calls))

    with pytest.raises(GradcheckError, match="Backward is not reentrant"):
        gradcheck(Moody.apply, leaf())
    assert gradcheck(Moody.apply, leaf(), nondet_tol=1e-3)


def test_constant_functions_have_zero_gradients():
    assert gradcheck(lambda x: x.floor(), leaf(0.5, 1.5))
    assert gradcheck(lambda x: torch.ones(2, dtype=torch.float64), leaf())


def test_inputs_are_checked():
    with pytest.raises(ValueError, match="at least one input tensor to require gradient"):
        gradcheck(lambda x: x, torch.ones(2))
    with pytest.warns(UserWarning, match="Input #0 requires gradient and is not a double"):
        gradcheck(lambda x: x * 2, torch.ones(2, requires_grad=True), eps=1e-2)


def test_second_order_with_given_gradients():
    x, g = leaf(), leaf(0.5, -1.0)
    assert gradgradcheck(lambda t: t**3, x, g)
    assert gradgradcheck(lambda a, b: (a * b, a.exp()), (x, g))

    class First(Function):
        """First order right; the second lacks what flows through the saved tensor."""

        @staticmethod
        def forward(ctx, t):
            ctx.save_for_backward(t)
            return t * t

        @staticmethod
        def backward(ctx, grad):
            return grad * 2 * ctx.saved_tensors[0].detach()

    assert gradcheck(First.apply, x)
    with pytest.raises(GradcheckError):
        gradgradcheck(First.apply, x)
