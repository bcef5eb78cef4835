"""`fully_shard`: what parameters are then, the verbs of a module, and what is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from dtrain.distributed.device_mesh import init_device_mesh
from dtrain.distributed.fsdp import (
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from dtrain.distributed.tensor import DTensor, Replicate, Shard
from dtrain.errors import CollectiveMismatch
from dtrain.testing.distributed import run_distributed

nn = torch.nn

TRANSPORTS = ["local", "shm", "zmq"]


def plain():
    """The same on all ranks."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 2))


def batch(seed):
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))


def halves():
    """A model of three units."""
    model = plain()
    fully_shard(model[0])
    fully_shard(model[2])
    return fully_shard(model)


def numbers(tensors):
    return [t.detach().numpy().copy() for t in tensors]


def assert_equal(ours, theirs, exactly=True):
    for a, b in zip(ours, theirs, strict=True):
        if exactly:
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def mean_gradients(ranks, passes=1):
    """Of a plain model: the sum over passes of the means over ranks."""
    model = plain()
    for step in range(passes):
        for rank in range(ranks):
            (model(batch(10 * step + rank)).square().sum() / ranks).backward()
    return numbers(p.grad for p in model.parameters())


def whole_gradients(model):
    return numbers(p.grad.full_tensor() for p in model.parameters())


# --- what the parameters are


def parameters_of_a_rank():
    model = plain()
    before = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    assert fully_shard(model) is model
    assert isinstance(model, FSDPModule)
    assert isinstance(model, nn.Sequential)
    assert type(model).__name__ == "FSDPSequential"
    for name, p in model.named_parameters():
        assert isinstance(p, nn.Parameter)
        assert isinstance(p, DTensor)
        assert p.placements == (Shard(0),)
        assert p.shape == before[name].shape
        chunks = torch.tensor(before[name]).chunk(dist.get_world_size())
        mine = (
            chunks[dist.get_rank()].numpy() if dist.get_rank() < len(chunks) else before[name][:0]
        )
        np.testing.assert_array_equal(p.to_local().detach().numpy(), mine)
        np.testing.assert_array_equal(p.full_tensor().detach().numpy(), before[name])


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_parameters_are_chunks_along_the_first_dimension(ranks):
    run_distributed(ranks, parameters_of_a_rank)


def one_copy():
    model = fully_shard(plain())
    model.unshard()
    address = model[0].weight.detach().numpy().ctypes.data
    assert not isinstance(model[0].weight, DTensor)
    model.reshard()
    assert isinstance(model[0].weight, DTensor)
    return address


def test_on_one_host_all_ranks_compute_with_the_same_memory():
    assert len(set(run_distributed(3, one_copy))) == 1


# --- gradients


def one_pass(build):
    model = build()
    model(batch(dist.get_rank())).square().sum().backward()
    return whole_gradients(model)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_gradients_are_means_over_ranks(transport):
    for gradients in run_distributed(3, one_pass, halves, transport=transport):
        assert_equal(gradients, mean_gradients(3), exactly=False)


def accumulated(no_sync):
    model = halves()
    for step in range(3):
        model.set_requires_gradient_sync(step == 2 or not no_sync)
        model(batch(10 * step + dist.get_rank())).square().sum().backward()
        if no_sync and step < 2:
            assert all(p.grad is None for p in model.parameters())
    return whole_gradients(model)


@pytest.mark.parametrize("no_sync", [False, True])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_gradients_accumulate_in_shards_or_unreduced(transport, no_sync):
    for gradients in run_distributed(2, accumulated, no_sync, transport=transport):
        assert_equal(gradients, mean_gradients(2, passes=3), exactly=False)


def checkpointed():
    model = plain()
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, nn.Linear))
    for part in list(model):
        if not isinstance(part, nn.Tanh):
            fully_shard(part)
    return fully_shard(model)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_activations_computed_again(transport):
    for gradients in run_distributed(2, one_pass, checkpointed, transport=transport):
        assert_equal(gradients, mean_gradients(2), exactly=False)


class Apart(nn.Module):
    """Uses one of two layers: the first on even ranks, the second on odd ones; a third never."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.ModuleList([nn.Linear(5, 5) for _ in range(3)])

    def forward(self, x):
        return self.layers[dist.get_rank() % 2](x)


def partly_used(units):
    model = Apart()
    if units:
        for layer in model.layers:
            fully_shard(layer)
    fully_shard(model)
    model(batch(dist.get_rank())).sum().backward()
    grads = [p.grad for p in model.parameters()]
    assert grads[4:] == [None, None]
    return numbers(g.full_tensor() for g in grads[:4])


@pytest.mark.parametrize("transport", ["local", "zmq"])
@pytest.mark.parametrize("units", [False, True])
def test_parameters_that_some_ranks_or_none_used(units, transport):
    torch.manual_seed(2)
    layers = [nn.Linear(5, 5) for _ in range(2)]
    for rank, layer in enumerate(layers):
        (layer(batch(rank)).sum() / 2).backward()
    expected = numbers(p.grad for layer in layers for p in layer.parameters())
    if units and transport == "zmq":  # not all ranks gather all units
        with pytest.raises(CollectiveMismatch, match=r"layers\.0\.weight.*layers\.1\.weight"):
            run_distributed(2, partly_used, units, transport=transport, timeout=5)
        return
    for found in run_distributed(2, partly_used, units, transport=transport):
        assert_equal(found, expected, exactly=False)


def divided():
    model = halves()
    for part in (model, model[0], model[2]):
        part.set_gradient_divide_factor(4.0)
    model(batch(dist.get_rank())).square().sum().backward()
    return whole_gradients(model)


def test_gradients_divided_by_another_factor():
    expected = [g * 3 / 4 for g in mean_gradients(3)]
    for gradients in run_distributed(3, divided):
        assert_equal(gradients, expected, exactly=False)


def with_frozen():
    model = plain()
    model[2].requires_grad_(False)
    fully_shard(model)
    model(batch(dist.get_rank())).square().sum().backward()
    assert model[2].weight.grad is None
    return numbers(p.grad.full_tensor() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_frozen_parameters_are_needed_until_the_end(transport):
    expected = mean_gradients(2)
    for gradients in run_distributed(2, with_frozen, transport=transport):
        assert_equal(gradients, expected[:2] + expected[4:], exactly=False)


# --- two axes, groups of modules


def hybrid():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = fully_shard(plain(), mesh=mesh)
    assert model[0].weight.placements == (Replicate(), Shard(0))
    gradients = []
    for step in range(2):
        model.set_requires_all_reduce(step == 1)
        model(batch(10 * step + dist.get_rank())).square().sum().backward()
        gradients.append(model[0].weight.grad)
    assert gradients[0] is None
    return whole_gradients(model)


@pytest.mark.parametrize("transport", ["local", "zmq"])
def test_a_mesh_of_two_axes_shards_along_the_last_and_replicates_along_the_first(transport):
    for gradients in run_distributed(4, hybrid, transport=transport):
        assert_equal(gradients, mean_gradients(4, passes=2), exactly=False)


def grouped():
    model = plain()
    fully_shard([model[0], model[2]])
    assert model[0]._fsdp_state is model[2]._fsdp_state
    return fully_shard(model)


@pytest.mark.parametrize("transport", ["local", "zmq"])
def test_several_modules_in_one_unit(transport):
    for gradients in run_distributed(2, one_pass, grouped, transport=transport):
        assert_equal(gradients, mean_gradients(2), exactly=False)


def ignoring():
    model = plain()
    fully_shard(model, ignored_params={model[0].weight})
    assert not isinstance(model[0].weight, DTensor)
    assert isinstance(model[0].bias, DTensor)
    model(batch(dist.get_rank())).sum().backward()
    return numbers([model[0].weight.grad])


def test_ignored_parameters_stay_whole_and_are_not_reduced():
    first, second = run_distributed(2, ignoring)
    assert (first[0] != second[0]).any()


# --- changes of parameters


def changed(how):
    model = halves()
    model(batch(0))
    for p in model.parameters():
        with torch.no_grad():
            how(p)
    return model(batch(0)).detach().numpy().copy()


CHANGES = {
    "in place": lambda p: p.mul_(2),
    "copy_": lambda p: p.copy_(p * 2),
    "data": lambda p: p.data.mul_(2),
    "data set": lambda p: setattr(p, "data", p.detach() * 2),
    "local": lambda p: p.to_local().mul_(2),
}


@pytest.mark.parametrize("transport", ["local", "zmq"])
@pytest.mark.parametrize("how", CHANGES)
def test_changes_are_seen_by_all_ranks_in_the_next_forward(how, transport):
    model = plain()
    with torch.no_grad():
        for p in model.parameters():
            p *= 2
    expected = model(batch(0)).detach().numpy()
    for output in run_distributed(2, changed, CHANGES[how], transport=transport):
        np.testing.assert_array_equal(output, expected)


class Careless(nn.Module):
    """Raises in forward when it is told to."""

    def __init__(self):
        super().__init__()
        self.inner = fully_shard(plain())
        self.fails = True

    def forward(self, x):
        hidden = self.inner(x)
        if self.fails:
            raise ValueError("told to")
        return hidden


def after_failures():
    model = fully_shard(Careless())
    with pytest.raises(ValueError, match="told to"):
        model(batch(0))
    model.fails = False
    assert all(isinstance(p, DTensor) for p in model.parameters())

    def refuse(grad):
        raise ValueError("in backward")

    def refuse_later(module, args, output):
        output.register_hook(refuse)

    output = model(batch(0))
    output.register_hook(refuse)
    with pytest.raises(ValueError, match="in backward"):
        output.square().sum().backward()
    hidden = model.inner[1].register_forward_hook(refuse_later)
    with pytest.raises(ValueError, match="in backward"):
        model(batch(0)).square().sum().backward()  # when the last unit has been reduced
    hidden.remove()
    for p in model.parameters():
        p.grad = None
    model(batch(dist.get_rank())).square().sum().backward()
    return whole_gradients(model)


@pytest.mark.parametrize("transport", ["local", "zmq"])
def test_passes_that_fail_leave_nothing_behind(transport):
    for gradients in run_distributed(2, after_failures, transport=transport):
        assert_equal(gradients, mean_gradients(2), exactly=False)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def encode(self, x):
        return self.layer(x)


def other_method():
    torch.manual_seed(1)
    model = fully_shard(Encoder())
    register_fsdp_forward_method(model, "encode")
    return model.encode(batch(0)).detach().numpy().copy()


@pytest.mark.parametrize("transport", ["local", "zmq"])
def test_another_method_as_forward(transport):
    torch.manual_seed(1)
    expected = Encoder().encode(batch(0)).detach().numpy()
    for output in run_distributed(2, other_method, transport=transport):
        np.testing.assert_array_equal(output, expected)


# --- what is refused


def refusals():
    model = plain()
    with pytest.raises(ValueError, match="containers that do not implement forward"):
        fully_shard(nn.ModuleList([nn.Linear(2, 2)]))
    with pytest.raises(ValueError, match="should be a factor of 2, not 3"):
        fully_shard(model, reshard_after_forward=3)
    with pytest.raises(TypeError, match="OffloadPolicy"):
        fully_shard(model, offload_policy=object())
    scalar = nn.Linear(2, 2)
    scalar.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match="Change scale to a 1D tensor"):
        fully_shard(scalar)
    fully_shard(model, offload_policy=OffloadPolicy(), reshard_after_forward=2)
    with pytest.raises(ValueError, match="twice"):
        fully_shard(model)
    with pytest.raises(AssertionError, match="deepcopy"):
        copy.deepcopy(model)
    with pytest.raises(TypeError, match=r"stays dtrain.float32, got dtrain.float64"):
        model.double()
    with pytest.raises(ValueError, match="should be a bool"):
        model.set_reshard_after_forward(2)
    model.to("cpu").float()
    inner = fully_shard(plain())
    outer = fully_shard(nn.Sequential(inner))
    inner(batch(0))
    with pytest.raises(RuntimeError, match="already been lazily initialized"):
        outer(batch(0))


def test_what_is_refused():
    run_distributed(2, refusals)
