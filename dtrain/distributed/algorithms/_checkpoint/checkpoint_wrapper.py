"""Modules that compute their activations again in backward: `checkpoint_wrapper`, and
`apply_activation_checkpointing`, which puts wrappers all over a model.

A wrapper is a module around a module, and names go through it: keys of `state_dict` and names of
its parameters are those without it, in saving and loading, and attributes and indices that it has
not are those of the wrapped module.
Source: torch.distributed.algorithms._checkpoint.checkpoint_wrapper.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from enum import Enum, auto
from typing import Any

from dtrain.distributed.fsdp.wrap import chosen_modules, lambda_auto_wrap_policy, replace_modules
from dtrain.nn.modules.module import Module
from dtrain.nn.parameter import Parameter
from dtrain.utils.checkpoint import checkpoint

_CHECKPOINT_WRAPPED_MODULE = "_checkpoint_wrapped_module"
_CHECKPOINT_PREFIX = _CHECKPOINT_WRAPPED_MODULE + "."


class CheckpointImpl(Enum):
    """Accepted; both do the same, which is what NO_REENTRANT does in PyTorch."""

    REENTRANT = auto()
    NO_REENTRANT = auto()


class ActivationWrapper(Module):
    """A module around `mod`, through which names go; a subclass says what a call does."""

    _checkpoint_wrapped_module: Module

    def __init__(self, mod: Module) -> None:
        super().__init__()
        self._checkpoint_wrapped_module = mod
        self.register_state_dict_post_hook(_keys_without_wrapper)
        self.register_load_state_dict_pre_hook(_keys_with_wrapper)
        self.register_load_state_dict_post_hook(_missing_without_wrapper)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == _CHECKPOINT_WRAPPED_MODULE:  # not there yet: the object is being unpickled
                raise
            return getattr(self._checkpoint_wrapped_module, name)

    def __getitem__(self, key: int) -> Any:
        return self._checkpoint_wrapped_module[key]  # type: ignore[index]

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Parameter]]:
        """As without the wrapper. A module above this one sees the wrapper's name, as in torch."""
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield name.replace(_CHECKPOINT_PREFIX, ""), parameter


def _keys_without_wrapper(module: Module, state: Any, prefix: str, metadata: Any) -> None:
    _rename(state, prefix + _CHECKPOINT_PREFIX, prefix)


def _keys_with_wrapper(module: Module, state: Any, prefix: str, *args: Any) -> None:
    _rename(state, prefix, prefix + _CHECKPOINT_PREFIX)


def _rename(state: Any, old: str, new: str) -> None:
    for key in [key for key in state if key.startswith(old)]:
        state[new + key.removeprefix(old)] = state.pop(key)


def _missing_without_wrapper(module: Module, incompatible: Any) -> None:
    for keys in incompatible:
        keys[:] = [key.replace(_CHECKPOINT_PREFIX, "") for key in keys]


class CheckpointWrapper(ActivationWrapper):
    """Calls `mod` by `checkpoint_fn` (default `torch.utils.checkpoint.checkpoint`).

    checkpoint_impl         accepted: see CheckpointImpl.
    checkpoint_fn_kwargs    passed to `checkpoint_fn` at every call: context_fn, debug ...
    """

    def __init__(
        self, mod: Module, checkpoint_impl: CheckpointImpl = CheckpointImpl.NO_REENTRANT,
        checkpoint_fn: Callable[..., Any] | None = None, **checkpoint_fn_kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(mod)
        self.checkpoint_impl = checkpoint_impl
        if checkpoint_fn is None:
            checkpoint_fn = checkpoint
            checkpoint_fn_kwargs["use_reentrant"] = checkpoint_impl is CheckpointImpl.REENTRANT
        self.checkpoint_fn = functools.partial(checkpoint_fn, **checkpoint_fn_kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.checkpoint_fn(self._checkpoint_wrapped_module, *args, **kwargs)


class OffloadWrapper(ActivationWrapper):
    """Accepted, and calls `mod`: activations are in the CPU's memory, where it would move them."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._checkpoint_wrapped_module(*args, **kwargs)


def offload_wrapper(module: Module) -> Module:
    """`module` in an OffloadWrapper: names stay, and nothing else changes."""
    return OffloadWrapper(module)


def checkpoint_wrapper(
    module: Module, checkpoint_impl: CheckpointImpl = CheckpointImpl.NO_REENTRANT,
    checkpoint_fn: Callable[..., Any] | None = None, **checkpoint_fn_kwargs: Any,
) -> Module:  # fmt: skip
    """`module` in a CheckpointWrapper: the same results and `state_dict`, and its activations are
    computed again in backward.
    """
    return CheckpointWrapper(module, checkpoint_impl, checkpoint_fn, **checkpoint_fn_kwargs)


def apply_activation_checkpointing(
    model: Module,
    checkpoint_wrapper_fn: Callable[..., Module] = checkpoint_wrapper,
    check_fn: Callable[[Module], bool] = lambda _: True,
    auto_wrap_policy: Callable[..., bool] | None = None,
) -> None:
    """Wrap modules below `model` in place, never `model` itself.

    Which: those that `auto_wrap_policy` (dtrain.distributed.fsdp.wrap) takes if it is given, else
    those for which `check_fn(module)` is true. A module that stands at several places gets one
    wrapper. A module inside of a taken one may be taken as well.
    """
    policy = auto_wrap_policy or functools.partial(lambda_auto_wrap_policy, lambda_fn=check_fn)
    chosen = chosen_modules(model, policy)
    chosen.pop(model, None)
    replace_modules(model, chosen, checkpoint_wrapper_fn)
