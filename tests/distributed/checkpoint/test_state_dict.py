"""Names and contents of get_* and set_*: however a model is wrapped or cut, whatever the optimizer.

Names are compared with what PyTorch gives (`torch.distributed.checkpoint.state_dict`, 2.13). The
oracle of values is a run that was neither saved nor cut.
"""

from __future__ import annotations

import numpy as np
import pytest

import dtrain as torch
import dtrain.distributed as dist
import dtrain.distributed.checkpoint as dcp
from dtrain import nn
from dtrain.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from dtrain.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from dtrain.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from dtrain.testing.distributed import run_distributed

FULL = StateDictOptions(full_state_dict=True)
FIRST = StateDictOptions(full_state_dict=True, cpu_offload=True)
SPREAD = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def net(seed=0, cut=None):
    """A small model, its parameters cut over all ranks if `cut` says so."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    if cut is not None:
        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        for module in model:
            for name, parameter in list(module._parameters.items()):
                whole = distribute_tensor(parameter.detach(), mesh, [cut])
                setattr(module, name, nn.Parameter(whole))
    return model


def groups_of(model, kind=torch.optim.AdamW):
    first, norm, last = model.children()
    return kind(
        [
            {"params": first.parameters(), "lr": 0.1},
            {"params": [*norm.parameters(), *last.parameters()]},
        ],
        lr=0.01,
    )


def descend(model, optimizer, seed):
    """One step with made-up gradients, which are those of the whole parameters."""
    generator = np.random.default_rng(seed)
    for parameter in model.parameters():
        whole = generator.standard_normal(parameter.shape).astype(np.float32)
        own = parameter._cut(whole, "test").copy() if isinstance(parameter, DTensor) else whole
        parameter._grad = torch.tensor(own)
    optimizer.step()
    optimizer.zero_grad()


def as_numbers(value):
    """A nested state with arrays as lists: comparable by ==."""
    if isinstance(value, dict):
        return {key: as_numbers(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [as_numbers(entry) for entry in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


NAMES = ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"]
STATISTICS = ["1.running_mean", "1.running_var", "1.num_batches_tracked"]


def test_names_and_structure():
    model = net()
    optimizer = groups_of(model)
    state, held = get_state_dict(model, optimizer)
    assert list(state) == [*NAMES[:4], *STATISTICS, *NAMES[4:]]
    assert list(held) == ["state", "param_groups"]
    assert list(held["state"]) == NAMES
    assert list(held["state"]["0.bias"]) == ["step", "exp_avg", "exp_avg_sq"]
    first, second = held["param_groups"]
    assert (first["params"], first["lr"], second["lr"]) == (NAMES[:2], 0.1, 0.01)
    assert second["params"] == NAMES[2:]
    assert not optimizer.state  # asking changed nothing
    flat = get_optimizer_state_dict(model, optimizer, options=FLAT)
    assert flat["param_groups.0.weight.lr"] == 0.1
    assert flat["state.2.bias.exp_avg"].tolist() == [0, 0]
    model[0].requires_grad_(False)
    options = StateDictOptions(ignore_frozen_params=True)
    assert "0.weight" not in get_model_state_dict(model, options=options)
    held = get_optimizer_state_dict(model, optimizer, options=options)
    assert held["param_groups"][0]["params"] == []
    with pytest.raises(ValueError, match="full_state_dict must be True when broadcast_from_rank0"):
        get_model_state_dict(model, options=StateDictOptions(broadcast_from_rank0=True))


def test_submodules():
    model = net()
    with pytest.warns(FutureWarning, match="Getting submodules only"):
        assert list(get_model_state_dict(model, submodules={model[2]})) == NAMES[4:]
    bare = StateDictOptions(keep_submodule_prefixes=False)
    with pytest.warns(FutureWarning, match="Getting submodules only"):
        found = get_model_state_dict(model, submodules={model[2]}, options=bare)
    assert list(found) == ["weight", "bias"]


def check_wrappers():
    model = net()
    plain = get_model_state_dict(model)
    inner = nn.Sequential(model[0], checkpoint_wrapper(nn.Sequential(model[1])), model[2])
    wrapped = nn.parallel.DistributedDataParallel(inner)
    assert next(iter(wrapped.state_dict())) == "module.0.weight"
    state, held = get_state_dict(wrapped, torch.optim.SGD(wrapped.parameters(), momentum=0.9))
    assert list(state) == [k.replace("1.", "1.0.") if k[0] == "1" else k for k in plain]
    assert list(held["state"]) == ["0.weight", "0.bias", "1.0.weight", "1.0.bias", *NAMES[4:]]
    changed = {name: torch.full_like(tensor, 2) for name, tensor in state.items()}
    set_model_state_dict(wrapped, changed)
    assert model[1].weight.tolist() == [2] * 5
    with pytest.raises(RuntimeError, match=r'Missing key.*"0.weight"'):
        set_model_state_dict(wrapped, {k: v for k, v in changed.items() if k != "0.weight"})
    loose = StateDictOptions(strict=False)
    found = set_model_state_dict(wrapped, {"2.bias": changed["2.bias"], "x": 1}, options=loose)
    assert found.unexpected_keys == ["x"]
    assert "1.0.running_var" in found.missing_keys


def test_wrappers_leave_no_trace():
    run_distributed(1, check_wrappers)


OPTIMIZERS = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    "Adam": {"amsgrad": True, "weight_decay": 0.1},
}
OTHERS = ["AdamW", "Adadelta", "Adagrad", "Adamax", "NAdam", "RAdam", "RMSprop"]


@pytest.mark.parametrize("name", [*OPTIMIZERS, *OTHERS])
@pytest.mark.parametrize("steps", [0, 2])
def test_resumed_is_never_stopped(tmp_path, name, steps):
    kind, options = getattr(torch.optim, name), {"lr": 0.01, **OPTIMIZERS.get(name, {})}
    model = net()
    optimizer = kind(model.parameters(), **options)
    for step in range(steps):
        descend(model, optimizer, step)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(state, checkpoint_id=tmp_path)
    other = net(seed=1)
    resumed = kind(other.parameters(), **{**options, "lr": 0.5})
    blank = dict(zip(("model", "optimizer"), get_state_dict(other, resumed), strict=True))
    dcp.load(blank, checkpoint_id=tmp_path)
    set_state_dict(
        other, resumed, model_state_dict=blank["model"], optim_state_dict=blank["optimizer"]
    )
    for step in range(steps, steps + 3):
        descend(model, optimizer, step)
        descend(other, resumed, step)
    assert as_numbers(get_model_state_dict(other)) == as_numbers(get_model_state_dict(model))


def reference():
    model = net()
    optimizer = groups_of(model)
    descend(model, optimizer, 0)
    return as_numbers(get_state_dict(model, optimizer))


def check_full(cut):
    model = net(cut=cut)
    optimizer = groups_of(model)
    descend(model, optimizer, 0)
    expected = reference()
    assert as_numbers([*get_state_dict(model, optimizer, options=FULL)]) == [*expected]
    gathered = get_state_dict(model, optimizer, options=FIRST)
    first = dist.get_rank() == 0
    assert as_numbers([*gathered]) == ([*expected] if first else [{}, {}])
    other = net(seed=1, cut=Shard(0))
    taking = groups_of(other)
    given = dict(zip(("model_state_dict", "optim_state_dict"), gathered, strict=True))
    set_state_dict(other, taking, **given, options=SPREAD)
    assert as_numbers([*get_state_dict(other, taking, options=FULL)]) == [*expected]
    flat = StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict=True)
    everywhere = get_optimizer_state_dict(model, optimizer, options=flat)
    regrouped = torch.optim.AdamW(other[0].parameters()), torch.optim.AdamW(other[2].parameters())
    set_optimizer_state_dict(other, regrouped, everywhere, options=flat)
    assert [o.param_groups[0]["lr"] for o in regrouped] == [0.1, 0.01]
    found = get_optimizer_state_dict(other, regrouped, options=FULL)["state"]
    assert as_numbers(found) == {k: v for k, v in expected[1]["state"].items() if k[0] != "1"}
    set_model_state_dict(other, get_model_state_dict(net()), options=FULL)
    assert torch.equal(other[0].weight.full_tensor(), net()[0].weight)


@pytest.mark.parametrize("cut", [None, Shard(0), Replicate()], ids=str)
@pytest.mark.parametrize("size", [1, 3])
def test_whole_state_of_cut_models(cut, size):
    run_distributed(size, check_full, cut)


def test_groups_and_parameters_that_do_not_fit():
    model, other = net(), net()
    optimizer = groups_of(model)
    held = get_optimizer_state_dict(model, optimizer)
    together = torch.optim.AdamW(model.parameters())
    with pytest.raises(RuntimeError, match=r"0.weight and 1.weight are in one .*: 0.1 and 0.01"):
        set_optimizer_state_dict(model, together, held)
    with pytest.raises(RuntimeError, match=r"shape \[5, 3\] that is none of the model's"):
        get_optimizer_state_dict(other, optimizer)
    del held["state"]["2.bias"]
    with pytest.raises(RuntimeError, match="Missing optimizer state for parameter"):
        set_optimizer_state_dict(model, optimizer, held)
