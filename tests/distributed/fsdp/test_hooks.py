"""Users' ways to reduce gradients and to gather parameters: communication hooks of the wrapper,
custom collectives of `fully_shard`. The oracle is the engine's own way: the same bits."""

from __future__ import annotations

import numpy as np
import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.distributed.algorithms import _comm_hooks
from dtrain.distributed.algorithms._comm_hooks import default_hooks as hooks
from dtrain.distributed.device_mesh import init_device_mesh
from dtrain.distributed.fsdp import (
    FullyShardedDataParallel as FSDP,
    MixedPrecision,
    ShardingStrategy,
    fully_shard,
)
from dtrain.distributed.fsdp.wrap import ModuleWrapPolicy
from dtrain.testing.distributed import run_distributed
from tests.distributed.fsdp import training

nn = torch.nn
FULL, NO = ShardingStrategy.FULL_SHARD, ShardingStrategy.NO_SHARD


def group():
    return dist.group.WORLD


def wrapped(name, strategy=FULL, **options):
    model = training.made(name)
    policy = ModuleWrapPolicy({nn.Linear})
    return FSDP(model, sharding_strategy=strategy, auto_wrap_policy=policy, **options)


def train(name, strategy, hook=None, state=hooks.DefaultState):
    model = wrapped(name, strategy)
    if hook is not None:
        model.register_comm_hook(state(group()), hook)
    losses = training.descend(model, training.MODELS[name][1])
    return losses, training.whole(model)


# Dividing by powers of two in two steps gives the bits of dividing once.
@pytest.mark.parametrize("transport", ["local", "zmq"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_default_hooks_do_what_is_done_without_one(ranks, transport):
    def main(strategy, hook):
        return train("tied", strategy, hook)

    for strategy, hook in ((FULL, hooks.reduce_scatter_hook), (NO, hooks.allreduce_hook)):
        expected = run_distributed(ranks, main, strategy, None, transport=transport)
        assert run_distributed(ranks, main, strategy, hook, transport=transport) == expected


@pytest.mark.parametrize("strategy", [FULL, NO])
@pytest.mark.parametrize(
    ("hook", "tolerance"), [(hooks.fp16_compress_hook, 2e-3), (hooks.bf16_compress_hook, 2e-2)]
)
def test_sixteen_bits_are_near(hook, tolerance, strategy):
    def main(*how):
        return train("MLP", strategy, *how)[0]

    found = run_distributed(3, main, hook, hooks.LowPrecisionState)
    np.testing.assert_allclose(found, run_distributed(3, main), atol=tolerance, rtol=0)


def sent_in_backward(hook):
    torch.manual_seed(0)
    model = FSDP(nn.Linear(8, 16, bias=False), sharding_strategy=FULL)
    model.register_comm_hook(hooks.LowPrecisionState(group()), hook)
    loss = model(torch.ones(2, 8)).sum()
    before = group().arrays.statistics()
    loss.backward()
    after = group().arrays.statistics()
    return after.bytes_sent - before.bytes_sent, model.weight.grad.to_local().dtype


@pytest.mark.parametrize(
    ("hook", "size"),
    [
        (hooks.reduce_scatter_hook, 4), (hooks.fp16_compress_hook, 2),
        (hooks.bf16_compress_hook, 2),
    ],
)  # fmt: skip
def test_bytes_are_those_of_the_dtype(hook, size):
    """A reduce-scatter of all elements among 2 ranks, the weight gathered again, one flag."""
    found = run_distributed(2, sent_in_backward, hook, transport="zmq")
    sent, kinds = zip(*found, strict=True)
    assert sum(sent) == 128 * size + 2 * 4
    assert set(kinds) == {torch.float32}


def test_a_hook_sees_equal_parts_for_all_ranks():
    """Three rows of two and a bias of three, among two ranks: rank 1 has less, and zeros."""
    seen = []

    def hook(state, grad, output):
        seen.append((state, grad.tolist(), tuple(output.shape)))
        dist.reduce_scatter_single(output, grad)

    def main():
        model = FSDP(nn.Linear(2, 3))
        model.register_comm_hook("state", hook)
        model(torch.tensor([[1.0, 2.0]])).sum().backward()
        return model.weight.grad.to_local().tolist(), model.bias.grad.to_local().tolist()

    found = run_distributed(2, main)
    assert seen == [("state", [1, 2, 1, 2, 1, 1, 1, 2, 1, 0, 0, 0], (6,))] * 2
    assert found == [([[2, 4], [2, 4]], [2, 2]), ([[2, 4]], [2])]


def test_mixed_precision_reduces_in_the_dtype_asked_for():
    def main(hook):
        precision = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        model = wrapped("MLP", mixed_precision=precision)
        if hook is not None:
            model.register_comm_hook(hooks.DefaultState(group()), hook)
        return training.descend(model, training.MODELS["MLP"][1])

    assert run_distributed(2, main, hooks.reduce_scatter_hook) == run_distributed(2, main, None)


def test_what_is_refused():
    def nothing(state, grad, output):
        output.data = output.data[:1]

    def main():
        model = wrapped("MLP")
        inner = FSDP.fsdp_modules(model)[1]
        with pytest.raises(ValueError, match="The communication hook must be callable but got 3"):
            model.register_comm_hook(None, 3)
        model.register_comm_hook(None, nothing)
        with pytest.raises(AssertionError, match="A communication hook is already registered"):
            model.register_comm_hook(None, nothing)
        with pytest.raises(AssertionError, match="can only be called on a root instance"):
            inner.register_comm_hook(None, nothing)
        inputs = training.MODELS["MLP"][1](0)
        with pytest.raises(RuntimeError, match=r"a communication hook left \[1\] in place of an"):
            model(*inputs).backward()
        hybrid = ShardingStrategy.HYBRID_SHARD
        mesh = init_device_mesh("cpu", (1, 2))
        crossed = FSDP(nn.Linear(2, 2), sharding_strategy=hybrid, device_mesh=mesh)
        with pytest.raises(AssertionError, match="is not supported for hybrid strategies"):
            crossed.register_comm_hook(None, nothing)
        with pytest.raises(ValueError, match="Expected to pass in an explicit ProcessGroup"):
            hooks.DefaultState(None)

    run_distributed(2, main)


def test_factors_are_those_of_torch():
    """Recorded from torch 2.13."""
    expected = {1: 1, 2: 2, 3: 2, 4: 2, 6: 4, 8: 4, 12: 4, 16: 4, 64: 8, 100: 8}
    factor = hooks.DefaultState._get_gradient_predivide_factor
    assert {n: factor(n) for n in expected} == expected
    assert hooks.fp16_compress_hook in _comm_hooks.LOW_PRECISION_HOOKS


# ---- fully_shard


class Comm:
    """A collective of the user, which counts its calls."""

    def __init__(self, function, wrong=0):
        self.function, self.calls, self.wrong = function, 0, wrong

    def allocate(self, size, *, dtype, device):
        return torch.empty(size[0] + self.wrong, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, op=None, async_op=False):
        self.calls += 1
        options = {} if op is None else {"op": op}
        return self.function(output_tensor, input_tensor, group=group, async_op=True, **options)


def custom(name, mesh_shape, with_custom):
    mesh = init_device_mesh("cpu", mesh_shape)
    model = training.sharded(name, training.made(name), mesh=mesh)
    scatter, gather = Comm(dist.reduce_scatter_single), Comm(dist.all_gather_single)
    for module in model.modules() if with_custom else ():
        if hasattr(module, "set_custom_all_gather"):
            module.set_custom_reduce_scatter(scatter)
            module.set_custom_all_gather(gather)
    losses = training.descend(model, training.MODELS[name][1])
    return (losses, training.whole(model)), (scatter.calls, gather.calls)


@pytest.mark.parametrize("mesh", [(3,), (2, 2)])
def test_custom_collectives_get_the_same_bits(mesh):
    ranks = int(np.prod(mesh))
    expected = run_distributed(ranks, custom, "tied", mesh, False, transport="zmq")
    found = run_distributed(ranks, custom, "tied", mesh, True, transport="zmq")
    assert [value for value, _ in found] == [value for value, _ in expected]
    assert {calls for _, calls in found} == {(training.STEPS, training.STEPS)}


def test_where_memory_is_shared_nothing_is_gathered():
    assert run_distributed(2, custom, "tied", (2,), True, transport="shm")[0][1] == (
        training.STEPS,
        0,
    )


def test_memory_of_another_size_is_refused():
    def main():
        model = fully_shard(nn.Linear(2, 2))
        model.set_custom_reduce_scatter(Comm(dist.reduce_scatter_single, wrong=1))
        with pytest.raises(RuntimeError, match=r"Comm.allocate\(\(\d+,\), dtype=dtrain.float32\)"):
            model(torch.ones(1, 2)).sum().backward()

    run_distributed(2, main)


@pytest.mark.parametrize("mesh", [(2,), (2, 1), (1, 2)])
def test_an_all_reduce_hook_changes_what_is_kept(mesh):
    def main(factor):
        model = fully_shard(nn.Linear(3, 4), mesh=init_device_mesh("cpu", mesh))
        model.set_gradient_divide_factor(4.0)
        model.set_all_reduce_hook(lambda grad: grad.mul_(factor))
        with pytest.raises(ValueError, match="there are no streams on the CPU"):
            model.set_all_reduce_hook(print, stream=object())
        model(torch.ones(1, 3)).sum().backward()
        return model.bias.grad.full_tensor().tolist()

    assert run_distributed(2, main, 3.0) == [[2 / 4 * 3.0] * 4] * 2
