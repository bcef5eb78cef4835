"""saved_tensors_hooks: everything that is kept goes through them, and comes back as it was."""

from __future__ import annotations

import numpy as np
import pytest

import dtrain as torch
from dtrain.autograd.graph import saved_tensors_hooks

F = torch.nn.functional


def program(x, w):
    h = F.layer_norm(F.linear(x, w), (4,))
    return (F.gelu(h) * h.exp() / 3).sum() + (2.0 * h).max()


def leaves():
    torch.manual_seed(0)
    return [torch.randn(3, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)]


def test_what_is_kept_can_live_elsewhere():
    x, w = leaves()
    expected = [g.numpy() for g in torch.autograd.grad(program(x, w), [x, w])]
    store = {}

    def pack(tensor):
        store[len(store)] = tensor.numpy().copy()
        return len(store) - 1

    with saved_tensors_hooks(pack, lambda key: torch.from_numpy(store[key])):
        y = program(x, w)
    packed = len(store)
    assert packed >= 8
    z = program(x, w)  # outside
    assert len(store) == packed
    for found in (torch.autograd.grad(y, [x, w]), torch.autograd.grad(z, [x, w])):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a.numpy(), b)


def test_hooks_may_change_what_backward_sees():
    x = torch.tensor([3.0], requires_grad=True)
    with saved_tensors_hooks(lambda t: t * 2, lambda t: t):
        y = x * x
    y.backward()
    assert x.grad.item() == 12.0


def test_second_derivatives_go_through_unpacked_tensors():
    x, w = (t.detach().double().requires_grad_() for t in leaves())
    with saved_tensors_hooks(lambda t: t.numpy().copy(), torch.from_numpy):
        y = (F.linear(x, w).tanh() * x).sum()
    found = []
    for value in (y, (F.linear(x, w).tanh() * x).sum()):
        (first,) = torch.autograd.grad(value, x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [x, w]))
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-12)


def test_the_innermost_pair_is_used_and_modes_inside_do_not_end_it():
    log = []
    x = torch.ones(1, requires_grad=True)
    with saved_tensors_hooks(lambda t: log.append("outer") or t, lambda t: t):
        x.exp()
        with saved_tensors_hooks(lambda t: log.append("inner") or t, lambda t: t):
            x.exp()
            with torch.no_grad():
                x.exp()
                with torch.enable_grad():
                    x.exp()
        x.exp()
    x.exp()
    assert log == ["outer", "inner", "inner", "outer"]


def test_custom_functions_are_packed():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * ctx.saved_tensors[0] * grad

    x = torch.tensor([3.0], requires_grad=True)
    with saved_tensors_hooks(lambda t: t.item(), lambda value: torch.tensor([value])):
        y = Square.apply(x)
    y.backward()
    assert x.grad.item() == 6.0


def test_unpacking_must_give_a_tensor():
    x = torch.ones(1, requires_grad=True)
    with saved_tensors_hooks(lambda t: t, lambda t: 3):
        y = x.exp()
    with pytest.raises(TypeError, match="expected to be a Tensor but got result of type int"):
        y.backward()
