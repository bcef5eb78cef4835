"""DistributedDataParallel against one process on the whole batch, and its promises one by one."""

from __future__ import annotations

import numpy as np
import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from dtrain.nn.parallel import DistributedDataParallel as DDP
from dtrain.nn.parallel.buckets import (
    DEFAULT_CAPS,
    FIRST_CAP,
    LEAST_CAP,
    MIB,
    assign,
    caps_for_messages,
)
from dtrain.testing.distributed import run_distributed
from tests.nn.parallel.training import descend

nn, F = torch.nn, torch.nn.functional


class MLP(nn.Module):
    def __init__(self, width=8, dtype=torch.float64):
        super().__init__()
        self.first = nn.Linear(4, width, dtype=dtype)
        self.second = nn.Linear(width, 3, dtype=dtype)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def batch(dtype=torch.float64, size=12):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(size, 4, generator=generator, dtype=dtype)


def gradients(model):
    return {
        n: None if p.grad is None else p.grad.numpy().copy() for n, p in model.named_parameters()
    }


def train(steps, cap, dtype):
    """Losses (mean over ranks) and final parameters of a few SGD steps on the same whole batch."""
    torch.manual_seed(3)
    model = DDP(MLP(dtype=dtype), bucket_cap_mb=cap)
    rank, n = dist.get_rank(), dist.get_world_size()
    share = batch(dtype)[rank * 12 // n : (rank + 1) * 12 // n]
    losses = descend(model, lambda: (model(share) ** 2).mean(), steps)
    return losses, [p.detach().numpy().copy() for p in model.parameters()]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_golden_losses_equal_one_process(ranks):
    """12 samples in equal shares: the mean of the means is the mean. Tolerance: rounding only."""
    alone, alone_parameters = run_distributed(1, train, 20, None, torch.float64)[0]
    for losses, parameters in run_distributed(ranks, train, 20, None, torch.float64):
        np.testing.assert_allclose(losses, alone, rtol=1e-12)
        for ours, theirs in zip(parameters, alone_parameters, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9)


def test_same_bits_for_every_bucket_size_and_transport():
    runs = [
        run_distributed(3, train, 5, cap, torch.float32, transport=transport)
        for cap, transport in ((None, "local"), (1e-6, "local"), (2e-4, "local"), (None, "zmq"))
    ]
    first = runs[0][0]
    for run in runs:
        for losses, parameters in run:
            assert losses == first[0]
            assert all((a == b).all() for a, b in zip(parameters, first[1], strict=True))


def check_mean_in_rank_order():
    """Rank r's gradient is r + 1 (+ a bit that float32 addition loses or keeps by order)."""
    values = [1.0, 1e-8, 1e-8]
    layer = nn.Linear(1, 1, bias=False)
    model = DDP(layer)
    (model(torch.tensor([[values[dist.get_rank()]]])).sum()).backward()
    f = np.float32
    assert layer.weight.grad.item() == ((f(1.0) + f(1e-8)) + f(1e-8)) / f(3)


def test_gradients_are_the_mean_in_rank_order():
    run_distributed(3, check_mean_in_rank_order)


def check_gradients_live_in_buckets():
    model = DDP(MLP())
    for _ in range(2):
        model.zero_grad()
        model(batch()).sum().backward()
        views = [v for b in model.reducer.buckets for v in b.views]
        assert all(any(p.grad is v for v in views) for p in model.parameters())
    model.zero_grad(set_to_none=False)
    assert all(p.grad.abs().sum().item() == 0 for p in model.parameters())


def test_gradients_live_in_buckets():
    run_distributed(2, check_gradients_live_in_buckets)


def check_no_sync():
    """Two micro-batches without and one with reduction equal one pass over all three."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = DDP(MLP())
    parts = batch(size=12)[rank * 6 : rank * 6 + 6].split(2)
    with model.no_sync():
        for part in parts[:2]:
            model(part).sum().backward()
    local = gradients(model.module)
    everyone = [None] * 2
    dist.all_gather_object(everyone, local["first.weight"])
    assert not np.allclose(everyone[0], everyone[1])
    model(parts[2]).sum().backward()
    accumulated = gradients(model.module)
    model.zero_grad()
    model(torch.cat(parts)).sum().backward()
    for name, grad in gradients(model.module).items():
        np.testing.assert_allclose(accumulated[name], grad, rtol=1e-12)


def test_no_sync_accumulates():
    run_distributed(2, check_no_sync)


def check_used_only_without_sync():
    """A parameter used under no_sync alone is reduced with the next pass that does."""
    rank = dist.get_rank()
    model = DDP(nn.ModuleDict({"a": nn.Linear(1, 1, bias=False), "b": nn.Linear(1, 1, bias=False)}))
    a, b = model.module["a"], model.module["b"]
    x = torch.tensor([[rank + 1.0]])
    with model.no_sync():
        model.reducer.prepare(sync=False)  # what DDP.forward does; the layers are called one by one
        a(x).sum().backward()
    assert a.weight.grad.item() == rank + 1
    model.reducer.prepare(sync=True)
    b(x).sum().backward()
    assert a.weight.grad.item() == b.weight.grad.item() == 1.5


def test_gradients_of_no_sync_are_not_forgotten():
    run_distributed(2, check_used_only_without_sync)


def check_unused():
    """Rank 0 uses only `a`, rank 1 only `b`, nobody `c`: no flag needed, c keeps its gradient."""
    rank = dist.get_rank()

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(2, 1, bias=False) for _ in range(3))

        def forward(self, x, use):
            return getattr(self, use)(x)

    model = DDP(Branches(), bucket_cap_mb=1e-6)
    x = torch.tensor([[2.0, 4.0]])
    for _ in range(2):
        model.zero_grad()
        model(x, "ab"[rank]).sum().backward()
        assert model.module.a.weight.grad.tolist() == [[1.0, 2.0]]  # 2/2 and 4/2
        assert model.module.b.weight.grad.tolist() == [[1.0, 2.0]]
        assert model.module.c.weight.grad is None
    model.module.c.weight.grad = torch.tensor([[7.0, 8.0]])
    model(x, "a").sum().backward()
    assert model.module.c.weight.grad.tolist() == [[7.0, 8.0]]


def test_parameters_without_a_part_need_no_flag():
    run_distributed(2, check_unused)


def check_shared_and_reused():
    """A tied weight and one used twice get one complete gradient each."""
    torch.manual_seed(1)
    layer = nn.Linear(4, 4, dtype=torch.float64)
    model = DDP(nn.Sequential(layer, layer))
    x = batch()[dist.get_rank() * 6 :][:6]
    model(x).sum().backward()
    everyone = [None] * 2
    dist.all_gather_object(everyone, gradients(model)["module.0.weight"])
    np.testing.assert_array_equal(everyone[0], everyone[1])


def test_shared_parameters():
    run_distributed(2, check_shared_and_reused)


def check_two_backwards():
    """Two passes over one forward accumulate twice the mean."""
    model = DDP(MLP())
    out = model(batch()).sum()
    out.backward(retain_graph=True)
    once = gradients(model)
    out.backward()
    for name, grad in gradients(model).items():
        np.testing.assert_allclose(grad, 2 * once[name], rtol=1e-12)


def test_several_backwards():
    run_distributed(2, check_two_backwards)


def check_broken_backward_leaves_nothing():
    """An exception in a backward pass (on all ranks) does not spoil the next one."""
    model = DDP(MLP())
    out = model(batch())

    def fail(grad):
        raise KeyError("inside backward")

    out.register_hook(fail)
    with pytest.raises(KeyError):
        out.sum().backward()
    model.zero_grad()
    model(batch()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_an_exception_in_backward():
    run_distributed(2, check_broken_backward_leaves_nothing)


def check_construction_copies_rank_0():
    torch.manual_seed(dist.get_rank())  # different parameters on each rank
    layer = nn.Linear(3, 3)
    layer.register_buffer("seen", torch.tensor([dist.get_rank()]))
    model = DDP(layer)
    everyone = [None] * 3
    dist.all_gather_object(everyone, [v.numpy() for v in model.state_dict().values()])
    assert list(model.state_dict()) == ["module.weight", "module.bias", "module.seen"]
    for other in everyone[1:]:
        for a, b in zip(everyone[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_construction_copies_parameters_and_buffers():
    run_distributed(3, check_construction_copies_rank_0)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (
            lambda r: nn.Linear(2, 3 + (r == 1)),
            r"parameter 0: rank 0 has 'weight' .*\[3, 2\].* rank 1 has 'weight' .*\[4, 2\]",
        ),
        (
            lambda r: nn.Linear(2, 3, bias=r == 0),
            r"Rank 0 has 2 params, while rank 1 has inconsistent 1 params.*"
            r"rank 0 has 'bias'.*rank 1 has no such parameter",
        ),
        (lambda r: nn.Linear(2, 3, dtype=(torch.float32, torch.float64)[r]), r"float32.*float64"),
    ],
    ids=["shape", "count", "dtype"],
)  # fmt: skip
def test_models_that_differ_are_told_apart(build, sentence):
    def rank():
        with pytest.raises(RuntimeError, match=sentence) as caught:
            DDP(build(dist.get_rank()))
        return str(caught.value)

    assert len(set(run_distributed(2, rank))) == 1


def check_buffers():
    """Buffers follow rank 0 before each training forward, not in eval mode, not under no_sync."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))
            self.register_buffer("mean", torch.zeros(1))
            self.register_buffer("count", torch.zeros(1, dtype=torch.int64))

        def forward(self, x):
            return x * self.weight + self.mean

    model = DDP(Counting())
    model.module.mean.fill_(dist.get_rank() + 1.0)
    model.module.count.fill_(dist.get_rank() + 1)
    model.eval()
    model(torch.ones(1))
    assert model.module.mean.item() == dist.get_rank() + 1
    model.train()
    with model.no_sync():
        model(torch.ones(1))
    assert model.module.mean.item() == dist.get_rank() + 1
    assert model(torch.ones(1)).item() == 2.0
    assert (model.module.mean.item(), model.module.count.item()) == (1.0, 1)


def test_buffers_follow_rank_0():
    run_distributed(2, check_buffers)


def test_a_model_without_parameters_is_refused():
    def rank():
        with pytest.raises(RuntimeError, match="not needed when a module doesn't have any param"):
            DDP(nn.Linear(2, 2).requires_grad_(False))
        with pytest.raises(ValueError, match="bucket_cap_mb must be positive"):
            DDP(nn.Linear(2, 2), bucket_cap_mb=0)

    run_distributed(1, rank)


def check_overlap():
    """A full bucket is submitted while backward runs: seen from a hook of an earlier layer."""
    layers = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])
    model = DDP(layers, bucket_cap_mb=1e-6)
    submitted = []
    layers[0].weight.register_post_accumulate_grad_hook(
        lambda p: submitted.append(model.reducer._next)
    )
    model(torch.ones(2, 4)).sum().backward()
    assert submitted[0] >= 6  # all but layer 0's own two parameters


def test_reduction_starts_during_backward():
    run_distributed(2, check_overlap)


def check_one_reduction_per_bucket():
    """A step makes one all-reduce per bucket, of its bytes, and no other call."""
    model = DDP(MLP(width=512, dtype=torch.float32), bucket_cap_mb=4e-3)
    arrays = dist.group.WORLD.arrays
    before = arrays.statistics()
    model(torch.ones(2, 4)).sum().backward()
    after = arrays.statistics()
    buckets = model.reducer.buckets
    assert len(buckets) == 2  # second.bias and .weight (6 KiB), first.bias and .weight (10 KiB)
    assert after.completed - before.completed == len(buckets)
    assert after.calls["all_reduce"].count == len(buckets)
    assert after.calls["all_reduce"].bytes == sum(b.buffer.array.nbytes for b in buckets)


def test_one_reduction_per_bucket():
    run_distributed(2, check_one_reduction_per_bucket)


def check_one_bucket_unless_something_runs_aside():
    """Reduced by the caller all is one call; sizes that were asked for stay; a hook has more."""
    dist.group.WORLD.arrays.runs_aside = False  # what shm says where ranks have one core each
    found = []
    for cap in (None, 1.0):
        torch.manual_seed(3)
        model = DDP(nn.Sequential(*[nn.Linear(600, 600) for _ in range(3)]), bucket_cap_mb=cap)
        x = torch.randn(4, 600) * (1 + dist.get_rank())
        before = dist.group.WORLD.arrays.statistics().completed
        (model(x) ** 2).sum().backward()
        calls = dist.group.WORLD.arrays.statistics().completed - before
        assert calls == len(model.reducer.buckets) == (1 if cap is None else 3)
        found.append(gradients(model))
    for name, gradient in found[0].items():
        np.testing.assert_array_equal(gradient, found[1][name])
    model = DDP(nn.Sequential(*[nn.Linear(600, 600) for _ in range(3)]))
    x = torch.ones(4, 600)
    with model.no_sync():
        model(x).sum().backward()
    kept = gradients(model)
    model.register_comm_hook(None, allreduce_hook)
    assert len(model.reducer.buckets) == 2  # of 1 MiB and more, and the rest
    for name, gradient in gradients(model).items():
        np.testing.assert_array_equal(gradient, kept[name])  # they have moved along
    model.zero_grad()
    for _ in range(2):  # before and after the buckets are rebuilt
        model(x).sum().backward()
    for name, gradient in gradients(model).items():
        np.testing.assert_allclose(gradient, 2 * kept[name], rtol=1e-6)  # ranks have the same x


def test_one_bucket_where_nothing_runs_beside_backward():
    run_distributed(2, check_one_bucket_unless_something_runs_aside)


def parameters_of(*sizes, dtype=torch.float32):
    return [torch.zeros(n, dtype=dtype) for n in sizes]


def taken(parameters, *caps):
    """The buckets when parameters are taken in reverse."""
    return assign(parameters, caps, list(reversed(range(len(parameters)))))


def test_assignment_is_reverse_with_a_small_first_bucket():
    quarter = FIRST_CAP // 4 // 4
    many = parameters_of(*[quarter] * 9)
    assert taken(many, *DEFAULT_CAPS) == [[8, 7, 6, 5], [4, 3, 2, 1, 0]]
    assert taken(many, 2 * FIRST_CAP // 4) == [[8, 7], [6, 5], [4, 3], [2, 1], [0]]


def test_a_parameter_larger_than_the_cap_is_not_split():
    assert taken(parameters_of(10, 3 * MIB, 10), MIB) == [[2, 1], [0]]


def test_dtypes_do_not_share_a_bucket():
    mixed = parameters_of(4) + parameters_of(4, dtype=torch.float64) + parameters_of(4)
    assert taken(mixed, *DEFAULT_CAPS) == [[2, 0], [1]]


def test_buckets_of_messages_are_a_sixteenth_of_the_gradients():
    for total, cap in ((0, LEAST_CAP), (40 * MIB, 2.5 * MIB), (4000 * MIB, 25 * MIB)):
        assert caps_for_messages(total) == (FIRST_CAP, cap)


def check_default_sizes():
    """Twelve layers of 1 MiB: the first bucket has one, the others two; 25 MiB hold them all."""
    layers = nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(12)])
    model = DDP(layers)
    sizes = [len(bucket.members) for bucket in model.reducer.buckets]
    assert sizes == [1, 2, 2, 2, 2, 2, 1], sizes
    assert model.logging_data()["bucket_cap_bytes"] == LEAST_CAP
    model.register_comm_hook(None, allreduce_hook)  # others may depend on buckets
    assert [len(bucket.members) for bucket in model.reducer.buckets] == [1, 11]
    asked = DDP(layers, bucket_cap_mb=4)
    assert [len(bucket.members) for bucket in asked.reducer.buckets] == [4, 4, 4]


def test_default_sizes_where_gradients_travel_in_messages():
    run_distributed(2, check_default_sizes)


def check_mixed_dtypes():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.float64))
    ddp = DDP(model)
    hidden = ddp.module[0](torch.ones(1, 2)).double()
    ddp.module[1](hidden).sum().backward()
    assert [b.buffer.array.dtype for b in ddp.reducer.buckets] == [np.float64, np.float32]
    assert all(p.grad.dtype is p.dtype for p in ddp.parameters())


def test_parameters_of_two_dtypes():
    run_distributed(2, check_mixed_dtypes)
