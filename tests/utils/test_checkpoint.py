"""Checkpointing: the same bits with less memory, and what happens when a second run is another."""

from __future__ import annotations

import contextlib
import tracemalloc

import numpy as np
import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.nn.parallel import DistributedDataParallel as DDP
from dtrain.testing.distributed import run_distributed
from dtrain.utils.checkpoint import (
    CheckpointError,
    checkpoint,
    checkpoint_sequential,
    set_checkpoint_debug_enabled,
    set_checkpoint_early_stop,
)

nn, F = torch.nn, torch.nn.functional


class Block(nn.Module):
    """Most ways to keep something: inputs, results, masks, noise, indices, several results."""

    def __init__(self, width=16):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wide, self.back = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.runs = 0

    def forward(self, x, scale=1.0):
        self.runs += 1
        one, two = self.wide(self.norm(x)).chunk(2, dim=1)
        h = F.dropout(F.gelu(one), 0.25) * two.sigmoid()
        h = torch.where(h > -0.1, h, h * 0.5)
        top, _ = h.sort(dim=1)
        h = self.back(F.softmax(h, 1) + top[:, torch.arange(16)])
        return x + scale * h.tanh_()


def blocks(count=3):
    torch.manual_seed(0)
    return nn.Sequential(*[Block() for _ in range(count)])


def plain(model, x):
    return model(x)


def each(model, x):
    for block in model:
        x = checkpoint(block, x, scale=1.0)
    return x


def nested(model, x):
    return checkpoint(lambda h: each(model, h) * 1.0, x, use_reentrant=False)


def thrice(model, x):
    return checkpoint(nested, model, x, use_reentrant=True)


def sequential(model, x):
    return checkpoint_sequential(model, 2, x)


def gradients(way, model, **options):
    """Bits of the result, of all gradients, and of the random stream behind them."""
    torch.manual_seed(5)
    model.zero_grad()
    x = torch.randn(8, 16, requires_grad=True)
    y = way(model, x)
    y.square().sum().backward(**options)
    found = [y.detach(), x.grad, *[p.grad for p in model.parameters()], torch.rand(3)]
    return [t.numpy().tobytes() for t in found]


@pytest.mark.parametrize("way", [each, nested, thrice, sequential])
@pytest.mark.parametrize("early_stop", [True, False])
def test_gradients_have_the_same_bits(way, early_stop):
    model = blocks()
    expected = gradients(plain, model)
    with set_checkpoint_early_stop(early_stop):
        assert gradients(way, model) == expected
        assert gradients(way, model, retain_graph=True) == expected


def test_regions_run_twice_and_inner_ones_once_more():
    model = blocks(2)
    gradients(sequential, model)
    assert [block.runs for block in model] == [2, 1]
    gradients(nested, model)
    assert [block.runs for block in model] == [5, 4]


def kept(way, model, x):
    """Bytes that are held after forward, and the most that were until the end of backward."""
    tracemalloc.start()
    try:
        y = way(model, x)
        held = tracemalloc.get_traced_memory()[0]
        y.sum().backward()
        return held, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_really_freed():
    """8 layers of 64 KiB activations: about 5 arrays each are kept without, 1 with regions."""
    model = nn.Sequential(*[
        nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Dropout(0.3))
        for _ in range(8)
    ])  # fmt: skip
    x = torch.randn(256, 64, requires_grad=True)
    for way in (plain, checkpoint_blocks, checkpoint_all):
        kept(way, model, x)  # gradients and caches are there from now on
    (without, most), (each_kept, each_most), (all_kept, _) = (
        kept(way, model, x) for way in (plain, checkpoint_blocks, checkpoint_all)
    )
    size = x.detach().numpy().nbytes
    assert without > 8 * 4 * size
    assert each_kept < 9.5 * size
    assert each_most < 0.6 * most
    assert all_kept < 2.5 * size


def checkpoint_blocks(model, x):
    for layer in model:
        x = checkpoint(layer, x)
    return x


def checkpoint_all(model, x):
    return checkpoint(checkpoint_blocks, model, x)


def test_what_is_not_in_the_inputs_gets_its_gradient_once():
    """Parameters, and tensors that the function closes over, also those with a graph."""
    w = torch.tensor([2.0], requires_grad=True)
    outer = w * 3
    seen = []
    w.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.item()))
    y = checkpoint(lambda: (outer * w).exp())
    y.backward()
    assert seen == [np.float32(np.exp(np.float32(12.0)) * np.float32(12.0))]


def test_autograd_grad_and_second_derivatives():
    x = torch.tensor([0.5, -1.5], dtype=torch.float64, requires_grad=True)
    w = torch.tensor([1.5, 0.5], dtype=torch.float64, requires_grad=True)

    def function(x):
        return (x * w).tanh() * x.exp()

    found = []
    for y in (function(x), checkpoint(function, x), checkpoint(checkpoint, function, x)):
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), [x, w])
        found.append([g.tolist() for g in (first, *second)])
    np.testing.assert_allclose(found[1:], found[:1] * 2, rtol=1e-13)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x**2
        ctx.save_for_backward(x, y)
        ctx.extra = np.ones(3)
        return y * x

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        assert ctx.extra.sum() == 3
        return grad * (2 * y + x**2)


def test_custom_functions():
    x = torch.tensor([2.0], requires_grad=True)
    checkpoint(lambda x: Cube.apply(Cube.apply(x)), x).backward()
    assert x.grad.item() == 9 * 2.0**8


def test_without_the_random_state_dropout_differs():
    torch.manual_seed(1)
    x = torch.ones(1000, requires_grad=True)
    y = checkpoint(lambda x: F.dropout(x), x, preserve_rng_state=False)
    y.sum().backward()
    assert not np.array_equal(x.grad.numpy(), y.detach().numpy())
    y = checkpoint(lambda x: F.dropout(x), x)
    x.grad = None
    y.sum().backward()
    assert np.array_equal(x.grad.numpy(), y.detach().numpy())


def test_contexts_surround_the_first_and_the_second_run():
    log = []

    @contextlib.contextmanager
    def noted(name):
        log.append(f"{name} begins")
        yield
        log.append(f"{name} ends")

    def function(x):
        log.append("runs")
        return x.exp() * 1.0

    x = torch.ones(1, requires_grad=True)
    y = checkpoint(function, x, context_fn=lambda: (noted("first"), noted("second")))
    y.backward()
    assert log == [
        "first begins", "runs", "first ends", "second begins", "runs", "second ends",
    ]  # fmt: skip


def test_without_gradients_nothing_is_kept_or_run_again():
    with torch.no_grad():
        assert not checkpoint(lambda x: x * 2, torch.ones(1, requires_grad=True)).requires_grad


def differing(change, **options):
    """A function whose second run is another."""
    runs = []

    def function(x):
        runs.append(1)
        return (x.exp() if len(runs) == 1 else change(x)).sin()

    checkpoint(function, torch.ones(2, requires_grad=True), **options).sum().backward()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x: x.cos(), r"different metadata.*\n.*\nsaved metadata: \('exp'.*\n.*\('cos'"),
        (lambda x: x.repeat(2).exp()[:2], "different metadata"),
        (lambda x: x.detach(), r"A different number of tensors(.|\n)*forward: 2\n.*recomput.*: 0"),
    ],
)
def test_a_second_run_that_differs_is_told(change, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        differing(change)


def test_debug_lists_the_operations():
    for options, block in (({"debug": True}, None), ({}, True)):
        with (
            pytest.raises(CheckpointError, match=r"forward pass: exp, sin\nof the .*: cos"),
            set_checkpoint_debug_enabled(block),
        ):
            differing(lambda x: x.cos(), **options)
    with pytest.raises(CheckpointError, match="Tip: debug=True"):
        differing(lambda x: x.cos())


def test_an_input_changed_in_place_is_refused():
    x = torch.ones(2, requires_grad=True)
    h = x * 1.0
    y = checkpoint(lambda h: h.exp(), h)
    h.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_graph_that_was_freed_is_refused():
    y = checkpoint(lambda x: x.exp(), torch.ones(1, requires_grad=True))
    y.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()


def test_refused_arguments():
    for options, sentence in (
        ({"use_reentrant": True, "debug": True}, "only supported when use_reentrant=False"),
        ({"determinism_check": "strict"}, "should be one of .* but got strict"),
    ):
        with pytest.raises(ValueError, match=sentence):
            checkpoint(lambda: 1, **options)
    with pytest.raises(ValueError, match="Unexpected keyword arguments: a,b"):
        checkpoint_sequential([abs], 1, 1, a=1, b=2)
    with pytest.raises(ValueError, match="segments must be from 1 to 1, got 2"):
        checkpoint_sequential([abs], 2, 1)


def under_ddp(way):
    torch.manual_seed(0)
    net = blocks(2)
    net.forward = lambda x: way(list(net), x)
    model = DDP(net, bucket_cap_mb=1e-4)
    torch.manual_seed(dist.get_rank())
    model(torch.randn(4, 16)).square().sum().backward()
    model(torch.randn(4, 16)).square().sum().backward()
    return [p.grad.numpy().tobytes() for p in model.parameters()]


def in_turn(model, x):
    for block in model:
        x = block(x)
    return x


def test_under_ddp_gradients_have_the_same_bits():
    assert run_distributed(2, under_ddp, each) == run_distributed(2, under_ddp, in_turn)
