"""What the reducer of DDP promises beyond the mean: order, weights, hooks, and replicas watched."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.errors import DistError
from dtrain.nn.parallel import DistributedDataParallel as DDP
from dtrain.testing.distributed import run_distributed

nn, F = torch.nn, torch.nn.functional


def model_of(dtype=torch.float64):
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(4, 8, dtype=dtype), nn.Tanh(), nn.Linear(8, 3, dtype=dtype))


def batch(size, dtype=torch.float64):
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(5), dtype=dtype)


def gradients(model):
    return [p.grad.numpy().copy() for p in model.parameters()]


# ---- order


class Crossed(nn.Module):
    """Registered a, b, c; backward reaches a first, then c, then b."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4, bias=False) for _ in range(3))

    def forward(self, x):
        return self.a(self.c(self.b(x)))


def check_rebuilt():
    model = DDP(Crossed(), bucket_cap_mb=1e-6)
    names = model.reducer.names
    seen = []
    for _ in range(3):
        loss = model(batch(2, torch.float32)).sum()
        seen.append([[names[m] for m in b.members] for b in model.reducer.buckets])
        loss.backward()
        views = [v for b in model.reducer.buckets for v in b.views]
        assert all(any(p.grad is v for v in views) for p in model.parameters())
    assert seen[0] == [["c.weight"], ["b.weight"], ["a.weight"]]
    assert seen[1] == seen[2] == [["a.weight"], ["c.weight"], ["b.weight"]]
    assert model.reducer.rebuilt


def test_buckets_are_rebuilt_once_in_the_order_gradients_come():
    run_distributed(2, check_rebuilt)


def check_order_of_rank_0():
    """Ranks see different orders (rank 1 has no part in `a`): all take rank 0's."""

    class Partly(Crossed):
        def forward(self, x):
            return self.c(self.b(x)) if dist.get_rank() else super().forward(x)

    model = DDP(Partly(), bucket_cap_mb=1e-6)
    for _ in range(2):
        model(batch(2, torch.float32)).sum().backward()
    return [model.reducer.names[m] for b in model.reducer.buckets for m in b.members]


def test_the_order_is_rank_0s():
    for order in run_distributed(3, check_order_of_rank_0):
        assert order == ["a.weight", "c.weight", "b.weight"]


def check_gradients_survive_the_rebuilding():
    """What no_sync accumulated before buckets are made anew is not lost."""
    model = DDP(Crossed(), bucket_cap_mb=1e-6)
    x = batch(2, torch.float32)
    model(x).sum().backward()
    once = gradients(model)
    with model.no_sync():
        model(x).sum().backward()
    model(x).sum().backward()  # makes new buckets in its forward
    assert model.reducer.rebuilt
    for now, before in zip(gradients(model), once, strict=True):
        np.testing.assert_allclose(now, 3 * before, rtol=1e-6)


def test_gradients_survive_the_rebuilding():
    run_distributed(2, check_gradients_survive_the_rebuilding)


def check_caps():
    model = DDP(model_of(), bucket_cap_mb_list=[1e-6, 1.0])
    assert [len(b.members) for b in model.reducer.buckets] == [1, 3]
    late = model_of()
    delayed = [("0.weight", late[0].weight), ("2.bias", late[2].bias)]
    model = DDP(late, delay_all_reduce_named_params=delayed)
    for _ in range(2):
        names = [[model.reducer.names[m] for m in b.members] for b in model.reducer.buckets]
        assert names[-1] == ["0.weight", "2.bias"]
        model(batch(2)).sum().backward()


def test_sizes_of_buckets_and_delayed_parameters():
    run_distributed(2, check_caps)


def check_no_copies():
    """A weight's gradient is computed into its bucket: no other array of its size is made."""
    model = DDP(nn.Linear(64, 32, bias=False))
    weight = model.module.weight
    home = model.reducer.buckets[0].views[0]
    home._data[...] = 77.0
    landed = []
    weight.register_hook(lambda grad: landed.append(grad._data is home._data))
    model(torch.ones(2, 64)).sum().backward()
    assert landed == [False]  # a hook may change it: it cannot be made in place
    for handle in list(weight._hooks):
        del weight._hooks[handle]
    weight.grad = None
    model(torch.ones(2, 64)).sum().backward()
    assert weight.grad is home
    assert (weight.grad == 2.0).all()
    shared = DDP(nn.Sequential(*[nn.Linear(4, 4, bias=False)] * 2))
    shared(torch.ones(1, 4)).sum().backward()  # two contributions: the first must not be lost
    alone = nn.Sequential(*[nn.Linear(4, 4, bias=False)] * 2)
    alone.load_state_dict({k.removeprefix("module."): v for k, v in shared.state_dict().items()})
    alone(torch.ones(1, 4)).sum().backward()
    np.testing.assert_allclose(gradients(shared)[0], gradients(alone)[0], rtol=1e-6)


def test_gradients_are_made_in_their_buckets():
    run_distributed(2, check_no_copies)


# ---- weights


def check_weights(parts):
    """Means over unequal shares, in unequal micro-batches: the mean over the whole batch."""
    rank, whole = dist.get_rank(), batch(sum(map(sum, parts)))
    alone = model_of()
    alone(whole).square().sum(1).mean().backward()
    model = DDP(model_of())
    rows = whole[sum(map(sum, parts[:rank])) :]
    for _ in range(2):  # the second step starts from nothing again
        model.zero_grad()
        start = 0
        for i, size in enumerate(parts[rank]):
            model.set_loss_weight(size)
            last = i == len(parts[rank]) - 1
            model.require_backward_grad_sync = last
            share = rows[start : start + size]
            start += size
            model(share).square().sum(1).mean().backward()
        for ours, theirs in zip(gradients(model), gradients(alone), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize("parts", [[[5], [1], [2]], [[2, 3], [1], [4, 1, 1]]], ids=str)
def test_weighted_losses_give_the_exact_global_mean(parts):
    run_distributed(len(parts), check_weights, parts)


def check_weight_arguments():
    model = DDP(model_of())
    with pytest.raises(ValueError, match="not negative"):
        model.set_loss_weight(-1)
    model.set_loss_weight(3)
    model(batch(2)).sum().backward()
    weighted = gradients(model)
    model.zero_grad()
    model.set_loss_weight(None)
    model(batch(2)).sum().backward()
    for ours, theirs in zip(weighted, gradients(model), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_equal_weights_are_no_weights():
    run_distributed(2, check_weight_arguments)


# ---- communication hooks


def check_hook():
    model = DDP(model_of(), bucket_cap_mb=1e-6)
    seen = []

    def hook(state, bucket):
        seen.append((state, bucket.index(), bucket.is_last(), len(bucket.parameters())))
        buffer = bucket.buffer()
        assert buffer.dim() == 1
        assert [g.shape for g in bucket.gradients()] == [p.shape for p in bucket.parameters()]
        work = dist.all_reduce(buffer, async_op=True)
        return work.get_future().then(lambda future: future.value()[0] * 2)

    model.register_comm_hook("state", hook)
    with pytest.raises(RuntimeError, match="can only be called once"):
        model.register_comm_hook(None, hook)
    with pytest.raises(TypeError, match="must be callable"):
        model.register_comm_hook(None, 3)
    plain = DDP(model_of())
    for each in (model, plain):
        each(batch(4)).sum().backward()
    assert seen == [("state", i, i == 3, 1) for i in range(4)]
    for ours, mean in zip(gradients(model), gradients(plain), strict=True):
        np.testing.assert_allclose(ours, 4 * mean, rtol=1e-12)  # a sum of two ranks, doubled


def test_a_communication_hook_reduces_instead():
    run_distributed(2, check_hook)


def check_hook_with_unused():
    """Who used what travels beside the hook: a parameter that nobody used keeps its gradient."""
    model = DDP(nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(3)))

    def hook(group, bucket):
        work = dist.all_reduce(bucket.buffer(), dist.ReduceOp.AVG, group, async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    model.register_comm_hook(None, hook)
    model.reducer.prepare(True)
    model.module[dist.get_rank()](torch.ones(1, 1)).sum().backward()
    return [None if layer.weight.grad is None else layer.weight.grad.item()
            for layer in model.module]  # fmt: skip


def test_unused_parameters_beside_a_hook():
    assert run_distributed(2, check_hook_with_unused) == [[0.5, 0.5, None]] * 2


# ---- wrappers come and go


def check_rewrapped():
    layer = model_of()
    DDP(layer)(batch(2)).sum().backward()
    twin = copy.deepcopy(layer)  # an average of the weights, say
    model = DDP(layer)
    before = dist.group.WORLD.arrays.statistics().completed
    model(batch(2)).sum().backward()
    assert dist.group.WORLD.arrays.statistics().completed - before == 1  # the first one is gone
    twin(batch(2)).sum().backward()  # and the copy is nobody's
    pickle.loads(pickle.dumps(layer))(batch(2)).sum().backward()
    assert dist.group.WORLD.arrays.statistics().completed - before == 1


def test_a_model_can_be_wrapped_again_and_copied():
    run_distributed(2, check_rewrapped)


# ---- what is wrong is said


def check_added():
    model = DDP(model_of())
    model.module.add_module("late", nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match=rf"rank {dist.get_rank()}: parameter 'late.weight' was"):
        model(batch(2))
    del model.module._modules["late"]
    frozen = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False))
    model = DDP(frozen)
    frozen[1].bias.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"parameter '1\.bias' was added, or began to require"):
        model(torch.ones(1, 4))


def test_a_parameter_added_after_wrapping_is_named():
    run_distributed(2, check_added)


def check_outside():
    model = DDP(model_of())
    loss = model.module(batch(2)).sum()
    with pytest.raises(RuntimeError, match=r"parameter '2\.\w+' got a gradient .*test_reducer\.py"):
        loss.backward()
    model.zero_grad()
    with torch.no_grad():
        model.module(batch(2))  # evaluation may go around
    model(batch(2)).sum().backward()


def test_a_forward_around_the_wrapper_is_named():
    run_distributed(2, check_outside)


def check_uneven():
    """Rank 1 has one batch less and leaves: the others are told who, and what to do."""
    model = DDP(model_of())
    for _ in range(3 - (dist.get_rank() == 1)):
        model(batch(2)).sum().backward()
    if dist.get_rank() == 1:
        return "left"
    return None


def test_uneven_inputs_raise_instead_of_hanging():
    with pytest.raises(DistError, match="rank 1") as caught:
        run_distributed(2, check_uneven)
    assert any("model.join()" in note for note in caught.value.__notes__)


def check_uneven_mismatch():
    """Rank 1 goes on to something else: an error on both, with both places."""
    model = DDP(model_of())
    for _ in range(3 - (dist.get_rank() == 1)):
        model(batch(2)).sum().backward()
    dist.barrier()


def test_uneven_inputs_before_another_call():
    with pytest.raises(DistError, match=r"rank 1 called barrier\(\)"):
        run_distributed(2, check_uneven_mismatch)


# ---- replicas


def check_divergence(every):
    model = DDP(model_of(), divergence_check_every=every)
    for step in range(12):
        if step == 4 and dist.get_rank() == 2:
            with torch.no_grad():
                model.module[2].bias += 1e-3
        try:
            model(batch(2)).sum().backward()
        except RuntimeError as error:
            return step, str(error)
    return None


@pytest.mark.parametrize("every", [1, 4])
def test_replicas_that_drift_apart_are_found_and_named(every):
    found = run_distributed(3, check_divergence, every)
    assert len(set(found)) == 1, found
    step, sentence = found[0]
    assert 4 <= step < 4 + every + 1
    assert "parameter '2.bias': rank 2 has not what the other ranks have" in sentence


def test_the_check_can_be_turned_off():
    assert run_distributed(3, check_divergence, 0) == [None] * 3


# ---- arguments


def check_arguments():
    layer = model_of()
    with pytest.raises(ValueError, match="give one of them"):
        DDP(layer, broadcast_buffers=True, forward_sync_buffers=False)
    with pytest.raises(ValueError, match="bucket_cap_mb and bucket_cap_mb_list"):
        DDP(layer, bucket_cap_mb=1, bucket_cap_mb_list=[1])
    assert DDP(layer, forward_sync_buffers=False).broadcast_buffers is False
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    with pytest.raises(RuntimeError, match="Cannot specify both process_group and device_mesh"):
        DDP(layer, device_mesh=mesh, process_group=dist.group.WORLD)
    assert DDP(layer, device_mesh=mesh).process_group.size() == 2
    layer._ddp_params_and_buffers_to_ignore = ["0.weight"]
    model = DDP(layer)
    model(batch(2) * (dist.get_rank() + 1)).sum().backward()
    assert "0.weight" not in model.reducer.names


def test_arguments():
    run_distributed(2, check_arguments)


def check_mixed_precision():
    from dtrain.nn.parallel.mixed_precision import _MixedPrecision

    layer = nn.Linear(4, 4)
    layer.register_buffer("scale", torch.ones(1))
    kinds = []
    layer.register_forward_hook(lambda m, i, out: kinds.append((i[0].dtype, out.dtype)))
    wanted = _MixedPrecision(param_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16)
    model = DDP(layer, mixed_precision=wanted)
    model(torch.ones(2, 4)).sum().backward()
    assert kinds == [(torch.bfloat16, torch.bfloat16)]
    assert layer.weight.dtype is layer.weight.grad.dtype is torch.float32
    assert layer.scale.dtype is torch.bfloat16
    assert (layer.weight.grad == 2.0).all()


def test_mixed_precision():
    run_distributed(2, check_mixed_precision)
