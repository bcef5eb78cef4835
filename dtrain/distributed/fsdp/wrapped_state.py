"""State dicts of wrapped models: names without wrappers, values as the user chose to have them.

Rules: 1. Keys are those of the bare model, in saving and loading. 2. A whole tensor is cut for a
parameter that is sharded, whatever type is set. 3. Optimizer state stands under parameters' names.
4. Every rank makes the calls of all: what only one rank is to have is gathered by all.
Source: torch.distributed.fsdp.fully_sharded_data_parallel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dtrain.distributed.fsdp.api import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    LocalOptimStateDictConfig,
    LocalStateDictConfig,
    OptimStateDictConfig,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictConfig,
    StateDictSettings,
    StateDictType,
)
from dtrain.distributed.fsdp.state import ModuleState
from dtrain.distributed.fsdp.unit import PREFIX, bare
from dtrain.distributed.tensor._api import DTensor
from dtrain.optim.optimizer import Optimizer
from dtrain.tensor import Tensor

_CONFIGS: dict[StateDictType, tuple[type[StateDictConfig], type[OptimStateDictConfig]]] = {
    StateDictType.FULL_STATE_DICT: (FullStateDictConfig, FullOptimStateDictConfig),
    StateDictType.LOCAL_STATE_DICT: (LocalStateDictConfig, LocalOptimStateDictConfig),
    StateDictType.SHARDED_STATE_DICT: (ShardedStateDictConfig, ShardedOptimStateDictConfig),
}


def settings_for(
    kind: StateDictType,
    config: StateDictConfig | None = None,
    optim_config: OptimStateDictConfig | None = None,
) -> StateDictSettings:
    """Settings with the defaults of their type; RuntimeError for a config of another type."""
    model_class, optim_class = _CONFIGS[kind]
    config = model_class() if config is None else config
    optim_config = optim_class() if optim_config is None else optim_config
    for given, expected in ((config, model_class), (optim_config, optim_class)):
        if type(given) is not expected:
            raise RuntimeError(
                f"Expected state_dict_config of type {expected} but got {type(given)}"
            )
    return StateDictSettings(kind, config, optim_config)


def as_chosen(value: Any, kind: StateDictType) -> Any:
    """A value of a state dict; a DTensor is gathered, or its part given, as `kind` says."""
    if not isinstance(value, DTensor) or kind is StateDictType.SHARDED_STATE_DICT:
        return value
    if kind is StateDictType.LOCAL_STATE_DICT:
        return value.to_local()
    return value.full_tensor()


# --- models: hooks of a wrapper ---


def keys_without_wrapper(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """After saving: rename what stands below the wrapper and give it as the settings say."""
    settings: StateDictSettings = module._state_dict_settings
    kind, only_first = settings.state_dict_type, _only_first(settings.state_dict_config)
    first = is_first(module._fsdp_state)
    for key in [key for key in state if key.startswith(prefix + PREFIX)]:
        value = as_chosen(state.pop(key), kind)
        if first or not only_first:
            state[prefix + key.removeprefix(prefix + PREFIX)] = value


def _only_first(config: Any) -> bool:
    return bool(getattr(config, "rank0_only", False))


def is_first(state: ModuleState) -> bool:
    """Whether this rank is the first of its mesh, which has what `rank0_only` promises."""
    units = [unit for each in state.states() for unit in each.units]
    return not units or bool(units[0].mesh.ranks.flat[0] == units[0].mesh.get_rank())


def keys_with_wrapper(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before loading: rename, and cut whole tensors for what is sharded."""
    for key in [key for key in state if key.startswith(prefix)]:
        state[prefix + PREFIX + key.removeprefix(prefix)] = state.pop(key)
    for unit in module._fsdp_state.units:
        for slots, sharded in zip(unit.slots, unit.sharded, strict=True):
            for slot in slots:
                key = prefix + PREFIX + bare(slot.path)
                if key in state:
                    state[key] = part_of(state[key], sharded)


def part_of(value: Any, sharded: Any) -> Any:
    """A whole tensor, or this rank's part, as a DTensor placed like `sharded`; else `value`."""
    if not isinstance(value, Tensor) or isinstance(value, DTensor):
        return value
    if not isinstance(sharded, DTensor):
        return value
    if value.shape == sharded.shape:
        return sharded._kin(sharded._cut(value._data, "load_state_dict"))
    if value._data.shape == sharded._data.shape:
        return sharded._kin(value._data)
    return value


def missing_without_wrapper(module: Any, incompatible: Any) -> None:
    """After loading: say which keys were missing by the names of the bare model."""
    for keys in incompatible:
        keys[:] = [bare(key) for key in keys]


# --- optimizers ---


def names_of(model: Any) -> dict[int, str]:
    """{id of a parameter: its name in the bare model}."""
    return {id(p): bare(name) for name, p in model.named_parameters()}


def names_in_order(model: Any, optimizer: Any) -> list[str]:
    """The names of an optimizer's parameters, by number; KeyError for one of another model."""
    names = names_of(model)
    return [_named(names, p) for group in optimizer.param_groups for p in group["params"]]


def _named(names: Mapping[int, str], parameter: Any) -> str:
    if id(parameter) not in names:
        raise KeyError(
            f"the optimizer has a parameter of shape {list(parameter.shape)} that is none of the "
            "model's: make the optimizer after the model is wrapped"
        )
    return names[id(parameter)]


def optimizer_state(
    model: Any, optimizer: Optimizer, given: Mapping[str, Any] | None, settings: StateDictSettings
) -> dict[str, Any]:
    """{"state": {name: {...}}, "param_groups": [{..., "params": names}]}, as `settings` say.

    `given` stands for `optimizer.state_dict()`. Gathers one tensor at a time; all ranks call it.
    """
    given = optimizer.state_dict() if given is None else given
    order = names_in_order(model, optimizer)
    kind = settings.state_dict_type
    only_first = _only_first(settings.optim_state_dict_config)
    kept = is_first(model._fsdp_state) or not only_first
    state: dict[str, Any] = {}
    for number, values in sorted(given["state"].items()):
        chosen = {key: as_chosen(value, kind) for key, value in values.items()}
        if kept:
            state[order[number]] = chosen
    if not kept:
        return {}
    groups = [{**g, "params": [order[n] for n in g["params"]]} for g in given["param_groups"]]
    return {"state": state, "param_groups": groups}


def optimizer_state_to_load(
    model: Any, optimizer: Optimizer, given: Mapping[str, Any]
) -> dict[str, Any]:
    """State by names, as this optimizer's `load_state_dict` takes it: by number, and cut.

    KeyError for a parameter of the optimizer that `given["param_groups"]` does not know.
    """
    names = names_of(model)
    saved = {name: group for group in given["param_groups"] for name in group["params"]}
    state, groups, number = {}, [], 0
    for group in optimizer.param_groups:
        own = [_named(names, p) for p in group["params"]]
        unknown = [name for name in own if name not in saved]
        if unknown:
            raise KeyError(f"the optimizer state to load has nothing of {', '.join(unknown)}")
        for name, parameter in zip(own, group["params"], strict=True):
            if name in given["state"]:
                values = given["state"][name].items()
                state[number] = {key: _fitting(value, parameter) for key, value in values}
            number += 1
        options = {k: v for k, v in saved[own[0]].items() if k not in ("params", "param_names")}
        groups.append({**options, "params": list(range(number - len(own), number))})
    return {"state": state, "param_groups": groups}


def _fitting(value: Any, parameter: Any) -> Any:
    return part_of(value, parameter) if isinstance(value, Tensor) and value.ndim else value


def by_number(given: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """State by names as state by numbers, those of `names`' order."""
    number = {name: place for place, name in enumerate(names)}
    return _rekeyed(given, number)


def by_name(given: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """State by numbers as state by names."""
    return _rekeyed(given, dict(enumerate(names)))


def _rekeyed(given: Mapping[str, Any], keys: Mapping[Any, Any]) -> dict[str, Any]:
    groups = [{**g, "params": [keys[k] for k in g["params"]]} for g in given["param_groups"]]
    return {"state": {keys[k]: v for k, v in given["state"].items()}, "param_groups": groups}


def wrappers(module: Any, kind: type) -> Iterator[Any]:
    """The modules of class `kind` in a tree, itself included."""
    return (each for each in module.modules() if isinstance(each, kind))
