"""`FullyShardedDataParallel`: names, state dicts, whole parameters, what is left and refused."""

from __future__ import annotations

import functools

import numpy as np
import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from dtrain.distributed.device_mesh import init_device_mesh
from dtrain.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel as FSDP,
    ShardedStateDictConfig,
    ShardingStrategy,
    StateDictType,
)
from dtrain.distributed.fsdp.wrap import always_wrap_policy, enable_wrap, wrap
from dtrain.distributed.tensor import DTensor
from dtrain.testing.distributed import run_distributed

nn = torch.nn
FULL, LOCAL, SHARDED = list(StateDictType)
STRATEGIES = [ShardingStrategy.FULL_SHARD, ShardingStrategy.NO_SHARD]


def plain(seed=5):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.BatchNorm1d(7), nn.Linear(7, 3))


def wrapped(seed=5, **options):
    return FSDP(plain(seed), auto_wrap_policy=always_wrap_policy, **options)


def batch(step):
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(step))


def trained(model, steps=2):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        model(batch(step)).square().sum().backward()
        optimizer.step()
    return optimizer


def arrays(state):
    """Values as copies: ranks may be threads that share them."""
    return {key: np.array(value.detach().numpy()) for key, value in state.items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key in ours:
        np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-5, atol=1e-7, err_msg=key)


@functools.cache
def expected():
    """A plain model's state after training on the same batches as every rank."""
    model = plain()
    trained(model)
    return arrays(model.state_dict())


# --- names


def names():
    model = wrapped()
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, nn.Linear))
    bare = plain()
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in bare.named_parameters()]
    assert [n for n, _ in model.named_buffers()] == [n for n, _ in bare.named_buffers()]
    model.module.answer = 42
    assert model.answer == 42, "attributes go through"
    assert isinstance(model[0].weight, DTensor)
    assert isinstance(model.module, nn.Sequential)
    assert len(FSDP.fsdp_modules(model)) == 5
    assert FSDP.fsdp_modules(model, root_only=True) == [model]
    return list(model.state_dict()) == list(bare.state_dict())


def test_names_are_those_of_the_bare_model_also_through_checkpoint_wrappers():
    assert run_distributed(2, names) == [True, True]


# --- state dicts


def saved_whole(strategy):
    model = wrapped(sharding_strategy=strategy)
    trained(model)
    return arrays(model.state_dict())


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: s.name)
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_whole_state_dict_is_that_of_a_plain_model(ranks, strategy):
    for state in run_distributed(ranks, saved_whole, strategy):
        assert_same(state, expected())


def only_the_first():
    model = wrapped()
    with FSDP.state_dict_type(model, FULL, FullStateDictConfig(rank0_only=True)):
        state = model.state_dict()
    assert FSDP.get_state_dict_type(model).state_dict_config == FullStateDictConfig()
    return set(state)


def test_only_the_first_rank_gets_a_state_dict():
    first, *others = run_distributed(3, only_the_first)
    assert first == set(plain().state_dict())
    assert others == [set(), set()]


def loaded(kind):
    """What was saved as `kind` by a trained model, in another one."""
    model, other = wrapped(), wrapped(seed=6)
    trained(model)
    FSDP.set_state_dict_type(model, kind)
    FSDP.set_state_dict_type(other, kind)
    state = model.state_dict()
    shard = state["0.weight"]
    assert isinstance(shard, DTensor) == (kind is SHARDED)
    assert shard.shape[0] == (7 if kind is not LOCAL else [4, 3][dist.get_rank()])
    other.load_state_dict(state)
    FSDP.set_state_dict_type(other, FULL)
    return arrays(other.state_dict()), other(batch(0)).detach().numpy().copy()


@pytest.mark.parametrize("kind", list(StateDictType), ids=lambda k: k.name)
def test_what_was_saved_is_loaded(kind):
    model = plain()
    trained(model)
    for state, output in run_distributed(2, loaded, kind):
        assert_same(state, expected())
        np.testing.assert_allclose(output, model(batch(0)).detach().numpy(), rtol=1e-4, atol=1e-6)


def loaded_wrongly():
    model = wrapped()
    found = []
    for change in ({"0.weight": torch.zeros(2, 2)}, {"more": torch.zeros(1)}, {"3.bias": None}):
        state = {**arrays(model.state_dict()), **change}
        state = {k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in state.items()}
        state = {k: v for k, v in state.items() if v is not None}
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            found.append(str(error).replace("_fsdp_wrapped_module.", ""))
    return found


def test_what_does_not_fit_is_named_as_in_the_bare_model():
    for size, more, less in run_distributed(2, loaded_wrongly):
        assert "size mismatch" in size
        assert "0.weight" in size
        assert 'Unexpected key(s) in state_dict: "more"' in more
        assert '"3.bias"' in less


# --- the optimizer's state


def optimizer_moved(kind, ranks_before):
    """Saved by a trained model, loaded for another one, which goes on as the first."""
    model = wrapped()
    optimizer = trained(model)
    FSDP.set_state_dict_type(model, kind)
    weights, state = model.state_dict(), FSDP.optim_state_dict(model, optimizer)
    assert set(state["state"]) == {name for name, _ in model.named_parameters()}
    assert state["param_groups"][0]["params"] == [name for name, _ in model.named_parameters()]
    other = wrapped(seed=6)
    FSDP.set_state_dict_type(other, kind)
    other.load_state_dict(weights)
    fresh = torch.optim.AdamW(other.parameters(), lr=1.0)
    fresh.load_state_dict(FSDP.optim_state_dict_to_load(other, fresh, state))
    for which, steps in ((model, optimizer), (other, fresh)):
        steps.zero_grad()
        which(batch(9)).square().sum().backward()
        steps.step()
        FSDP.set_state_dict_type(which, FULL)
    return arrays(model.state_dict()), arrays(other.state_dict())


@pytest.mark.parametrize("kind", list(StateDictType), ids=lambda k: k.name)
def test_an_optimizer_goes_on_where_its_state_was_saved(kind):
    for went_on, resumed in run_distributed(2, optimizer_moved, kind, 2):
        for key in went_on:
            np.testing.assert_array_equal(went_on[key], resumed[key])


def optimizer_whole():
    model = wrapped()
    optimizer = trained(model)
    config = FullOptimStateDictConfig(rank0_only=True)
    with FSDP.state_dict_type(model, FULL, FullStateDictConfig(), config):
        state = FSDP.optim_state_dict(model, optimizer)
    if dist.get_rank():
        return state
    return {name: np.array(each["exp_avg"].numpy()) for name, each in state["state"].items()}


def test_whole_optimizer_state_is_that_of_a_plain_optimizer():
    model = plain()
    optimizer = trained(model)
    named = {name: optimizer.state[p]["exp_avg"] for name, p in model.named_parameters()}
    first, second = run_distributed(2, optimizer_whole)
    assert second == {}
    assert_same(first, arrays(named))


# --- whole parameters


def summoned(writeback):
    model = wrapped()
    with FSDP.summon_full_params(model, writeback=writeback):
        shapes = [tuple(p.shape) for p in model.parameters()]
        assert not any(isinstance(p, DTensor) for p in model.parameters())
        with torch.no_grad():
            for p in model.parameters():
                p *= 2  # by every rank, on a copy of its own
        with pytest.raises(RuntimeError, match="inside summon_full_params"):
            model(batch(0))
        with pytest.raises(RuntimeError, match="already whole"), FSDP.summon_full_params(model):
            pass
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return shapes, arrays(model.state_dict())


@pytest.mark.parametrize("writeback", [True, False])
@pytest.mark.parametrize("ranks", [1, 3])
def test_whole_parameters_are_changed_once_though_all_ranks_do(ranks, writeback):
    model = plain()
    before = arrays(model.state_dict())
    weights = {name for name, _ in model.named_parameters()}
    for shapes, state in run_distributed(ranks, summoned, writeback):
        assert shapes == [tuple(p.shape) for p in model.parameters()]
        for key, value in before.items():
            times = 2 if writeback and key in weights else 1
            np.testing.assert_array_equal(state[key], value * times)


def summoned_with_grads():
    model = wrapped()
    model(batch(0)).square().sum().backward()
    with FSDP.summon_full_params(model, with_grads=True, writeback=False):
        grads = {name: np.array(p.grad.numpy()) for name, p in model.named_parameters()}
    with FSDP.summon_full_params(model, rank0_only=True, writeback=False):
        whole = [not isinstance(p, DTensor) for p in model.parameters()]
    with pytest.raises(NotImplementedError, match="rank0_only"):
        FSDP.summon_full_params(model, rank0_only=True).__enter__()
    return grads, all(whole), any(whole)


def test_whole_gradients_and_whole_parameters_of_the_first_rank():
    model = plain()
    model(batch(0)).square().sum().backward()
    expected = {name: p.grad.numpy() for name, p in model.named_parameters()}
    found = run_distributed(2, summoned_with_grads)
    for grads, _, _ in found:
        assert_same(grads, expected)
    assert [whole for _, *whole in found] == [[True, True], [False, False]]


def initialised():
    model = wrapped()

    def ones(module):
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 1.0)

    assert model.apply(ones) is model
    return model.state_dict()["0.weight"].numpy().min()


def test_apply_initialises_whole_parameters():
    assert run_distributed(2, initialised) == [1.0, 1.0]


# --- what is left alone, and where ranks begin


def left_alone():
    model = plain()
    FSDP(model[3])
    kept = plain()
    left = FSDP(kept, ignored_modules=[kept[0]], auto_wrap_policy=always_wrap_policy)
    assert not isinstance(left[0].weight, DTensor)
    assert isinstance(left[3].weight, DTensor)
    one = plain()
    left = FSDP(one, ignored_states=[one[3].bias])
    assert not isinstance(left[3].bias, DTensor)
    left(batch(0)).sum().backward()
    return tuple(left[3].bias.grad.shape)


def test_ignored_modules_and_parameters_stay_as_they_are():
    assert run_distributed(2, left_alone) == [(3,), (3,)]


def begun():
    model = wrapped(seed=dist.get_rank(), sync_module_states=True)
    return arrays(model.state_dict())


@pytest.mark.parametrize("ranks", [2, 3])
def test_all_ranks_begin_with_the_first_ones_state(ranks):
    for state in run_distributed(ranks, begun):
        assert_same(state, arrays(plain(seed=0).state_dict()))


def written_wrapped():
    with enable_wrap(wrapper_cls=FSDP, sharding_strategy=ShardingStrategy.SHARD_GRAD_OP):
        inner = wrap(nn.Linear(5, 5))
    assert inner.sharding_strategy is ShardingStrategy.SHARD_GRAD_OP
    model = FSDP(nn.Sequential(inner, nn.Linear(5, 2)))
    assert model.check_is_root()
    assert not inner.check_is_root()
    with pytest.raises(RuntimeError, match="on inner FSDP instances is not supported"):
        inner.clip_grad_norm_(1.0)
    with pytest.raises(RuntimeError, match="on inner FSDP instances"), inner.no_sync():
        pass
    with pytest.raises(ValueError, match="already have FSDP applied but found 0"):
        FSDP(model.module, auto_wrap_policy=always_wrap_policy)


def test_modules_wrapped_where_they_are_written():
    run_distributed(2, written_wrapped)


def refused():
    grid = init_device_mesh("cpu", (2, 1))
    cases = [
        ({"device_mesh": grid}, "takes one group, or a 1-D mesh"),
        ({"device_mesh": grid, "process_group": dist.group.WORLD}, "Cannot pass both"),
        (
            {"sharding_strategy": ShardingStrategy.HYBRID_SHARD, "process_group": dist.group.WORLD},
            "tuple of two groups",
        ),
        ({"ignored_modules": [], "ignored_states": []}, "Cannot pass both ignored_modules"),
        ({"ignored_states": [3]}, "ignored_states expects"),
    ]
    for options, sentence in cases:
        with pytest.raises((ValueError, TypeError), match=sentence):
            FSDP(plain(), **options)
    with pytest.raises(RuntimeError, match="Expected state_dict_config of type"):
        FSDP.set_state_dict_type(wrapped(), FULL, ShardedStateDictConfig())


def test_arguments_that_do_not_go_together_are_refused():
    run_distributed(2, refused)


def groups_of_hosts():
    """Two groups by hand: ranks 0 1 share, 2 3 share, and (0 2), (1 3) replicate."""
    share = [dist.new_group([0, 1]), dist.new_group([2, 3])][dist.get_rank() // 2]
    replicate = [dist.new_group([0, 2]), dist.new_group([1, 3])][dist.get_rank() % 2]
    strategy = ShardingStrategy.HYBRID_SHARD
    model = wrapped(sharding_strategy=strategy, process_group=(share, replicate))
    trained(model)
    assert model[0].weight.to_local().shape[0] in (3, 4)
    return arrays(model.state_dict())


def test_hybrid_sharding_over_two_groups():
    for state in run_distributed(4, groups_of_hosts):
        assert_same(state, expected())
