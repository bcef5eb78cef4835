"""The older verbs of `FullyShardedDataParallel` for the state of optimizers, in today's terms.

Owns: `OlderState`, from which the wrapper has them. Each warns, names what replaces it, and gives
the same as that. Parameters of optimizers are told by `optim`, by `optim_input` (what it was made
with), or are those of the model. Source: torch.distributed.fsdp.fully_sharded_data_parallel.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from dtrain.autograd.node import make
from dtrain.distributed.checkpoint._together import Together
from dtrain.distributed.checkpoint._whole import spread_whole
from dtrain.distributed.fsdp import wrapped_state
from dtrain.distributed.fsdp.api import (
    FullOptimStateDictConfig,
    OptimStateKeyType,
    StateDictType,
)
from dtrain.distributed.tensor._api import DTensor
from dtrain.optim.optimizer import Optimizer
from dtrain.tensor import Tensor


class _Groups:
    """The parameter groups of an optimizer that nobody has at hand."""

    def __init__(self, given: Iterable[Any]) -> None:
        listed = list(given)
        if listed and not isinstance(listed[0], Mapping):
            listed = [{"params": listed}]
        self.param_groups = [{**group, "params": list(group["params"])} for group in listed]


def _optimizer(model: Any, optim_input: Any, optim: Any) -> Any:
    if optim is not None and optim_input is not None:
        raise ValueError("give `optim` or `optim_input`, not both")
    if optim is not None:
        return optim
    return _Groups(model.parameters() if optim_input is None else optim_input)


def _warn(old: str, new: str) -> None:
    warnings.warn(
        f"``FullyShardedDataParallel.{old}`` is being deprecated and is replaced by "
        f"``FullyShardedDataParallel.{new}``.",
        FutureWarning,
        stacklevel=3,
    )


class OlderState:
    """Static methods of `FullyShardedDataParallel`."""

    @staticmethod
    def full_optim_state_dict(
        model: Any,
        optim: Optimizer,
        optim_input: Any = None,
        rank0_only: bool = True,
        group: Any = None,
    ) -> dict[str, Any]:
        """`optim_state_dict` with whole tensors, on the first rank, or on all; {} on the others.

        Gathers one tensor at a time: all ranks call it. `optim_input` and `group` are accepted and
        change nothing.
        """
        _warn("full_optim_state_dict", "optim_state_dict")
        chosen = FullOptimStateDictConfig(rank0_only=rank0_only)
        settings = wrapped_state.settings_for(StateDictType.FULL_STATE_DICT, None, chosen)
        return wrapped_state.optimizer_state(model, optim, None, settings)

    @staticmethod
    def sharded_optim_state_dict(model: Any, optim: Optimizer, group: Any = None) -> dict[str, Any]:
        """`optim_state_dict` with DTensors. `group` is accepted and changes nothing."""
        _warn("sharded_optim_state_dict", "optim_state_dict")
        settings = wrapped_state.settings_for(StateDictType.SHARDED_STATE_DICT)
        return wrapped_state.optimizer_state(model, optim, None, settings)

    @staticmethod
    def shard_full_optim_state_dict(
        full_optim_state_dict: Mapping[str, Any],
        model: Any,
        optim_input: Any = None,
        optim: Optimizer | None = None,
    ) -> dict[str, Any]:
        """`optim_state_dict_to_load` of state with whole tensors, which every rank has.

        ValueError for both `optim` and `optim_input`.
        """
        _warn("shard_full_optim_state_dict", "optim_state_dict_to_load")
        optimizer = _optimizer(model, optim_input, optim)
        return wrapped_state.optimizer_state_to_load(model, optimizer, full_optim_state_dict)

    @staticmethod
    def flatten_sharded_optim_state_dict(
        sharded_optim_state_dict: Mapping[str, Any], model: Any, optim: Optimizer
    ) -> dict[str, Any]:
        """`optim_state_dict_to_load` of state with DTensors."""
        _warn("flatten_sharded_optim_state_dict", "optim_state_dict_to_load")
        return wrapped_state.optimizer_state_to_load(model, optim, sharded_optim_state_dict)

    @staticmethod
    def scatter_full_optim_state_dict(
        full_optim_state_dict: Mapping[str, Any] | None,
        model: Any,
        optim_input: Any = None,
        optim: Optimizer | None = None,
        group: Any = None,
    ) -> dict[str, Any]:
        """`shard_full_optim_state_dict` of what the first rank of `group` (default: all) has; that
        of the others is not looked at. All ranks call it: one broadcast for each tensor.
        """
        _warn("scatter_full_optim_state_dict", "optim_state_dict_to_load")
        optimizer = _optimizer(model, optim_input, optim)
        parameters = {
            wrapped_state.bare(name): parameter for name, parameter in model.named_parameters()
        }

        def part(key: str, whole: Any) -> Tensor:
            parameter = parameters.get(key.removeprefix("state.").rpartition(".")[0])
            if isinstance(parameter, DTensor) and tuple(parameter.shape) == whole.shape:
                own = parameter._cut(whole, "scatter_full_optim_state_dict")
                return parameter._kin(own.copy())  # type: ignore[no-any-return]
            return make(whole.copy())  # type: ignore[no-any-return]

        spread = spread_whole(full_optim_state_dict or {}, Together(group), part)
        return wrapped_state.optimizer_state_to_load(model, optimizer, spread)

    @staticmethod
    def rekey_optim_state_dict(
        optim_state_dict: dict[str, Any],
        optim_state_key_type: OptimStateKeyType,
        model: Any,
        optim_input: Any = None,
        optim: Optimizer | None = None,
    ) -> dict[str, Any]:
        """State by numbers as state by names (PARAM_NAME), or the other way (PARAM_ID): between
        models with wrappers and without. `model` and `optim` are those whose numbers they are.

        ValueError for keys of both kinds, or for both `optim` and `optim_input`; KeyError for a
        parameter that the optimizer does not have.
        """
        if not isinstance(optim_state_key_type, OptimStateKeyType):
            raise AssertionError(
                "Expected optim_state_key_type to be PARAM_NAME or PARAM_ID, got "
                f"{optim_state_key_type}"
            )
        kinds = {type(key) for key in optim_state_dict["state"]}
        wanted = str if optim_state_key_type is OptimStateKeyType.PARAM_NAME else int
        if len(kinds) > 1:
            raise ValueError(f"Invalid parameter keys: {optim_state_dict['state'].keys()}")
        if kinds <= {wanted}:
            return optim_state_dict
        names = wrapped_state.names_in_order(model, _optimizer(model, optim_input, optim))
        turned = wrapped_state.by_name if wanted is str else wrapped_state.by_number
        return turned(optim_state_dict, names)
