"""Class Optimizer: parameter groups, their options and state, saving and loading, hooks.

Rules: state_dicts have torch's format, so that PyTorch's can be loaded here and ours there; a
subclass's `step` is wrapped once, when the class is made, so that step hooks always run.
Source: torch.optim.Optimizer.
"""

from __future__ import annotations

import functools
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from copy import deepcopy
from itertools import chain
from typing import Any

from dtrain.autograd.grad_mode import enable_grad
from dtrain.autograd.handle import HookTable, RemovableHandle
from dtrain.autograd.node import make
from dtrain.tensor import Tensor

Group = dict[str, Any]
StateDict = dict[str, Any]


# Hooks of the steps of all optimizers: before their own pre-hooks, behind their own post-hooks.
_STEP_PRE_HOOKS, _STEP_POST_HOOKS = HookTable(), HookTable()


class _Required:
    """Marks an option in `defaults` that every group has to give."""

    def __repr__(self) -> str:
        return "<required parameter>"


required = _Required()


class Optimizer:
    """Base of all optimizers: a subclass gives `step`.

    `params`: Tensors, (name, Tensor) pairs, or dicts with "params" and options of their own.
    `defaults`: the options of groups that do not say. Attributes: `param_groups`, `defaults` and
    `state`, {Tensor: dict}.
    """

    kept_as_saved: tuple[str, ...] = ("step",)  # loaded state that is not of the parameter's dtype
    _opt_called = False  # whether a step was made; schedules warn of one before it

    _optimizer_step_pre_hooks: HookTable
    _optimizer_step_post_hooks: HookTable
    _optimizer_state_dict_pre_hooks: HookTable
    _optimizer_state_dict_post_hooks: HookTable
    _optimizer_load_state_dict_pre_hooks: HookTable
    _optimizer_load_state_dict_post_hooks: HookTable

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "step" in cls.__dict__:
            cls.step = _with_hooks(cls.__dict__["step"])  # type: ignore[method-assign]

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        if isinstance(params, Tensor):
            raise TypeError(
                "params argument given to the optimizer should be an iterable of Tensors or "
                "dicts, but got a Tensor"
            )
        self.defaults = defaults
        self.state: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
        self.param_groups: list[Group] = []
        self._make_hook_tables()
        groups = list(params)
        if not groups:
            raise ValueError("optimizer got an empty parameter list")
        if not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        for group in groups:
            self.add_param_group(group)

    def _make_hook_tables(self) -> None:
        self._stepping = False
        for what in ("step", "state_dict", "load_state_dict"):
            for when in ("pre", "post"):
                setattr(self, f"_optimizer_{what}_{when}_hooks", HookTable())

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Change the parameters by their gradients; returns what `closure()` did, if given."""
        raise NotImplementedError(f"{type(self).__name__} does not define step")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of all parameters, or fill them with zeros in place."""
        for param in chain.from_iterable(group["params"] for group in self.param_groups):
            grad = param._grad
            if set_to_none:
                param._grad = None
            elif grad is not None:
                if grad._node is not None:  # from backward(create_graph=True)
                    grad.detach_()
                grad.requires_grad_(False)
                grad.zero_()

    # --- groups ---

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters with options of their own; the rest comes from `defaults`.

        TypeError for what is no Tensor, ValueError for a parameter of another group, a missing
        required option, or names given for some only.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        params = _split_names(param_group)
        for param in params:
            _check_param(param)
        for name, default in self.defaults.items():
            if default is required and name not in param_group:
                raise ValueError(
                    f"parameter group didn't specify a value of required optimization parameter "
                    f"{name}"
                )
            param_group.setdefault(name, default)
        if len(params) != len(set(params)):
            warnings.warn(
                "optimizer contains a parameter group with duplicate parameters; in future, this "
                "will cause an error",
                stacklevel=3,
            )
        self._check_against_groups(param_group)
        self.param_groups.append(param_group)

    def _check_against_groups(self, new: Group) -> None:
        named = "param_names" in new
        for group in self.param_groups:
            if ("param_names" in group) != named:
                raise ValueError(
                    "all optimizer param groups should be with/without names. cannot add param "
                    f"group {'with' if named else 'without'} names to the optimizer"
                )
        if not _all_params(self.param_groups).isdisjoint(new["params"]):
            raise ValueError("some parameters appear in more than one parameter group")

    # --- saving and loading ---

    def state_dict(self) -> StateDict:
        """{"state": {id: dict}, "param_groups": [options with ids for parameters]}.

        Parameters are numbered in the order of the groups. Tensors are the state's own, not
        copies.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        numbers: dict[int, int] = {}
        groups, start = [], 0
        for group in self.param_groups:
            for number, param in enumerate(group["params"], start):
                numbers.setdefault(id(param), number)
            packed = {key: value for key, value in group.items() if key != "params"}
            groups.append({**packed, "params": [numbers[id(p)] for p in group["params"]]})
            start += len(group["params"])
        state = {
            (numbers[id(key)] if isinstance(key, Tensor) else key): value
            for key, value in self.state.items()
        }
        found = {"state": state, "param_groups": groups}
        for hook in self._optimizer_state_dict_post_hooks.values():
            result = hook(self, found)
            found = found if result is None else result
        return found

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Take over groups' options and state from a `state_dict()`, by the order of parameters.

        Tensors are copied, in the dtype of their parameter except `step`. ValueError when the
        number of groups or of parameters in one is another. Nothing is changed on an error.
        """
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = hook(self, state_dict)
            state_dict = state_dict if result is None else result
        saved = [_without_params(group) for group in state_dict["param_groups"]]
        params = self._params_by_id(state_dict["param_groups"])
        state: defaultdict[Any, Any] = defaultdict(dict)
        for key, value in state_dict["state"].items():
            param = params.get(key)
            state[key if param is None else param] = _taken_over(value, param, self.kept_as_saved)
        for group, new in zip(self.param_groups, saved, strict=True):
            new["params"] = group["params"]
            if "param_names" in group:
                new.setdefault("param_names", group["param_names"])
        self.__setstate__({"state": state, "param_groups": saved})
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _params_by_id(self, saved: list[Group]) -> dict[int, Tensor]:
        ours = self.param_groups
        if len(ours) != len(saved):
            raise ValueError(
                "loaded state dict has a different number of parameter groups: expected "
                f"{len(ours)}, got {len(saved)}"
            )
        for index, (group, new) in enumerate(zip(ours, saved, strict=True)):
            if len(group["params"]) != len(new["params"]):
                raise ValueError(
                    "loaded state dict contains a parameter group that doesn't match the size of "
                    f"optimizer's group: group {index} has {len(group['params'])} parameters, the "
                    f"loaded one {len(new['params'])}"
                )
        ids = chain.from_iterable(group["params"] for group in saved)
        return dict(zip(ids, chain.from_iterable(g["params"] for g in ours), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        return {
            "defaults": self.defaults,
            "state": self.state,
            "param_groups": self.param_groups,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "_stepping" not in self.__dict__:
            self._make_hook_tables()  # a copy or an unpickled optimizer starts without hooks

    # --- hooks ---

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call `hook(optimizer, args, kwargs)` before each step; it may return new ones."""
        return self._add_hook("step_pre", hook)

    def register_step_post_hook(self, hook: Callable[..., None]) -> RemovableHandle:
        """Call `hook(optimizer, args, kwargs)` after each step."""
        return self._add_hook("step_post", hook)

    def register_state_dict_pre_hook(
        self, hook: Callable[..., None], prepend: bool = False
    ) -> RemovableHandle:
        """Call `hook(optimizer)` before `state_dict()` reads the state."""
        return self._add_hook("state_dict_pre", hook, prepend)

    def register_state_dict_post_hook(
        self, hook: Callable[..., Any], prepend: bool = False
    ) -> RemovableHandle:
        """Call `hook(optimizer, state_dict)` after; what it returns, if anything, is used."""
        return self._add_hook("state_dict_post", hook, prepend)

    def register_load_state_dict_pre_hook(
        self, hook: Callable[..., Any], prepend: bool = False
    ) -> RemovableHandle:
        """Call `hook(optimizer, state_dict)` before loading; it may return another dict."""
        return self._add_hook("load_state_dict_pre", hook, prepend)

    def register_load_state_dict_post_hook(
        self, hook: Callable[..., None], prepend: bool = False
    ) -> RemovableHandle:
        """Call `hook(optimizer)` after loading."""
        return self._add_hook("load_state_dict_post", hook, prepend)

    def _add_hook(
        self, kind: str, hook: Callable[..., Any], prepend: bool = False
    ) -> RemovableHandle:
        table: HookTable = getattr(self, f"_optimizer_{kind}_hooks")
        later = dict(table) if prepend else {}
        if prepend:
            table.clear()
        handle = table.add(hook)
        table.update(later)
        return handle

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for index, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {index}")
            lines += [f"    {key}: {group[key]}" for key in sorted(group) if key != "params"]
        return "\n".join([*lines, ")"])


def register_optimizer_step_pre_hook(hook: Callable[..., Any]) -> RemovableHandle:
    """Call `hook(optimizer, args, kwargs)` before each step of every optimizer; it may return new
    ones. Source: torch.optim.optimizer.
    """
    return _STEP_PRE_HOOKS.add(hook)


def register_optimizer_step_post_hook(hook: Callable[..., None]) -> RemovableHandle:
    """Call `hook(optimizer, args, kwargs)` after each step of every optimizer."""
    return _STEP_POST_HOOKS.add(hook)


def evaluate(closure: Callable[[], Any] | None) -> Any:
    """What `closure()` returns, with gradients recorded; None without a closure."""
    if closure is None:
        return None
    with enable_grad():
        return closure()


def number(value: Any) -> float:
    """A hyperparameter as a float; tensors with one element are read."""
    return float(value.item() if isinstance(value, Tensor) else value)


def _with_hooks(step: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(step)
    def hooked(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if self._stepping:  # `super().step()`: the hooks have run
            return step(self, *args, **kwargs)
        for hook in (*_STEP_PRE_HOOKS.values(), *self._optimizer_step_pre_hooks.values()):
            result = hook(self, args, kwargs)
            if result is not None:
                if not (isinstance(result, tuple) and len(result) == 2):
                    raise RuntimeError(
                        f"{hook} must return None or a tuple of (new_args, new_kwargs), but got "
                        f"{result}."
                    )
                args, kwargs = result
        self._stepping = self._opt_called = True
        try:
            out = step(self, *args, **kwargs)
        finally:
            self._stepping = False
        for hook in (*self._optimizer_step_post_hooks.values(), *_STEP_POST_HOOKS.values()):
            hook(self, args, kwargs)
        return out

    return hooked


def _split_names(group: Group) -> list[Any]:
    """Bring "params" into a list of Tensors, with the names, if any, in "param_names"."""
    params = group["params"]
    if isinstance(params, set):
        raise TypeError(
            "optimizer parameters need to be organized in ordered collections, but the ordering "
            "of tensors in sets will change between runs. Please use a list instead."
        )
    given = [params] if isinstance(params, Tensor) else list(params)
    names = [entry[0] for entry in given if isinstance(entry, tuple)]
    if names:
        if len(names) != len(given):
            raise ValueError(
                "all optimizer params should be with/without names. Some param names are missing"
            )
        group["param_names"] = names
        given = [entry[1] for entry in given]
    group["params"] = given
    return given


def _check_param(param: Any) -> None:
    if not isinstance(param, Tensor):
        raise TypeError(
            f"optimizer can only optimize Tensors, but one of the params is {type(param).__name__}"
        )
    if not (param.is_leaf or getattr(param, "retains_grad", False)):
        raise ValueError("can't optimize a non-leaf Tensor")


def _all_params(groups: list[Group]) -> set[Any]:
    return set(chain.from_iterable(group["params"] for group in groups))


def _without_params(group: Group) -> Group:
    return {key: deepcopy(value) for key, value in group.items() if key != "params"}


def _taken_over(value: Any, param: Tensor | None, kept: tuple[str, ...], key: str = "") -> Any:
    """A copy of loaded state for `param`, tensors in its dtype unless named in `kept`."""
    if isinstance(value, Tensor):
        keep = param is None or key in kept or not param.is_floating_point()
        dtype = value._data.dtype if keep or param is None else param._data.dtype
        return make(value._data.astype(dtype)) if param is None else param._adopt(value, dtype)
    if isinstance(value, dict):
        return {name: _taken_over(entry, param, kept, name) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_taken_over(entry, param, kept) for entry in value)
    return deepcopy(value)
