"""Module: the base class of everything with parameters.

It is put together from tree.py (what a module owns), state.py (saving and loading), calling.py
(hooks) and what is here: calling, moving between dtypes, modes, gradients and printing.
Source: torch.nn.modules.module.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import chain
from typing import Any, TypeVar

from dtrain import dtypes
from dtrain.autograd.grad_mode import no_grad
from dtrain.nn.modules import calling
from dtrain.nn.modules.calling import (
    register_module_forward_hook as register_module_forward_hook,
    register_module_forward_pre_hook as register_module_forward_pre_hook,
    register_module_full_backward_hook as register_module_full_backward_hook,
    register_module_full_backward_pre_hook as register_module_full_backward_pre_hook,
)
from dtrain.nn.modules.state import StateDict
from dtrain.ops.create import empty_like
from dtrain.tensor import Tensor, parse_to

M = TypeVar("M", bound="Module")

_HOOK_TABLES = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_backward_pre_hooks", "_backward_hooks"),
    *("_state_dict_pre_hooks", "_state_dict_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)


class Module(StateDict, calling.HookRegistration):
    """Base class of all neural network modules: subclass it, assign parameters and modules as
    attributes after `super().__init__()`, and write `forward`. Source: torch.nn.Module.
    """

    training: bool

    def __init__(self) -> None:
        fields = self.__dict__
        fields["training"] = True
        fields["_parameters"] = {}
        fields["_buffers"] = {}
        fields["_modules"] = {}
        fields["_non_persistent_buffers_set"] = set()
        for table in _HOOK_TABLES:
            fields[table] = OrderedDict()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What a call computes: every subclass writes it. Call the module, not this."""
        raise NotImplementedError(
            f'Module [{type(self).__name__}] is missing the required "forward" function'
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            if self._hooked or calling.EVERYWHERE:
                return calling.call(self, args, kwargs)
            return self.forward(*args, **kwargs)
        except Exception as error:
            calling.note_place(error, Module.__call__.__code__)
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for table in _HOOK_TABLES:
            self.__dict__.setdefault(table, OrderedDict())
        self.__dict__.setdefault("_non_persistent_buffers_set", set())
        self.__dict__["_hooked"] = any(self.__dict__[table] for table in _HOOK_TABLES)

    # --- over the tree ---

    def apply(self: M, fn: Callable[[Module], Any]) -> M:
        """Call `fn` on every module below and then on this one; returns self."""
        for module in self.children():
            module.apply(fn)
        fn(self)
        return self

    def _apply(self: M, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> M:
        """Replace the memory of every parameter, gradient and buffer by what `fn` makes of it.

        Parameters stay the same objects, so that optimizers keep them.
        """
        if recurse:
            for module in self.children():
                module._apply(fn)
        with no_grad():
            for parameter in self._parameters.values():
                if parameter is not None:
                    parameter.data = fn(parameter)
                    if parameter.grad is not None:
                        parameter.grad.data = fn(parameter.grad)
            for name, buffer in self._buffers.items():
                if buffer is not None:
                    self._buffers[name] = fn(buffer)
        return self

    def _to_dtype(self: M, dtype: dtypes.dtype) -> M:
        return self._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)

    def to(self: M, *args: Any, **kwargs: Any) -> M:
        """Cast floating parameters and buffers: `to(dtype)`, `to(device)`, `to(tensor)`.

        On the meta device they lose their values. `non_blocking` and `memory_format` change
        nothing. TypeError for an integer dtype; NotImplementedError for what is on the meta device
        and shall leave it.
        """
        dtype, _, place = parse_to(args, kwargs)
        if place is not None and place.type == "meta":
            self._apply(lambda t: t.to(place))
        elif place is not None:
            self._need_values()
        if dtype is None:
            return self
        if not (dtype.is_floating_point or dtype.is_complex):
            raise TypeError(
                "nn.Module.to only accepts floating point or complex dtypes, but got desired "
                f"dtype={dtype}"
            )
        return self._apply(lambda t: t.to(dtype) if t.is_floating_point() or t.is_complex() else t)

    def type(self: M, dst_type: dtypes.dtype) -> M:
        """Cast all parameters and buffers, integers too."""
        return self._apply(lambda t: t.type(dst_type))

    def float(self: M) -> M:
        """Cast floating parameters and buffers to float32."""
        return self._to_dtype(dtypes.float32)

    def double(self: M) -> M:
        """Cast floating parameters and buffers to float64."""
        return self._to_dtype(dtypes.float64)

    def half(self: M) -> M:
        """Cast floating parameters and buffers to float16."""
        return self._to_dtype(dtypes.float16)

    def bfloat16(self: M) -> M:
        """Cast floating parameters and buffers to bfloat16."""
        return self._to_dtype(dtypes.bfloat16)

    def cpu(self: M) -> M:
        """The module itself. NotImplementedError for what is on the meta device."""
        self._need_values()
        return self

    def _need_values(self) -> None:
        for name, tensor in chain(self.named_parameters(), self.named_buffers()):
            if tensor.is_meta:
                raise NotImplementedError(
                    "Cannot copy out of meta tensor; no data! Please use torch.nn.Module.to_empty()"
                    " instead of torch.nn.Module.to() when moving module from meta to a different "
                    f"device. ('{name}' of {type(self).__name__} has no values)"
                )

    def cuda(self: M, device: Any = None) -> M:
        """Raises as a build of torch without CUDA does."""
        return self._apply(lambda t: t.cuda(device))

    def to_empty(self: M, *, device: Any, recurse: bool = True) -> M:
        """Give every parameter and buffer new memory with arbitrary contents; those on the meta
        device get values then, and tensors that stand in several places stay one.
        """
        return self._apply(lambda t: empty_like(t, device=device), recurse)

    def train(self: M, mode: bool = True) -> M:
        """Set `training` here and below; dropout and batch norm depend on it."""
        if not isinstance(mode, bool):
            raise ValueError("training mode is expected to be boolean")
        self.training = mode
        for module in self.children():
            module.train(mode)
        return self

    def eval(self: M) -> M:
        """`train(False)`."""
        return self.train(False)

    def requires_grad_(self: M, requires_grad: bool = True) -> M:
        """Set `requires_grad` of every parameter: False freezes the module."""
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad)
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of all parameters, or fill them with zeros."""
        for parameter in self.parameters():
            if parameter.grad is None:
                continue
            if set_to_none:
                parameter.grad = None
            else:
                parameter.grad.detach_() if parameter.grad.grad_fn else None
                parameter.grad.requires_grad_(False)
                parameter.grad.zero_()

    # --- printing ---

    def _get_name(self) -> str:
        return type(self).__name__

    def extra_repr(self) -> str:
        """What `repr` prints beside the children; classes override it."""
        return ""

    def __repr__(self) -> str:
        extra = self.extra_repr()
        lines = extra.split("\n") if extra else []
        children = [
            f"({name}): " + repr(module).replace("\n", "\n  ")
            for name, module in self._modules.items()
        ]
        if len(lines) == 1 and not children:
            body = extra
        elif lines or children:
            body = "\n  " + "\n  ".join(lines + children) + "\n"
        else:
            body = ""
        return f"{self._get_name()}({body})"
