"""The state of a model and its optimizers by names that stay the same however they are wrapped.

Names are those of the bare model: no "module." of DDP, nothing of checkpoint wrappers. An
optimizer's state stands under the names of its parameters, so it can be loaded by a run that has
another number of ranks, or numbers its parameters otherwise. Tensors are the objects' own, not
copies, as far as they have some. Source: torch.distributed.checkpoint.state_dict.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dtrain.autograd.node import make
from dtrain.distributed.checkpoint._nested_dict import flatten_state_dict, unflatten_state_dict
from dtrain.distributed.checkpoint._skeleton import completed_state
from dtrain.distributed.checkpoint._together import Together
from dtrain.distributed.checkpoint._whole import gather_whole, spread_whole
from dtrain.distributed.tensor import DTensor
from dtrain.nn.modules.module import Module
from dtrain.nn.modules.state import _IncompatibleKeys
from dtrain.nn.parallel import DistributedDataParallel
from dtrain.optim.optimizer import Optimizer
from dtrain.tensor import Tensor

# Children whose names do not appear: of checkpoint_wrapper, FullyShardedDataParallel, compile.
_CHECKPOINTED = "_checkpoint_wrapped_module"
_WRAPPED = {_CHECKPOINTED, "_fsdp_wrapped_module", "_orig_mod"}


@dataclass(frozen=True)
class StateDictOptions:
    """How state is given and taken.

    full_state_dict: whole tensors instead of parts: on all ranks, which gather them.
    cpu_offload: with full_state_dict, the first rank alone gets them, one tensor at a time, and the
        others {}; alone it changes nothing, all memory is the CPU's.
    ignore_frozen_params: without parameters that do not require gradients.
    keep_submodule_prefixes: with `submodules`, whether names are those in the whole model.
    strict: whether names without counterpart are errors when setting.
    broadcast_from_rank0: with full_state_dict, the first rank's state is set on all ranks.
    flatten_optimizer_state_dict: one flat dict, "state.NAME.exp_avg", "param_groups.NAME.lr": for
        groups that are cut otherwise when it is loaded.
    dsd_fqn_modifiers is accepted and ignored.
    """

    full_state_dict: bool = False
    cpu_offload: bool = False
    ignore_frozen_params: bool = False
    keep_submodule_prefixes: bool = True
    strict: bool = True
    broadcast_from_rank0: bool = False
    flatten_optimizer_state_dict: bool = False
    dsd_fqn_modifiers: str = "_fqn_modifiers"


Optimizers = Optimizer | Iterable[Optimizer]


def _checked(options: StateDictOptions | None) -> StateDictOptions:
    options = options or StateDictOptions()
    if options.broadcast_from_rank0 and not options.full_state_dict:
        raise ValueError("full_state_dict must be True when broadcast_from_rank0 is True.")
    return options


# --- names -----------------------------------------------------------------------------------


class _Names:
    """Names of the bare model for the keys of a model's state dict, and for its parameters."""

    def __init__(self, model: Module) -> None:
        self.model = model
        found = dict(_prefixes(model, "", ""))
        # checkpoint_wrapper takes its own name out of the keys of a state dict.
        shown = {raw.replace(f"{_CHECKPOINTED}.", ""): clean for raw, clean in found.items()}
        self._prefixes = shown | found
        self.parameters = {
            name: parameter
            for key, parameter in model.named_parameters()
            for name in [self.of(key)]
        }
        self._of_parameter = {id(parameter): name for name, parameter in self.parameters.items()}

    def of(self, key: str) -> str:
        """The name for a key of the model's `state_dict()`."""
        prefix = key[: key.rfind(".") + 1]
        return self._prefixes.get(prefix, prefix) + key[len(prefix) :]

    def of_parameter(self, parameter: Tensor) -> str:
        """The name of a parameter; RuntimeError for one that the model does not have."""
        name = self._of_parameter.get(id(parameter))
        if name is None:
            raise RuntimeError(
                f"the optimizer has a parameter of shape {list(parameter.shape)} that is none of "
                "the model's: make the optimizer after the model is wrapped or sharded"
            )
        return name

    def frozen(self) -> set[str]:
        """The parameters that do not require gradients."""
        return {name for name, p in self.parameters.items() if not p.requires_grad}

    def below(self, submodules: set[Module]) -> list[str]:
        """The prefixes of modules, as names."""
        raw = {id(module): name for name, module in self.model.named_modules()}
        found = [f"{raw[id(module)]}." for module in submodules]
        return [self._prefixes[prefix] for prefix in found]


def _prefixes(module: Module, raw: str, clean: str) -> Iterator[tuple[str, str]]:
    """(prefix in the model, prefix in the bare model) of a module and all below."""
    yield raw, clean
    for name, child in module._modules.items():
        if child is not None:
            of_ddp = isinstance(module, DistributedDataParallel) and name == "module"
            same = of_ddp or name in _WRAPPED
            yield from _prefixes(child, f"{raw}{name}.", clean if same else f"{clean}{name}.")


# --- getting ---------------------------------------------------------------------------------


def get_model_state_dict(
    model: Module,
    *,
    submodules: set[Module] | None = None,
    options: StateDictOptions | None = None,
) -> dict[str, Any]:
    """{name: tensor} of parameters and persistent buffers; whole ones as `options` says.

    With full_state_dict all ranks of the default group call it.
    """
    options, names = _checked(options), _Names(model)
    state = {names.of(key): value for key, value in model.state_dict().items()}
    for name in names.frozen() if options.ignore_frozen_params else ():
        state.pop(name, None)
    if submodules:
        state = _part(state, names.below(submodules), options.keep_submodule_prefixes)
    return _whole(state, options)


def _part(state: dict[str, Any], prefixes: list[str], keep: bool) -> dict[str, Any]:
    warnings.warn(
        "Getting submodules only model/optim state_dict is deprecated. This feature can be "
        "achieved by manually filtering out the state_dict returned from get_state_dict.",
        FutureWarning,
        stacklevel=4,
    )
    return {
        name if keep else name[len(prefix) :]: value
        for prefix in prefixes
        for name, value in state.items()
        if name.startswith(prefix)
    }


def _whole(state: dict[str, Any], options: StateDictOptions) -> dict[str, Any]:
    if not options.full_state_dict:
        return state
    if options.cpu_offload:
        return gather_whole(state, Together())
    flat, paths = flatten_state_dict(state)
    whole = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in flat.items()}
    return unflatten_state_dict(whole, paths)


def get_optimizer_state_dict(
    model: Module,
    optimizers: Optimizers,
    *,
    submodules: set[Module] | None = None,
    options: StateDictOptions | None = None,
) -> dict[str, Any]:
    """{"state": {parameter's name: {...}}, "param_groups": [{..., "params": names}]}.

    State that an optimizer does not have yet is given as it would be before its first step, in
    tensors of its own, so that there is something to load into; the optimizer is not changed.
    """
    options, names = _checked(options), _Names(model)
    state: dict[str, Any] = {}
    groups: list[dict[str, Any]] = []
    for optimizer in _listed(optimizers):
        held = completed_state(optimizer)
        for group in optimizer.param_groups:
            kept = [
                p for p in group["params"] if p.requires_grad or not options.ignore_frozen_params
            ]
            groups.append({k: v for k, v in group.items() if k not in ("params", "param_names")})
            groups[-1]["params"] = [names.of_parameter(p) for p in kept]
            state |= {names.of_parameter(p): held[p] for p in kept if held.get(p)}
    if submodules:
        inside = tuple(names.below(submodules))
        state = {name: value for name, value in state.items() if name.startswith(inside)}
        for group in groups:
            group["params"] = [name for name in group["params"] if name.startswith(inside)]
    found = {"state": state, "param_groups": groups}
    return _whole(_flattened(found) if options.flatten_optimizer_state_dict else found, options)


def _listed(optimizers: Optimizers) -> list[Optimizer]:
    return [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)


def _flattened(found: dict[str, Any]) -> dict[str, Any]:
    flat = {
        f"state.{name}.{key}": value
        for name, state in found["state"].items()
        for key, value in state.items()
    }
    for group in found["param_groups"]:
        options = {key: value for key, value in group.items() if key != "params"}
        flat |= {f"param_groups.{n}.{k}": v for n in group["params"] for k, v in options.items()}
    return flat


def get_state_dict(
    model: Module,
    optimizers: Optimizers,
    *,
    submodules: set[Module] | None = None,
    options: StateDictOptions | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`get_model_state_dict` and `get_optimizer_state_dict`."""
    return (
        get_model_state_dict(model, submodules=submodules, options=options),
        get_optimizer_state_dict(model, optimizers, submodules=submodules, options=options),
    )


# --- setting ---------------------------------------------------------------------------------


def _fitting(target: Any, whole: np.ndarray[Any, Any]) -> Tensor:
    """A whole array as a tensor like `target`: this rank's part where that is cut."""
    if isinstance(target, DTensor) and target._spec.shape == whole.shape:
        return target._kin(target._cut(whole, "state dict").copy())  # type: ignore[no-any-return]
    return make(whole)  # type: ignore[no-any-return]


def set_model_state_dict(
    model: Module, model_state_dict: Mapping[str, Any], *, options: StateDictOptions | None = None
) -> _IncompatibleKeys:
    """Copy a state dict by names of the bare model into the model's tensors.

    Whole tensors are cut for parameters that are; a model on the meta device gets its values so.
    RuntimeError lists sizes that do not fit and, if
    strict, names without counterpart; what did fit has been loaded by then, as in torch.
    """
    options, names = _checked(options), _Names(model)
    own = model.state_dict()
    keys = {names.of(key): key for key in own}
    if options.broadcast_from_rank0:

        def part(name: str, whole: Any) -> Tensor:
            return _fitting(own.get(keys.get(name, "")), whole)

        model_state_dict = spread_whole(dict(model_state_dict), Together(), part)
    state = {keys.get(name, name): value for name, value in model_state_dict.items()}
    for key, value in state.items():
        target = own.get(key)
        whole = isinstance(value, Tensor) and not isinstance(value, DTensor)
        if isinstance(target, DTensor) and whole and value.shape == target.shape:
            state[key] = _fitting(target, value._data)
    assign = any(tensor.is_meta for tensor in own.values() if isinstance(tensor, Tensor))
    found = model.load_state_dict(state, strict=False, assign=assign)
    frozen = names.frozen() if options.ignore_frozen_params else set()
    missing = [names.of(key) for key in found.missing_keys if names.of(key) not in frozen]
    result = _IncompatibleKeys(missing, found.unexpected_keys)
    if options.strict and any(result):
        told = [
            f"{title} key(s) in state_dict: " + ", ".join(f'"{n}"' for n in listed)
            for title, listed in zip(("Missing", "Unexpected"), result, strict=True)
            if listed
        ]
        kind = type(model).__name__
        raise RuntimeError(f"Error(s) in loading state_dict for {kind}:\n\t" + "\n\t".join(told))
    return result


def set_optimizer_state_dict(
    model: Module,
    optimizers: Optimizers,
    optim_state_dict: Mapping[str, Any],
    *,
    options: StateDictOptions | None = None,
) -> None:
    """Load optimizers' state and their groups' options, by names of parameters; flat or not.

    RuntimeError when, if strict, a parameter that requires a gradient has no state there but has
    or would have here; when parameters of one group here had different options there.
    """
    options, names = _checked(options), _Names(model)
    if options.broadcast_from_rank0:

        def part(key: str, whole: Any) -> Tensor:
            name = key.removeprefix("state.").rpartition(".")[0]
            return _fitting(names.parameters.get(name), whole)

        optim_state_dict = spread_whole(dict(optim_state_dict), Together(), part)
    for optimizer in _listed(optimizers):
        optimizer.load_state_dict(_numbered(optimizer, names, optim_state_dict, options))


def _numbered(
    optimizer: Optimizer, names: _Names, given: Mapping[str, Any], options: StateDictOptions
) -> dict[str, Any]:
    """The part of `given` that is this optimizer's, as its `load_state_dict` takes it."""
    held, numbers = completed_state(optimizer), itertools.count()
    state: dict[int, Any] = {}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        own = [names.of_parameter(p) for p in group["params"]]
        groups.append(_options_of(own, group, given))
        groups[-1]["params"] = [next(numbers) for _ in own]
        for number, name, parameter in zip(groups[-1]["params"], own, group["params"], strict=True):
            found = _state_of(name, held.get(parameter, {}), given)
            if found:
                state[number] = found
            elif held.get(parameter) and options.strict:
                raise RuntimeError(
                    f"Missing optimizer state for parameter '{name}' in checkpoint. "
                    "The parameter requires gradients but has no saved optimizer state. "
                    "To load anyway, use StateDictOptions(strict=False)."
                )
    return {"state": state, "param_groups": groups}


def _state_of(name: str, held: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    if "state" in given:
        return given["state"].get(name)
    keys = {key: f"state.{name}.{key}" for key in held}
    return {key: given[flat] for key, flat in keys.items() if flat in given}


def _options_of(own: list[str], group: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The saved options of a group; its own where the saved ones do not say."""
    found = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    saved: dict[str, Any] = {}
    for name in own:
        for key, value in _saved_options(name, found, given).items():
            if saved.setdefault(key, value) is not value and not _equal(saved[key], value):
                raise RuntimeError(
                    f"{own[0]} and {name} are in one parameter group here and had different values "
                    f"of {key!r} when they were saved: {saved[key]} and {value}"
                )
    return {**found, **saved}


def _saved_options(
    name: str, found: Mapping[str, Any], given: Mapping[str, Any]
) -> Mapping[str, Any]:
    if "param_groups" not in given:
        keys = {key: f"param_groups.{name}.{key}" for key in found}
        return {key: given[flat] for key, flat in keys.items() if flat in given}
    for group in given["param_groups"]:
        if name in group["params"]:
            return {key: value for key, value in group.items() if key != "params"}
    return {}


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return np.array_equal(one._data, other._data)
    return bool(one == other)


def set_state_dict(
    model: Module,
    optimizers: Optimizers,
    *,
    model_state_dict: Mapping[str, Any],
    optim_state_dict: Mapping[str, Any],
    options: StateDictOptions | None = None,
) -> _IncompatibleKeys:
    """`set_optimizer_state_dict` and `set_model_state_dict`."""
    set_optimizer_state_dict(model, optimizers, optim_state_dict, options=options)
    return set_model_state_dict(model, model_state_dict, options=options)
