"""Custom Functions: what a user's forward and backward may do, as in PyTorch."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

import dtrain as torch
from dtrain.autograd import Function, grad, gradcheck, gradgradcheck
from dtrain.autograd.function import once_differentiable


def leaf(*values):
    return torch.tensor(values or (1.0, 2.0), requires_grad=True)


class Square(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g * x


class Exp(Function):
    """Saves its own result."""

    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


class Scale(Function):
    """Setup in a function of its own; a number and a flag among the arguments."""

    @staticmethod
    def forward(x, factor, negate=False):
        return x * (-factor if negate else factor)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.factor, *rest = inputs
        ctx.sign = -1 if rest and rest[0] else 1
        assert output.shape == inputs[0].shape

    @staticmethod
    def backward(ctx, g):
        return (g * ctx.factor * ctx.sign, None, None)


class Twist(Function):
    """Two results and one that has no gradient."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        where = a.argmax()
        sign = a.sign()
        ctx.mark_non_differentiable(sign)
        return a * b, where, a + b, sign, None

    @staticmethod
    def backward(ctx, g_product, g_where, g_sum, g_sign, g_none):
        assert g_none is None
        assert g_sign.tolist() == [0, 0]
        assert g_where.tolist() == 0
        a, b = ctx.saved_tensors
        return g_product * b + g_sum, g_product * a + g_sum


def test_derivatives_to_second_order():
    x = torch.tensor([0.5, 1.5], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([2.0, -1.0], dtype=torch.float64, requires_grad=True)
    for function, inputs in (
        (Square.apply, x), (Exp.apply, x), (lambda t: Scale.apply(t, 3.0), x),
        (lambda a, b: Twist.apply(a, b)[::2][:2], (x, y)),
    ):  # fmt: skip
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)


def test_arguments_that_are_no_tensors():
    x = leaf()
    Scale.apply(x, 3.0, True).sum().backward()
    assert x.grad.tolist() == [-3, -3]
    with pytest.raises(TypeError):
        Scale.apply(x, factor=3.0)


def test_results_without_gradient():
    a, b = leaf(1.0, 3.0), leaf(2.0, 4.0)
    product, where, total, sign, none = Twist.apply(a, b)
    assert (product.requires_grad, where.requires_grad, sign.requires_grad) == (True, False, False)
    assert none is None
    (product.sum() + 10 * total.sum()).backward()
    assert (a.grad.tolist(), b.grad.tolist()) == ([12, 14], [11, 13])
    a.grad = None
    Twist.apply(a, b)[2].sum().backward()
    assert a.grad.tolist() == [1, 1], "the unused product's gradient is zeros"


def test_gradients_that_are_not_materialized():
    seen = []

    class Pair(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.set_materialize_grads(False)
            return x * 1, x * 2

        @staticmethod
        def backward(ctx, g, h):
            seen.append((g, h.tolist()))
            return h * 2

    Pair.apply(leaf())[1].sum().backward()
    assert seen == [(None, [1, 1])]


def test_needs_input_grad():
    seen = []

    class Ask(Function):
        @staticmethod
        def forward(ctx, a, b, c):
            return a + b

        @staticmethod
        def backward(ctx, g):
            seen.append(ctx.needs_input_grad)
            return g, None, None

    Ask.apply(leaf(), torch.ones(2), 3).sum().backward()
    assert seen == [(True, False, False)]


def test_nothing_is_recorded_inside_forward_or_without_need():
    modes = []

    class Mode(Function):
        @staticmethod
        def forward(ctx, x):
            modes.append(torch.is_grad_enabled())
            return x * 2

        @staticmethod
        def backward(ctx, g):
            modes.append(torch.is_grad_enabled())
            return g * 2

    x = leaf()
    Mode.apply(x).sum().backward()
    assert modes == [False, False]
    grad(Mode.apply(x).sum(), x, create_graph=True)
    assert modes[2:] == [False, True]
    assert not Mode.apply(torch.ones(2)).requires_grad
    with torch.no_grad():
        assert not Mode.apply(x).requires_grad


def test_an_input_handed_back_is_another_tensor():
    class Identity(Function):
        @staticmethod
        def forward(ctx, x):
            return x

        @staticmethod
        def backward(ctx, g):
            return g * 7

    x = leaf()
    y = Identity.apply(x)
    assert y is not x
    assert x.is_leaf
    assert y.data_ptr() == x.data_ptr()
    y.sum().backward()
    assert x.grad.tolist() == [7, 7]


class Double(Function):
    """Changes its input in place."""

    @staticmethod
    def forward(ctx, x):
        x.mul_(2)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, g):
        return g * 2


def test_changes_in_place():
    x = leaf()
    y = x * 1
    assert Double.apply(y) is y
    y.sum().backward()
    assert x.grad.tolist() == [2, 2]
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        Double.apply(leaf())


def test_changes_in_place_of_a_view_reach_its_base():
    x = leaf()
    base = x * 1
    Double.apply(base[0])
    base.sum().backward()
    assert x.grad.tolist() == [2, 1]


def test_what_was_saved_and_then_changed_is_refused():
    x = leaf()
    y = x * 1
    z = Square.apply(y)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()
    e = Exp.apply(x)
    e.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        e.sum().backward()


def test_backward_twice():
    y = Square.apply(leaf()).sum()
    y.backward(retain_graph=True)
    y.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()


def test_gradients_are_fitted_to_the_inputs():
    class Wide(Function):
        @staticmethod
        def forward(ctx, x):
            return x.expand(3, 2).double()

        @staticmethod
        def backward(ctx, g):
            return g

    x = leaf()
    Wide.apply(x).sum().backward()
    assert (x.grad.tolist(), x.grad.dtype) == ([3, 3], torch.float32)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda g: (g, g), r"returned an incorrect number of gradients \(expected 1, got 2\)"),
        (lambda g: 3.0, r"expected Variable or None \(got float\)"),
        (lambda g: torch.ones(3), r"invalid gradient at index 0 - got \[3\] but expected shape"),
    ],
)
def test_what_backward_returns_is_checked(result, message):
    class Wrong(Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, g):
            return result(g)

    with pytest.raises(RuntimeError, match=message):
        Wrong.apply(leaf()).sum().backward()


def test_missing_methods_and_wrong_savings_say_so():
    class Empty(Function):
        pass

    class Half(Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

    class Saves(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x, 3)
            return x * 1

    with pytest.raises(NotImplementedError, match="You must implement the forward function"):
        Empty.apply(leaf())
    with pytest.raises(NotImplementedError, match="either the backward or vjp method"):
        Half.apply(leaf()).sum().backward()
    with pytest.raises(TypeError, match="can only save variables, but argument 1"):
        Saves.apply(leaf())


def test_once_differentiable_refuses_the_second_time():
    class Once(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            return 2 * g * ctx.saved_tensors[0]

    x, start = leaf(), leaf(1.0, 1.0)
    (g,) = grad(Once.apply(x), x, start, create_graph=True)
    assert g.tolist() == [2, 4]
    with pytest.raises(RuntimeError, match="marked with @once_differentiable"):
        g.sum().backward()


def test_nothing_outlives_its_use():
    """No reference cycles, though a function may save its own result and its context."""
    gc.disable()
    try:
        x = leaf()
        for function in (Square, Exp, Double):
            y = function.apply(x * 1)
            held = [weakref.ref(y.grad_fn), weakref.ref(y._data)]
            y.sum().backward()
            del y
            assert [r() for r in held] == [None, None], function
        y = Exp.apply(x * 1)
        held = weakref.ref(y.grad_fn)
        del y
        assert held() is None
    finally:
        gc.enable()


def test_numpy_inside_a_function():
    class Sine(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.array = x.numpy()
            return torch.from_numpy(np.sin(ctx.array))

        @staticmethod
        def backward(ctx, g):
            return torch.from_numpy(g.numpy() * np.cos(ctx.array))

    x = leaf(0.0)
    Sine.apply(x).backward()
    assert x.grad.tolist() == [1]
    assert repr(Sine.apply(x)) == "tensor([0.], grad_fn=<SineBackward>)"
