"""A module's state as a flat dict of tensors, and back.

Keys are dotted paths, parameters before persistent buffers, parents before children, as in torch,
so that a state_dict of either library fits the other. Loading goes on after a problem and raises
once, with everything that was wrong. Source: torch.nn.Module.state_dict, load_state_dict.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

from dtrain.autograd.grad_mode import no_grad
from dtrain.autograd.handle import RemovableHandle
from dtrain.nn.modules.tree import Tree
from dtrain.nn.parameter import Parameter
from dtrain.tensor import Tensor

EXTRA_STATE = "_extra_state"


class _Keys(NamedTuple):
    missing_keys: list[str]
    unexpected_keys: list[str]


class _IncompatibleKeys(_Keys):
    """What `load_state_dict` found no counterpart for."""

    __slots__ = ()

    def __repr__(self) -> str:
        if not self.missing_keys and not self.unexpected_keys:
            return "<All keys matched successfully>"
        return super().__repr__()

    __str__ = __repr__


class StateDict(Tree):
    """The part of Module that saves and loads state."""

    _version: int = 1  # of the layout of a class's own state; kept in the state_dict's _metadata

    _state_dict_pre_hooks: dict[int, Callable[..., Any]]
    _state_dict_hooks: dict[int, Callable[..., Any]]
    _load_state_dict_pre_hooks: dict[int, Callable[..., Any]]
    _load_state_dict_post_hooks: dict[int, Callable[..., Any]]

    # --- saving ---

    def state_dict(
        self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> Any:
        """{dotted path: tensor} of all parameters and persistent buffers, sharing their memory.

        Tensors are detached unless `keep_vars`. With `destination`, keys are added to that dict.
        Its attribute `_metadata` keeps every module's `_version`.
        """
        if destination is None:
            destination = OrderedDict()
            destination._metadata = OrderedDict()
        local_metadata = {"version": self._version}
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]] = local_metadata
        for hook in self._state_dict_pre_hooks.values():
            hook(self, prefix, keep_vars)
        self._save_to_state_dict(destination, prefix, keep_vars)
        for name, module in self._modules.items():
            if module is not None:
                module.state_dict(
                    destination=destination, prefix=f"{prefix}{name}.", keep_vars=keep_vars
                )
        for hook in self._state_dict_hooks.values():
            if hook(self, destination, prefix, local_metadata) is not None:
                raise RuntimeError("state_dict post-hook must return None")
        return destination

    def _own_state(self) -> Iterator[tuple[str, Any]]:
        buffers = (
            (name, buffer)
            for name, buffer in self._buffers.items()
            if name not in self._non_persistent_buffers_set
        )
        return ((k, v) for k, v in chain(self._parameters.items(), buffers) if v is not None)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Add this module's own state, not its children's; classes may override it."""
        for name, tensor in self._own_state():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()
        if type(self).get_extra_state is not StateDict.get_extra_state:
            destination[prefix + EXTRA_STATE] = self.get_extra_state()

    def get_extra_state(self) -> Any:
        """State beside tensors, for classes that override this and `set_extra_state`."""
        raise RuntimeError(
            "Reached a code path in Module.get_extra_state() that should never be called."
        )

    def set_extra_state(self, state: Any) -> None:
        """Take what `get_extra_state` gave."""
        raise RuntimeError(
            "Reached a code path in Module.set_extra_state() that should never be called."
        )

    # --- loading ---

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """Copy `state_dict` into this module's tensors; returns missing and unexpected keys.

        With `assign` the tensors of the dict take the place of the module's instead of being
        copied. RuntimeError lists every size mismatch and, if `strict`, every key without
        counterpart; what did fit has been loaded by then, as in torch.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"Expected state_dict to be dict-like, got {type(state_dict)}.")
        loader = _Loader(state_dict, assign)
        loader.load(self, OrderedDict(state_dict), "")
        problems = [*(loader.keys_without_counterpart() if strict else ()), *loader.errors]
        if problems:
            raise RuntimeError(
                f"Error(s) in loading state_dict for {type(self).__name__}:\n\t"
                + "\n\t".join(problems)
            )
        return loader.keys

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load this module's own state, not its children's; classes may override it.

        Problems are appended to the three lists.
        """
        for hook in self._load_state_dict_pre_hooks.values():
            hook(
                self, state_dict, prefix, local_metadata, strict,
                missing_keys, unexpected_keys, error_msgs,
            )  # fmt: skip
        own = dict(self._own_state())
        assign = local_metadata.get("assign_to_params_buffers", False)
        for name, tensor in own.items():
            key = prefix + name
            if key in state_dict:
                problem = _take(self, name, tensor, key, state_dict[key], assign)
                error_msgs += [problem] if problem else []
            elif strict:
                missing_keys.append(key)
        extra = prefix + EXTRA_STATE
        if type(self).set_extra_state is not StateDict.set_extra_state:
            if extra in state_dict:
                self.set_extra_state(state_dict[extra])
            elif strict:
                missing_keys.append(extra)
        elif strict and extra in state_dict:
            unexpected_keys.append(extra)
        if strict:
            unexpected_keys += [
                key
                for key in state_dict
                if key.startswith(prefix) and key != extra and not self._expects(key, prefix, own)
            ]

    def _expects(self, key: str, prefix: str, own: dict[str, Any]) -> bool:
        name, *below = key[len(prefix) :].split(".", 1)
        return name in self._modules if below else name in own

    # --- hooks ---

    def register_state_dict_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call `hook(module, prefix, keep_vars)` before the module's state is collected."""
        return _register(self._state_dict_pre_hooks, hook)

    def register_state_dict_post_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call `hook(module, state_dict, prefix, local_metadata)` after it; it returns None."""
        return _register(self._state_dict_hooks, hook)

    def register_load_state_dict_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call `hook(module, state_dict, prefix, local_metadata, strict, missing_keys,
        unexpected_keys, error_msgs)` before the module's own state is loaded.
        """
        return _register(self._load_state_dict_pre_hooks, hook)

    def register_load_state_dict_post_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call `hook(module, incompatible_keys)` when the module and all below are loaded.

        It may change the two lists in place.
        """
        return _register(self._load_state_dict_post_hooks, hook)


def _register(table: dict[int, Any], hook: Callable[..., Any]) -> RemovableHandle:
    handle = RemovableHandle(table)
    table[handle.id] = hook
    return handle


class _Loader:
    """One `load_state_dict` on its way through the tree, and what it met."""

    def __init__(self, state_dict: Any, assign: bool) -> None:
        self.metadata = getattr(state_dict, "_metadata", None) or {}
        self.assign = {"assign_to_params_buffers": True} if assign else {}
        self.keys = _IncompatibleKeys([], [])
        self.errors: list[str] = []

    def load(self, module: Any, state: Any, prefix: str) -> None:
        """Load `module` and all below it from `state`, whose keys start with `prefix`."""
        local_metadata = {**self.metadata.get(prefix[:-1], {}), **self.assign}
        module._load_from_state_dict(
            state, prefix, local_metadata, True, *self.keys, self.errors
        )  # fmt: skip
        for name, child in module._modules.items():
            if child is not None:
                below = f"{prefix}{name}."
                self.load(child, {k: v for k, v in state.items() if k.startswith(below)}, below)
        for hook in module._load_state_dict_post_hooks.values():
            if hook(module, self.keys) is not None:
                raise AssertionError(
                    "Hooks registered with ``register_load_state_dict_post_hook`` are not "
                    "expected to return new values, if incompatible_keys need to be modified, it "
                    "should be done inplace."
                )

    def keys_without_counterpart(self) -> Iterator[str]:
        for title, keys in (("Missing", self.keys[0]), ("Unexpected", self.keys[1])):
            if keys:
                listed = ", ".join(f'"{key}"' for key in keys)
                yield f"{title} key(s) in state_dict: {listed}. "


def _take(module: Tree, name: str, tensor: Any, key: str, given: Any, assign: bool) -> str | None:
    """Load one tensor; the sentence that says why not, or None."""
    if not isinstance(given, Tensor):
        return (
            f'While copying the parameter named "{key}", expected torch.Tensor or Tensor-like '
            f"object from checkpoint but received {type(given)}"
        )
    if tensor.ndim == 0 and given.ndim == 1 and given.shape[0] == 1:
        given = given[0]  # scalars of checkpoints before torch 0.4 are 1-d
    if given.shape != tensor.shape:
        return (
            f"size mismatch for {key}: copying a param with shape {given.shape} from checkpoint, "
            f"the shape in current model is {tensor.shape}."
        )
    try:
        with no_grad():
            if tensor._stays and assign:
                tensor.data = given
            elif not assign:
                if tensor.is_meta and not given.is_meta:
                    _warn_of_no_values(key)
                tensor.copy_(given)
            elif isinstance(tensor, Parameter):
                setattr(module, name, _as_parameter(given, tensor.requires_grad))
            else:
                setattr(module, name, given)
    except Exception as error:
        return (
            f'While copying the parameter named "{key}", whose dimensions in the model are '
            f"{tensor.size()} and whose dimensions in the checkpoint are {given.size()}, an "
            f"exception occurred : {error.args}."
        )
    return None


def _warn_of_no_values(key: str) -> None:
    warnings.warn(
        f"for {key}: copying from a non-meta parameter in the checkpoint to a meta parameter in "
        "the current model, which is a no-op. (Did you mean to pass `assign=True` to assign items "
        "in the state dictionary to their corresponding key in the module instead of copying them "
        "in place?)",
        stacklevel=2,
    )


def _as_parameter(given: Tensor, requires_grad: bool) -> Parameter:
    if isinstance(given, Parameter):
        given.requires_grad_(requires_grad)
        return given
    return Parameter(given, requires_grad)
