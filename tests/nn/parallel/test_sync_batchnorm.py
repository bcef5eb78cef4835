"""SyncBatchNorm on several ranks is BatchNorm on one process that has the whole batch."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain import ranks
from dtrain.nn.parallel import DistributedDataParallel as DDP
from dtrain.testing.distributed import run_distributed
from tests.nn.parallel.training import descend

nn, F = torch.nn, torch.nn.functional

LAYERS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def data(shape, offset=0.0):
    random = np.random.RandomState(len(shape))
    x, weight = random.randn(*shape) + offset, random.randn(*shape)
    return x.astype(np.float32), weight.astype(np.float32)


def layer_like(kind, channels, **options):
    layer = kind(channels, **options)
    if layer.affine:
        with torch.no_grad():
            layer.weight.copy_(torch.arange(1.0, channels + 1))
            layer.bias.copy_(torch.arange(1.0, channels + 1) / 3)
    return layer


def run(layer, x, weight, rows):
    """Two training steps on some rows: outputs, gradients, running statistics."""
    for _ in range(2):
        layer.zero_grad()
        leaf = torch.tensor(x[rows], requires_grad=True)
        y = layer(leaf)
        (y * torch.from_numpy(weight[rows])).sum().backward()
    buffers = {name: b.numpy().copy() for name, b in layer.named_buffers()}
    grads = [p.grad.numpy().copy() for p in layer.parameters()]
    return y.detach().numpy(), leaf.grad.numpy(), grads, buffers


def on_ranks(shares, shape, offset, options):
    x, weight = data(shape, offset)
    end = np.cumsum(shares)[dist.get_rank()]
    rows = slice(end - shares[dist.get_rank()], end)
    return run(layer_like(nn.SyncBatchNorm, shape[1], **options), x, weight, rows)


@pytest.mark.parametrize(
    ("shape", "shares", "offset", "options"),
    [
        ((12, 3), [6, 6], 0, {}),
        ((12, 3), [1, 8, 3], 0, {"momentum": None}),
        ((7, 3, 5), [4, 0, 3], 0, {"momentum": 0.3}),
        ((9, 2, 4, 3), [2, 7], 20, {}),
        ((5, 2, 3, 2, 2), [4, 1], 0, {"affine": False}),
        ((6, 4), [4, 2], 0, {"track_running_stats": False}),
    ],
    ids=str,
)
def test_ranks_equal_one_process_on_the_whole_batch(shape, shares, offset, options):
    one = layer_like(LAYERS[max(1, len(shape) - 2)], shape[1], **options)
    y, dx, grads, buffers = run(one, *data(shape, offset), slice(None))
    found = run_distributed(len(shares), on_ranks, shares, shape, offset, options)
    same = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    same(np.concatenate([f[0] for f in found]), y)
    same(np.concatenate([f[1] for f in found]), dx)
    for i, grad in enumerate(grads):
        same(sum(f[2][i] for f in found), grad)
    for _, _, _, own in found:
        assert own.keys() == buffers.keys()
        for name, values in buffers.items():
            same(own[name], values)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 6)
        )
        self.last = nn.BatchNorm1d(6)

    def forward(self, x):
        return self.last(self.body(x))


def train(sync):
    torch.manual_seed(2)
    net = Net()
    if sync:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    model = DDP(net)
    x = torch.randn(12, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(12) % 6
    rank, n = dist.get_rank(), dist.get_world_size()
    losses = descend(model, lambda: F.cross_entropy(model(x[rank::n]), labels[rank::n]), 4)
    return losses, [v.numpy().astype(float) for v in model.state_dict().values()]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_network_under_ddp_trains_as_one_process(ranks):
    losses, state = run_distributed(1, train, False)[0]
    for own_losses, own_state in run_distributed(ranks, train, True):
        np.testing.assert_allclose(own_losses, losses, rtol=1e-5)
        for ours, theirs in zip(own_state, state, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def check_calls():
    """One collective in forward, one in backward, none in evaluation."""
    layer = nn.SyncBatchNorm(3)
    count = dist.group.WORLD.arrays.statistics
    x = torch.tensor(data((4, 3))[0], requires_grad=True)
    start = count().completed
    y = layer(x)
    forward = count().completed
    y.sum().backward()
    backward = count().completed
    layer.eval()(x).sum().backward()
    return forward - start, backward - forward, count().completed - backward


def test_one_collective_each_way():
    assert run_distributed(2, check_calls) == [(1, 1, 0), (1, 1, 0)]


def check_sub_group():
    """Statistics are shared in the group given: ranks 0 and 2."""
    group = dist.new_group([0, 2])
    if dist.get_rank() == 1:
        return None
    layer = nn.SyncBatchNorm(1, momentum=1.0, process_group=group)
    layer(torch.full((2, 1), float(dist.get_rank())))
    return layer.running_mean.item(), layer.running_var.item()


def test_statistics_are_of_the_given_group():
    one, _, two = run_distributed(3, check_sub_group)
    assert one == two == (1.0, np.float32(4 / 3))


def check_refusals():
    one = torch.ones(dist.get_rank(), 2, requires_grad=True)  # one sample in all, on rank 1
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        nn.SyncBatchNorm(2)(one)
    with pytest.raises(ValueError, match="expected at least 2D input"):
        nn.SyncBatchNorm(2)(torch.ones(2))
    with pytest.raises(ValueError, match="number of input channels should be non-zero"):
        nn.SyncBatchNorm(2)(torch.ones(2, 0))
    x = torch.randn(3, 2, requires_grad=True)
    loss = nn.SyncBatchNorm(2)(x).sum()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_what_it_refuses_on_every_rank():
    run_distributed(2, check_refusals)


def test_without_peers_it_is_batch_norm(monkeypatch):
    monkeypatch.setattr(ranks, "_peers", ranks.alone)
    x, weight = data((6, 3))
    ours = run(layer_like(nn.SyncBatchNorm, 3), x, weight, slice(None))
    theirs = run(layer_like(nn.BatchNorm1d, 3), x, weight, slice(None))
    np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_array_equal(ours[1], theirs[1])


def test_conversion_takes_parameters_and_buffers_over():
    shared = nn.BatchNorm1d(3, eps=1e-3, momentum=None, bias=False).eval()
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(nn.Linear(3, 3), shared)})
    before = dict(model.named_parameters(remove_duplicate=False)), dict(model.named_buffers())
    assert nn.SyncBatchNorm.convert_sync_batchnorm(model, "a group") is model
    new = model["a"]
    assert type(new) is nn.SyncBatchNorm
    assert new is model["b"][1]
    assert (new.eps, new.momentum, new.training, new.process_group) == (
        1e-3,
        None,
        False,
        "a group",
    )
    after = dict(model.named_parameters(remove_duplicate=False)), dict(model.named_buffers())
    for old, now in zip(before, after, strict=True):
        assert old.keys() == now.keys()
        assert all(old[name] is now[name] for name in old)
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(3))) is nn.SyncBatchNorm
