"""The older verbs for optimizers' state: what each gives is what goes on as the optimizer did, on
wrapped models and on plain ones."""

from __future__ import annotations

import warnings

import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.distributed.fsdp import (
    FullyShardedDataParallel as FSDP,
    OptimStateKeyType,
    fully_shard,
    share_comm_ctx,
)
from dtrain.distributed.fsdp.wrap import always_wrap_policy
from dtrain.testing.distributed import run_distributed

nn = torch.nn
NAME, NUMBER = OptimStateKeyType.PARAM_NAME, OptimStateKeyType.PARAM_ID

pytestmark = pytest.mark.filterwarnings("ignore:.*is being deprecated.*:FutureWarning")


def plain():
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def stepped(model, optimizer, steps=2):
    for step in range(steps):
        optimizer.zero_grad()
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
    return optimizer


def made(wrap=True):
    model = FSDP(plain(), auto_wrap_policy=always_wrap_policy) if wrap else plain()
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def moments(model, optimizer):
    """The moments by name, whole."""
    found = {}
    for name, parameter in model.named_parameters():
        value = optimizer.state[parameter]["exp_avg"]
        found[name] = (value.full_tensor() if hasattr(value, "full_tensor") else value).tolist()
    return found


def shard_full(model, optimizer, other, fresh):
    return FSDP.shard_full_optim_state_dict(
        FSDP.full_optim_state_dict(model, optimizer, rank0_only=False), other, optim=fresh
    )


def shard_full_by_input(model, optimizer, other, fresh):
    state = FSDP.full_optim_state_dict(model, optimizer, rank0_only=False)
    groups = [{"params": other.parameters()}]
    by_groups = FSDP.shard_full_optim_state_dict(state, other, groups)
    assert by_groups["param_groups"][0]["params"] == [0, 1, 2, 3]
    return FSDP.shard_full_optim_state_dict(state, other)


def flatten_sharded(model, optimizer, other, fresh):
    state = FSDP.sharded_optim_state_dict(model, optimizer)
    return FSDP.flatten_sharded_optim_state_dict(state, other, fresh)


def scatter(model, optimizer, other, fresh):
    state = FSDP.full_optim_state_dict(model, optimizer)
    assert bool(state) == (dist.get_rank() == 0)
    return FSDP.scatter_full_optim_state_dict(state or None, other, optim=fresh)


@pytest.mark.parametrize("way", [shard_full, shard_full_by_input, flatten_sharded, scatter])
def test_state_moves_to_another_optimizer(way):
    def main():
        model, optimizer = made()
        stepped(model, optimizer)
        other, fresh = made()
        fresh.load_state_dict(way(model, optimizer, other, fresh))
        return moments(model, optimizer), moments(other, fresh)

    reference, steps = made(wrap=False)
    expected = moments(reference, stepped(reference, steps))
    for before, after in run_distributed(2, main):
        assert after == before
        assert set(after) == set(expected)


def test_rekeying_goes_to_plain_models_and_back():
    def main():
        model, optimizer = made()
        state = FSDP.full_optim_state_dict(model, stepped(model, optimizer), rank0_only=False)
        alone, own = made(wrap=False)
        by_number = FSDP.rekey_optim_state_dict(state, NUMBER, alone, optim=own)
        assert list(by_number["state"]) == by_number["param_groups"][0]["params"] == [0, 1, 2, 3]
        own.load_state_dict(by_number)
        by_name = FSDP.rekey_optim_state_dict(own.state_dict(), NAME, alone)
        assert list(by_name["state"]) == by_name["param_groups"][0]["params"]
        assert FSDP.rekey_optim_state_dict(by_name, NAME, alone) is by_name
        other, fresh = made()
        fresh.load_state_dict(FSDP.shard_full_optim_state_dict(by_name, other, optim=fresh))
        return moments(model, optimizer), moments(alone, own), moments(other, fresh)

    for wrapped, alone, again in run_distributed(2, main):
        assert wrapped == alone == again


def test_what_is_refused_and_warned_of():
    def main():
        model, optimizer = made()
        stepped(model, optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(FutureWarning, match="full_optim_state_dict`` is being deprecated"):
                FSDP.full_optim_state_dict(model, optimizer)
        state = optimizer.state_dict()
        with pytest.raises(ValueError, match="give `optim` or `optim_input`, not both"):
            FSDP.rekey_optim_state_dict(state, NAME, model, model.parameters(), optimizer)
        with pytest.raises(AssertionError, match="to be PARAM_NAME or PARAM_ID, got name"):
            FSDP.rekey_optim_state_dict(state, "name", model)
        mixed = {"state": {0: {}, "a": {}}, "param_groups": []}
        with pytest.raises(ValueError, match="Invalid parameter keys"):
            FSDP.rekey_optim_state_dict(mixed, NAME, model)

    run_distributed(1, main)  # warnings are the process's


def test_models_that_share_memory_for_gradients():
    def main(share):
        torch.manual_seed(1)
        stages = [fully_shard(nn.Linear(64, 64)) for _ in range(3)]
        if share:
            share_comm_ctx(stages)
        x = torch.ones(2, 64)
        for stage in stages:
            x = stage(x).detach()
            stage(x).sum().backward()
        pools = {id(u.pool): u.pool for s in stages for u in s._fsdp_state.units}
        grads = [s.weight.grad.full_tensor().tolist() for s in stages]
        return grads, sum(pool.held for pool in pools.values())

    apart, together = run_distributed(2, main, False), run_distributed(2, main, True)
    assert [grads for grads, _ in together] == [grads for grads, _ in apart]
    assert apart[0][1] == 3 * together[0][1] > 0
    with pytest.raises(ValueError, match="Expects list of FSDPModules but got Linear"):
        share_comm_ctx([nn.Linear(1, 1)])
