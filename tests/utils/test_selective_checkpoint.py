"""Selective checkpointing: what is kept is not computed again, and the bits stay."""

from __future__ import annotations

import contextlib
import tracemalloc
from functools import partial

import numpy as np
import pytest

import dtrain as torch
from dtrain.autograd.op import OPS
from dtrain.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

nn, F = torch.nn, torch.nn.functional


@pytest.fixture
def runs(monkeypatch):
    """{name of an operation: how often its forward function ran}."""
    counts = {}

    def counted(op):
        forward = op.forward

        def run(*arrays, **attrs):
            counts[op.name] = counts.get(op.name, 0) + 1
            return forward(*arrays, **attrs)

        return run

    for op in OPS.values():
        monkeypatch.setattr(op, "forward", counted(op))
    return counts


class Block(nn.Module):
    """Ops of every kind: pointwise, with a number, views, several results, values left by forward,
    a custom function, dropout.
    """

    def __init__(self, width=8):
        super().__init__()
        self.norm, self.wide = nn.LayerNorm(width), nn.Linear(width, 2 * width)

    def forward(self, x):
        one, two = self.wide(self.norm(x)).chunk(2, dim=1)
        h = F.dropout(one.exp() * 0.5, 0.25) * Double.apply(two.sigmoid())
        top, _ = h.sort(dim=1)
        q = (h @ h.T) @ top
        return x + F.scaled_dot_product_attention(q, h, x).transpose(0, 1).T * 2.0


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


def gradients(context_fn=None):
    torch.manual_seed(0)
    model, x = Block(), torch.randn(6, 8, requires_grad=True)
    options = {"context_fn": context_fn} if context_fn else {}
    (checkpoint(model, x, **options) if context_fn else model(x)).square().mean().backward()
    return [x.grad.tolist(), *[p.grad.tolist() for p in model.parameters()]]


def selecting(what, **options):
    return partial(create_selective_checkpoint_contexts, what, **options)


@pytest.mark.parametrize(
    "names",
    [
        ["linear"],
        ["matmul", "exp"],
        ["gather", "layer_norm"],
        ["mul", "sigmoid"],
        ["scaled_dot_product_attention"],
        [],
    ],
)
def test_same_bits_whatever_is_kept(names):
    assert gradients(selecting(names)) == gradients()


def test_same_bits_when_everything_or_nothing_is_kept():
    for policy in (True, False, *CheckpointPolicy):
        kept = selecting(lambda ctx, op, *args, _answer=policy, **kwargs: _answer)
        assert gradients(kept) == gradients()


def test_what_is_kept_is_not_computed_again(runs):
    def forward(h):
        return (((h @ h).tanh() @ h).tanh() @ h).exp().sum()

    def count(what):
        runs.clear()
        h = torch.eye(3).requires_grad_()
        checkpoint(forward, h, context_fn=selecting(what), early_stop=False).backward()
        return {name: runs[name] for name in ("matmul", "tanh", "exp")}

    none, products = count([]), count(["matmul"])
    assert none == {"matmul": 6, "tanh": 4, "exp": 2}
    assert products == {"matmul": 3, "tanh": 4, "exp": 2}
    assert count(["tanh", torch.matmul, OPS["exp"]]) == {"matmul": 3, "tanh": 2, "exp": 1}


def test_what_is_held():
    """Arrays of the size of the input: the input, and the kept results."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
    x = torch.randn(1024, 64)

    def held(names):
        tracemalloc.start()
        kept = checkpoint(block, x, context_fn=selecting(names))
        size = tracemalloc.get_traced_memory()[0] / x.numpy().nbytes
        tracemalloc.stop()
        return round(size, 1), kept.requires_grad

    assert held([]) == (1.0, True)  # the result
    assert held(["linear"]) == (3.0, True)
    assert held(["tanh"]) == (2.0, True)  # the last of them is the result


def test_second_derivatives():
    def region(x):
        return ((x @ x).tanh() @ x).exp().sum()

    def second(names):
        x = (torch.arange(9.0).reshape(3, 3) / 9).requires_grad_()
        y = region(x) if names is None else checkpoint(region, x, context_fn=selecting(names))
        (g,) = torch.autograd.grad(y, [x], create_graph=True)
        g.square().sum().backward()
        return x.grad.numpy()

    plain = second(None)
    for names in ([], ["matmul"], ["tanh", "exp"]):
        np.testing.assert_allclose(second(names), plain, rtol=1e-6)


def test_policy_sees_operation_inputs_and_result():
    seen = []

    def every_second_product(context, op, *args, **kwargs):
        assert not context.is_recompute
        if op.name != "matmul":
            return CheckpointPolicy.MUST_RECOMPUTE
        assert torch.equal(context.op_output, args[0] @ args[1])
        seen.append(op)
        return CheckpointPolicy.MUST_SAVE if len(seen) % 2 else CheckpointPolicy.PREFER_RECOMPUTE

    h = torch.eye(3).requires_grad_()
    result = checkpoint(lambda h: h @ h @ h @ h, h, context_fn=selecting(every_second_product))
    result.sum().backward()
    assert len(seen) == 3  # asked in the first run alone
    # d/dh sum(h^4) at the identity: four times ones
    np.testing.assert_array_equal(h.grad.numpy(), np.full((3, 3), 4.0))


def test_regions_inside_are_not_selected(runs):
    def inner(h):
        return h.exp()

    def outer(h):
        return checkpoint(inner, h.exp()).exp()

    h = torch.zeros(2, requires_grad=True)
    runs.clear()
    checkpoint(outer, h, context_fn=selecting(["exp"]), early_stop=False).sum().backward()
    assert runs["exp"] == 5  # 2 kept once; the inner one in the first run, the second, and its own


def test_contexts_of_others_may_stand_around():
    entered = []

    @contextlib.contextmanager
    def both(name, context):
        entered.append(name)
        with context:
            yield

    def context_fn():
        first, second = create_selective_checkpoint_contexts(["linear"])
        return both("first", first), both("second", second)

    assert gradients(context_fn) == gradients()
    assert entered == ["first", "second"]


def test_a_kept_result_that_was_changed_is_refused():
    def region(h):
        y = h @ h
        with torch.no_grad():
            y.add_(1.0)
        return (y * 2.0).exp()

    h = torch.eye(2).requires_grad_()
    out = checkpoint(region, h, context_fn=selecting(["matmul"])).sum()
    with pytest.raises(RuntimeError, match=r"has been mutated: .* operation 0 .*'matmul'"):
        out.backward()
    allowed = selecting(["matmul"], allow_cache_entry_mutation=True)
    checkpoint(region, h, context_fn=allowed).sum().backward()
    assert np.isfinite(h.grad.numpy()).all()


def test_a_view_is_not_kept():
    """A change through a view must reach what it is a view of, in the second run, too."""

    def region(x):
        y = x * 1.0
        y[0].mul_(3.0)
        return y.exp()

    gradients = []
    for way in (region, lambda x: checkpoint(region, x, context_fn=selecting(views))):
        x = torch.ones(2, 2, requires_grad=True)
        way(x).sum().backward()
        gradients.append(x.grad.tolist())
    assert gradients[0] == gradients[1]


def views(context, op, *args, **kwargs):
    return op.view


def test_refused_arguments():
    with pytest.raises(TypeError, match="must be either a function or a list of ops"):
        create_selective_checkpoint_contexts("linear")
    with pytest.raises(ValueError, match="no operation 'mm'"):
        create_selective_checkpoint_contexts([torch.mm])
    h = torch.ones(2, requires_grad=True)
    with pytest.raises(TypeError, match=r"'exp' it returned 'yes'"):
        checkpoint(torch.exp, h, context_fn=selecting(lambda *args, **kwargs: "yes"))


def test_without_gradients_nothing_is_asked():
    def policy(*args, **kwargs):
        raise AssertionError

    with torch.no_grad():
        checkpoint(torch.exp, torch.ones(2), context_fn=selecting(policy))
