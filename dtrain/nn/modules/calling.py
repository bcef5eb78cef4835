"""Calling a module that has hooks, and what a failed call says about where it failed.

Rules: a module without hooks never comes here (`Module.__call__` calls forward at once); global
hooks run before a module's own; hooks run in the order of registration, `prepend` puts one first.
Backward hooks see the gradients of the positional inputs and of the outputs: those pass through an
identity whose backward calls the hooks. Source: torch.nn.Module.__call__.
"""

from __future__ import annotations

import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any

from dtrain.autograd.function import Function
from dtrain.autograd.grad_mode import grad_enabled
from dtrain.autograd.handle import RemovableHandle
from dtrain.nn.modules.tree import Tree
from dtrain.tensor import Tensor

Hooks = OrderedDict[int, Callable[..., Any]]

# Hooks of every module. EVERYWHERE holds all of them: empty means that there is nothing to do.
EVERYWHERE: Hooks = OrderedDict()
FORWARD_PRE: Hooks = OrderedDict()
FORWARD: Hooks = OrderedDict()
BACKWARD_PRE: Hooks = OrderedDict()
BACKWARD: Hooks = OrderedDict()
_WITH_KWARGS: OrderedDict[int, bool] = OrderedDict()
_ALWAYS_CALL: OrderedDict[int, bool] = OrderedDict()


def call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`module.forward` with every hook around it."""
    forward_hooks = (*FORWARD.items(), *module._forward_hooks.items())
    done: set[int] = set()
    try:
        args, kwargs = _before(module, args, kwargs)
        backward = _backward_hooks(module)
        if backward is not None:
            args = backward.watch_inputs(args)
        result = module.forward(*args, **kwargs)
        for key, hook in forward_hooks:
            done.add(key)
            result = _after(module, key, hook, args, kwargs, result)
        return result if backward is None else backward.watch_outputs(result)
    except Exception:
        _run_always_called(module, forward_hooks, done, args, kwargs)
        raise


def _before(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments as the forward-pre hooks leave them."""
    for key, hook in (*FORWARD_PRE.items(), *module._forward_pre_hooks.items()):
        if key in module._forward_pre_hooks_with_kwargs:
            replaced = hook(module, args, kwargs)
            if replaced is not None:
                if not isinstance(replaced, tuple) or len(replaced) != 2:
                    raise RuntimeError(
                        "forward pre-hook must return None or a tuple of (new_args, new_kwargs), "
                        f"but got {replaced}."
                    )
                args, kwargs = replaced
        else:
            replaced = hook(module, args)
            if replaced is not None:
                args = replaced if isinstance(replaced, tuple) else (replaced,)
    return args, kwargs


def _after(
    module: Any, key: int, hook: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> Any:
    """The result as one forward hook leaves it."""
    if key in module._forward_hooks_with_kwargs or key in _WITH_KWARGS:
        replaced = hook(module, args, kwargs, result)
    else:
        replaced = hook(module, args, result)
    return result if replaced is None else replaced


def _run_always_called(
    module: Any, hooks: Any, done: set[int], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Forward hooks with `always_call` that a failure kept from running; result is None."""
    for key, hook in hooks:
        if key not in done and (key in module._forward_hooks_always_called or key in _ALWAYS_CALL):
            try:
                _after(module, key, hook, args, kwargs, None)
            except Exception as error:
                warnings.warn(
                    "module forward hook with ``always_call=True`` raised an exception that was "
                    f"silenced as another error was raised in forward: {error}",
                    stacklevel=2,
                )


# --- registering ---------------------------------------------------------------------------------


class HookRegistration(Tree):
    """The part of Module that registers hooks of calls."""

    _hooked = False  # becomes True with the first hook and stays so
    _forward_pre_hooks: Hooks
    _forward_pre_hooks_with_kwargs: dict[int, bool]
    _forward_hooks: Hooks
    _forward_hooks_with_kwargs: dict[int, bool]
    _forward_hooks_always_called: dict[int, bool]
    _backward_pre_hooks: Hooks
    _backward_hooks: Hooks

    def _add_hook(self, table: Any, hook: Any, prepend: bool, **flags: Any) -> RemovableHandle:
        """Put a hook in its table; `flags` are the tables that list the hooks with an option."""
        handle = RemovableHandle(table, extra_dict=list(flags.values()))
        table[handle.id] = hook
        for listed in flags.values():
            listed[handle.id] = True
        if prepend:
            table.move_to_end(handle.id, last=False)
        self.__dict__["_hooked"] = True
        return handle

    def register_forward_pre_hook(
        self, hook: Callable[..., Any], *, prepend: bool = False, with_kwargs: bool = False
    ) -> RemovableHandle:
        """Call `hook(module, args)` before forward; what it returns replaces `args`.

        `with_kwargs`: `hook(module, args, kwargs)`, returning None or (args, kwargs).
        """
        flags = {"kwargs": self._forward_pre_hooks_with_kwargs} if with_kwargs else {}
        return self._add_hook(self._forward_pre_hooks, hook, prepend, **flags)

    def register_forward_hook(
        self,
        hook: Callable[..., Any],
        *,
        prepend: bool = False,
        with_kwargs: bool = False,
        always_call: bool = False,
    ) -> RemovableHandle:
        """Call `hook(module, args, output)` after forward; what it returns replaces the output.

        `with_kwargs`: `hook(module, args, kwargs, output)`. `always_call`: also (with output None)
        when forward or another hook raised; an error of the hook is then only a warning.
        """
        flags = {"kwargs": self._forward_hooks_with_kwargs} if with_kwargs else {}
        if always_call:
            flags["always"] = self._forward_hooks_always_called
        return self._add_hook(self._forward_hooks, hook, prepend, **flags)

    def register_full_backward_pre_hook(
        self, hook: Callable[..., Any], prepend: bool = False
    ) -> RemovableHandle:
        """Call `hook(module, grad_output)` when the gradients of the outputs are known.

        What it returns replaces `grad_output`, a tuple with None for what is no tensor.
        """
        return self._add_hook(self._backward_pre_hooks, hook, prepend)

    def register_full_backward_hook(
        self, hook: Callable[..., Any], prepend: bool = False
    ) -> RemovableHandle:
        """Call `hook(module, grad_input, grad_output)` when those of the inputs are known.

        What it returns replaces `grad_input`. Only positional inputs are seen. Inputs and outputs
        must not be changed in place (RuntimeError), since they pass through an identity.
        """
        return self._add_hook(self._backward_hooks, hook, prepend)


def _register_everywhere(table: Hooks, hook: Any, *flags: Any) -> RemovableHandle:
    handle = RemovableHandle(table, extra_dict=[EVERYWHERE, *flags])
    table[handle.id] = EVERYWHERE[handle.id] = hook
    for listed in flags:
        listed[handle.id] = True
    return handle


def register_module_forward_pre_hook(hook: Callable[..., Any]) -> RemovableHandle:
    """`Module.register_forward_pre_hook` for every module there is and will be."""
    return _register_everywhere(FORWARD_PRE, hook)


def register_module_forward_hook(
    hook: Callable[..., Any], *, with_kwargs: bool = False, always_call: bool = False
) -> RemovableHandle:
    """`Module.register_forward_hook` for every module there is and will be."""
    flags = [_WITH_KWARGS] * with_kwargs + [_ALWAYS_CALL] * always_call
    return _register_everywhere(FORWARD, hook, *flags)


def register_module_full_backward_pre_hook(hook: Callable[..., Any]) -> RemovableHandle:
    """`Module.register_full_backward_pre_hook` for every module there is and will be."""
    return _register_everywhere(BACKWARD_PRE, hook)


def register_module_full_backward_hook(hook: Callable[..., Any]) -> RemovableHandle:
    """`Module.register_full_backward_hook` for every module there is and will be."""
    return _register_everywhere(BACKWARD, hook)


# --- backward hooks ------------------------------------------------------------------------------


class _Passage(Function):
    """An identity on tensors whose backward hands the gradients to `ctx.seen`."""

    @staticmethod
    def forward(ctx: Any, seen: Any, materialize: bool, *tensors: Any) -> Any:
        ctx.seen = seen
        ctx.set_materialize_grads(materialize)
        return tensors

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, None, *ctx.seen(grads)


class _BackwardHooks:
    """The backward hooks of one call of a module."""

    def __init__(self, module: Any, pre_hooks: list[Any], hooks: list[Any]) -> None:
        self.module, self.pre_hooks, self.hooks = module, pre_hooks, hooks
        self.inputs = 0  # how many positional arguments there are
        self.input_places: list[int] = []  # which of them take part in the graph
        self.outputs = 0
        self.output_places: list[int] = []
        self.grad_outputs: tuple[Any, ...] | None = None

    def watch_inputs(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self.inputs = len(args)
        args, self.input_places = _pass_through(args, self._inputs_known, True)
        return args

    def watch_outputs(self, result: Any) -> Any:
        if not isinstance(result, (Tensor, tuple)):
            warnings.warn(
                "For backward hooks to be called, module output should be a Tensor or a tuple of "
                f"Tensors but received {type(result)}",
                stacklevel=2,
            )
            return result
        outputs = result if isinstance(result, tuple) else (result,)
        watched, self.output_places = _pass_through(outputs, self._outputs_known, False)
        self.outputs = len(outputs)
        return watched if isinstance(result, tuple) else watched[0]

    def _outputs_known(self, grads: tuple[Any, ...]) -> tuple[Any, ...]:
        grad_outputs = _spread(grads, self.output_places, self.outputs)
        for hook in self.pre_hooks:
            grad_outputs = _replaced(hook(self.module, grad_outputs), grad_outputs, "grad_output")
        if self.input_places:
            self.grad_outputs = grad_outputs
        else:
            self._call_without_inputs(grad_outputs)
        return tuple(grad_outputs[i] for i in self.output_places)

    def _call_without_inputs(self, grad_outputs: tuple[Any, ...]) -> None:
        for hook in self.hooks:
            result = hook(self.module, (None,) * self.inputs, grad_outputs)
            if result is not None and any(g is not None for g in result):
                raise RuntimeError(
                    "Backward hook for Modules where no input requires gradient should always "
                    "return None or None for all gradients."
                )

    def _inputs_known(self, grads: tuple[Any, ...]) -> tuple[Any, ...]:
        if self.grad_outputs is None:  # the inputs were reached around the outputs
            return grads
        grad_inputs = _spread(grads, self.input_places, self.inputs)
        for hook in self.hooks:
            result = hook(self.module, grad_inputs, self.grad_outputs)
            grad_inputs = _replaced(result, grad_inputs, "grad_input")
        self.grad_outputs = None
        return tuple(grad_inputs[i] for i in self.input_places)


def _backward_hooks(module: Any) -> _BackwardHooks | None:
    pre = [*BACKWARD_PRE.values(), *module._backward_pre_hooks.values()]
    after = [*BACKWARD.values(), *module._backward_hooks.values()]
    return _BackwardHooks(module, pre, after) if pre or after else None


def _pass_through(
    values: tuple[Any, ...], seen: Any, materialize: bool
) -> tuple[tuple[Any, ...], list[int]]:
    """The values with those that require grad sent through a `_Passage`, and their places.

    `materialize`: what was not used has a gradient of zeros instead of none.
    """
    places = [i for i, v in enumerate(values) if isinstance(v, Tensor) and v._requires_grad]
    if not places or not grad_enabled.get():
        return values, []
    passed = list(values)
    watched = _Passage.apply(seen, materialize, *(values[i] for i in places))
    for i, tensor in zip(places, watched, strict=True):
        # Changing it in place would change what the module has saved: one version for both, and
        # refused as it is for every view among several.
        tensor._share(values[i])
        tensor._one_of_many = "BackwardHookFunction"
        passed[i] = tensor
    return tuple(passed), places


def _spread(grads: Sequence[Any], places: list[int], total: int) -> tuple[Any, ...]:
    by_place = dict(zip(places, grads, strict=True))
    return tuple(by_place.get(i) for i in range(total))


def _replaced(result: Any, before: tuple[Any, ...], what: str) -> tuple[Any, ...]:
    """What a hook made of the gradients."""
    if result is None:
        return before
    result = result if isinstance(result, tuple) else (result,)
    if len(result) != len(before):
        raise RuntimeError(
            f"Backward hook returned an invalid number of {what}, got {len(result)}, but expected "
            f"{len(before)}"
        )
    return result


# --- where a call failed -------------------------------------------------------------------------

_NOTE = "in module "


def note_place(error: Exception, call_code: CodeType) -> None:
    """Note on `error`, once, which module it came from: its path below the outermost one called.

    `call_code` is the code of `Module.__call__`, whose frames on the stack are the modules.
    """
    if any(note.startswith(_NOTE) for note in getattr(error, "__notes__", ())):
        return
    modules: list[Any] = []
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is call_code:
            modules.append(frame.f_locals["self"])
        frame = frame.f_back
    inner, outer = modules[0], modules[-1]
    names = {id(module): name for name, module in reversed(list(outer.named_modules()))}
    path = names.get(id(inner), "")
    where = f"'{path}' of {type(outer).__name__}: " if path else ""
    error.add_note(f"{_NOTE}{where}{type(inner).__name__}({inner.extra_repr()})")
