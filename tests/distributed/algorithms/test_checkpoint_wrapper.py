"""Checkpoint wrappers: the bits of the plain model, its names, and what is computed again."""

from __future__ import annotations

import copy
import pickle

import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
    apply_activation_checkpointing,
    checkpoint_wrapper,
    offload_wrapper,
)
from dtrain.distributed.fsdp.wrap import ModuleWrapPolicy
from dtrain.nn.parallel import DistributedDataParallel as DDP
from dtrain.testing.distributed import run_distributed
from dtrain.utils.checkpoint import checkpoint

nn = torch.nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.wide, self.runs = nn.BatchNorm1d(4), nn.Linear(4, 4), 0

    def forward(self, x, scale=1.0):
        self.runs += 1
        return x + scale * nn.functional.dropout(self.wide(self.norm(x)).tanh(), 0.5)


def blocks():
    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.Sequential(Block()), nn.Linear(4, 2))


def gradients(model):
    torch.manual_seed(1)
    model(torch.randn(8, 4)).square().mean().backward()
    return [p.grad.tolist() for p in model.parameters()]


def is_block(module):
    return isinstance(module, Block)


@pytest.mark.parametrize("choice", [{"check_fn": is_block}, {}])
@pytest.mark.parametrize("impl", CheckpointImpl)
def test_same_bits_and_names(impl, choice):
    plain, model = blocks(), blocks()
    assert apply_activation_checkpointing(
        model, lambda module: checkpoint_wrapper(module, checkpoint_impl=impl), **choice
    ) is None  # fmt: skip
    assert gradients(model) == gradients(plain)
    assert model[0].runs == 2
    assert plain[0].runs == 1
    assert list(model.state_dict()) == list(plain.state_dict())


def test_policy_and_check_function():
    model = blocks()
    apply_activation_checkpointing(model, auto_wrap_policy=ModuleWrapPolicy([nn.Linear]))
    wrapped = [name for name, m in model.named_modules() if isinstance(m, CheckpointWrapper)]
    assert wrapped == ["0.wide", "1.0.wide", "2"]
    asked = []
    apply_activation_checkpointing(nn.Linear(2, 2), asked.append)
    assert not asked  # the model itself stays as it is


def test_states_go_both_ways():
    plain, model = blocks(), blocks()
    apply_activation_checkpointing(model)
    gradients(plain)  # moves the statistics of the norms
    for source, target in ((plain, model), (model, blocks())):
        assert str(target.load_state_dict(source.state_dict())) == "<All keys matched successfully>"
        assert all(
            torch.equal(a, b)
            for a, b in zip(plain.state_dict().values(), target.state_dict().values(), strict=True)
        )


def test_errors_name_keys_without_the_wrapper():
    model = blocks()
    apply_activation_checkpointing(model, check_fn=is_block)
    state = model.state_dict()
    state["0.more"] = state.pop("0.wide.weight")
    found = model.load_state_dict(state, strict=False)
    assert found.missing_keys == ["0.wide.weight"]
    assert found.unexpected_keys == ["0.more"]


def test_attributes_and_indices_go_through():
    inner = nn.Sequential(nn.Linear(2, 2))
    wrapper = checkpoint_wrapper(inner)
    assert wrapper[0] is inner[0]
    assert wrapper.append(nn.Tanh()) is inner
    assert [name for name, _ in wrapper.named_parameters()] == ["0.weight", "0.bias"]
    assert [name for name, _ in nn.Sequential(wrapper).named_parameters()] == [
        "0._checkpoint_wrapped_module.0.weight", "0._checkpoint_wrapped_module.0.bias"
    ]  # fmt: skip
    with pytest.raises(AttributeError, match="nothing"):
        wrapper.nothing  # noqa: B018
    for twin in (copy.deepcopy(wrapper), pickle.loads(pickle.dumps(wrapper))):
        assert list(twin.state_dict()) == ["0.weight", "0.bias"]
        twin(torch.randn(3, 2))


def test_offloading_changes_nothing():
    plain, model = blocks(), offload_wrapper(blocks())
    assert gradients(model) == gradients(plain)
    assert list(model.state_dict()) == list(plain.state_dict())


def test_function_and_its_arguments():
    calls = []

    def function(module, *args, debug, **kwargs):
        calls.append((debug, kwargs))
        return checkpoint(module, *args, debug=debug, **kwargs)

    model = checkpoint_wrapper(Block(), checkpoint_fn=function, debug=True)
    model(torch.randn(8, 4), scale=0.5).sum().backward()
    assert calls == [(True, {"scale": 0.5})]
    assert model.runs == 2
    refused = checkpoint_wrapper(Block(), CheckpointImpl.REENTRANT, debug=True)
    with pytest.raises(ValueError, match="only supported when use_reentrant=False"):
        refused(torch.randn(8, 4))


def test_under_ddp():
    """The wrapped model's gradients have the bits of the plain one's on every rank."""

    def rank_main():
        found = []
        for wrapped in (False, True):
            model = blocks()
            if wrapped:
                apply_activation_checkpointing(model, check_fn=is_block)
            model = DDP(model)
            torch.manual_seed(dist.get_rank())
            model(torch.randn(8, 4)).square().mean().backward()
            found.append([p.grad.tolist() for p in model.parameters()])
        assert found[0] == found[1]

    run_distributed(2, rank_main)
