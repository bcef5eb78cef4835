"""Wrap policies: which modules of a tree are to be wrapped, or become units, of their own.

Rules: 1. Functions of the module tree alone: no communication, no wrapper known here.
2. A policy is a function `(module, recurse, nonwrapped_numel) -> bool`, asked with recurse=True
whether to look below the module and then with recurse=False whether to take it, or a `_Policy`,
which looks at the whole tree. `chosen_modules` runs either, `replace_modules` puts the wrappers in.
3. A module that stands at several places is chosen once and replaced at all of them.
Source: torch.distributed.fsdp.wrap.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from dtrain.nn.modules.container import ModuleDict, ModuleList
from dtrain.nn.modules.module import Module
from dtrain.nn.parameter import Parameter

__all__ = [
    "CustomPolicy",
    "ModuleWrapPolicy",
    "always_wrap_policy",
    "enable_wrap",
    "lambda_auto_wrap_policy",
    "size_based_auto_wrap_policy",
    "transformer_auto_wrap_policy",
    "wrap",
]

Modules = Collection[Module]
Kwargs = dict[str, Any]


# --- policies that look at one module ---


def always_wrap_policy(*args: Any, **kwargs: Any) -> bool:
    """Take every module."""
    return True


def _module_wrap_policy(
    module: Module, recurse: bool, nonwrapped_numel: int, module_classes: Iterable[type[Module]]
) -> bool:
    """Take the instances of `module_classes`."""
    return recurse or isinstance(module, tuple(module_classes))


def transformer_auto_wrap_policy(
    module: Module, recurse: bool, nonwrapped_numel: int,
    transformer_layer_cls: Iterable[type[Module]],
) -> bool:  # fmt: skip
    """Take the instances of `transformer_layer_cls`: give it with functools.partial."""
    return _module_wrap_policy(module, recurse, nonwrapped_numel, transformer_layer_cls)


def _wrap_module_cls_individually(
    module: Module, module_classes: Iterable[type[Module]], recurse: bool, *args: Any, **kwargs: Any
) -> bool:
    """Take the instances of `module_classes`."""
    return _module_wrap_policy(module, recurse, -1, module_classes)


def lambda_auto_wrap_policy(
    module: Module, recurse: bool, nonwrapped_numel: int, lambda_fn: Callable[[Module], bool]
) -> bool:
    """Take the modules for which `lambda_fn(module)` is true."""
    return recurse or lambda_fn(module)


def _or_policy(
    module: Module, recurse: bool, nonwrapped_numel: int, policies: Iterable[Callable[..., bool]]
) -> bool:
    """Take what any of `policies` takes."""
    return any(
        policy(module=module, recurse=recurse, nonwrapped_numel=nonwrapped_numel)
        for policy in policies
    )


def size_based_auto_wrap_policy(
    module: Module, recurse: bool, nonwrapped_numel: int, min_num_params: int = int(1e8),
    force_leaf_modules: Iterable[type[Module]] | None = None,
    exclude_wrap_modules: Iterable[type[Module]] | None = None,
) -> bool:  # fmt: skip
    """Take a module when at least `min_num_params` elements of parameters in or below it are not
    taken by a module below it.

    force_leaf_modules      classes neither looked into nor taken (default: none; in PyTorch
                            MultiheadAttention, which dtrain has not).
    exclude_wrap_modules    classes never taken (default: ModuleList and ModuleDict, which are
                            not called).
    """
    if nonwrapped_numel < min_num_params:
        return False
    if recurse:
        refused = size_based_auto_wrap_policy.FORCE_LEAF_MODULES  # type: ignore[attr-defined]
        given = force_leaf_modules
    else:
        refused = size_based_auto_wrap_policy.EXCLUDE_WRAP_MODULES  # type: ignore[attr-defined]
        given = exclude_wrap_modules
    return not isinstance(module, tuple(refused if given is None else given))


# Programs take these sets, add to them and pass them on.
size_based_auto_wrap_policy.FORCE_LEAF_MODULES = set()  # type: ignore[attr-defined]
size_based_auto_wrap_policy.EXCLUDE_WRAP_MODULES = {  # type: ignore[attr-defined]
    ModuleList,
    ModuleDict,
}


# --- policies that look at the whole tree ---


class _Policy:
    """A policy that says for a whole tree which modules are taken, and with which arguments."""

    def _run_policy(
        self, root_module: Module, ignored_modules: Modules, root_kwargs: Kwargs
    ) -> dict[Module, Kwargs]:
        """{module: arguments of its wrapper}."""
        raise NotImplementedError


class ModuleWrapPolicy(_Policy):
    """Take the instances of `module_classes`; also a policy for one module."""

    def __init__(self, module_classes: Iterable[type[Module]]) -> None:
        self._module_classes = set(module_classes)

    def _run_policy(
        self, root_module: Module, ignored_modules: Modules, root_kwargs: Kwargs
    ) -> dict[Module, Kwargs]:
        classes = tuple(self._module_classes)
        return {
            module: dict(root_kwargs)
            for module in root_module.modules()
            if module not in ignored_modules and isinstance(module, classes)
        }

    def __call__(self, module: Module, recurse: bool, *args: Any, **kwargs: Any) -> bool:
        return _module_wrap_policy(module, recurse, -1, self._module_classes)

    def __repr__(self) -> str:
        names = ", ".join(sorted(kind.__name__ for kind in self._module_classes))
        return f"{type(self).__name__}({{{names}}})"


class CustomPolicy(_Policy):
    """Ask `lambda_fn(module)`: False or {} leaves the module, True takes it, and so does a dict,
    whose entries go before those of the root's arguments.
    """

    def __init__(self, lambda_fn: Callable[[Module], bool | Kwargs]) -> None:
        self._lambda_fn = lambda_fn

    def _run_policy(
        self, root_module: Module, ignored_modules: Modules, root_kwargs: Kwargs
    ) -> dict[Module, Kwargs]:
        taken: dict[Module, Kwargs] = {}
        for module in root_module.modules():
            if module in ignored_modules:
                continue
            answer = self._lambda_fn(module)
            if not isinstance(answer, bool | dict):
                raise ValueError(
                    "The lambda_fn passed to CustomPolicy should return False/True or a kwarg "
                    f"dict, but it returned {answer}"
                )
            if answer:
                taken[module] = {**root_kwargs, **(answer if isinstance(answer, dict) else {})}
        return taken


# --- running a policy ---


def chosen_modules(
    root: Module,
    policy: _Policy | Callable[..., bool],
    *,
    ignored_modules: Modules = (),
    ignored_params: Iterable[Parameter] = (),
    root_kwargs: Mapping[str, Any] | None = None,
) -> dict[Module, Kwargs]:
    """{module: arguments of its wrapper} of what `policy` takes in `root`, itself included.

    Each module comes after all below it, so that wrapping in this order finds wrapped children.
    Ignored modules are not taken and not looked into; ignored parameters do not count.
    """
    kwargs = dict(root_kwargs or {})
    if isinstance(policy, _Policy):
        taken = policy._run_policy(root, ignored_modules, kwargs)
    else:
        walk = _Walk(policy, ignored_modules, ignored_params)
        walk.visit(root)
        taken = {module: dict(kwargs) for module in walk.taken}
    return {module: taken[module] for module in _children_first(root) if module in taken}


class _Walk:
    """Asks a policy for one module about a tree; `taken` maps what it took to elements taken."""

    def __init__(
        self, policy: Callable[..., bool], ignored_modules: Modules,
        ignored_params: Iterable[Parameter],
    ) -> None:  # fmt: skip
        self._policy, self._ignored = policy, ignored_modules
        self._uncounted = {id(param) for param in ignored_params}
        self._seen: dict[Module, int] = {}
        self.taken: list[Module] = []

    def visit(self, module: Module) -> int:
        """How many elements of parameters are taken in or below `module`."""
        if module not in self._seen:
            self._seen[module] = self._visit(module)
        return self._seen[module]

    def _visit(self, module: Module) -> int:
        total = sum(p.numel() for p in module.parameters() if id(p) not in self._uncounted)
        if not self._policy(module=module, recurse=True, nonwrapped_numel=total):
            return 0
        below = sum(self.visit(m) for m in module.children() if m not in self._ignored)
        if not self._policy(module=module, recurse=False, nonwrapped_numel=total - below):
            return below
        self.taken.append(module)
        return total


def _children_first(root: Module) -> Iterator[Module]:
    seen: set[Module] = set()

    def visit(module: Module) -> Iterator[Module]:
        seen.add(module)
        for child in module.children():
            if child not in seen:
                yield from visit(child)
        yield module

    return visit(root)


def replace_modules(
    root: Module, chosen: Mapping[Module, Kwargs], wrapper: Callable[..., Module]
) -> Module:
    """Put `wrapper(module, **arguments)` wherever a chosen module stands below `root`.

    Returns what stands for `root`: its wrapper if it is chosen, else `root`.
    """
    places: dict[Module, list[tuple[Module, str]]] = {}
    for parent in root.modules():
        for name, child in parent._modules.items():
            if child is not None:
                places.setdefault(child, []).append((parent, name))
    for module, kwargs in chosen.items():
        made = wrapper(module, **kwargs)
        for parent, name in places.get(module, ()):
            setattr(parent, name, made)
        if module is root:
            return made
    return root


# --- wrapping where a model is written ---

_wrapping: ContextVar[tuple[Callable[..., Module], Kwargs] | None] = ContextVar(
    "dtrain_enable_wrap", default=None
)


@contextlib.contextmanager
def enable_wrap(*, wrapper_cls: Callable[..., Module], **wrapper_kwargs: Any) -> Iterator[None]:
    """A block in which `wrap(module)` is `wrapper_cls(module, **wrapper_kwargs)`.

    Blocks may be nested: the innermost counts.
    """
    token = _wrapping.set((wrapper_cls, wrapper_kwargs))
    try:
        yield
    finally:
        _wrapping.reset(token)


def wrap(module: Module, **wrap_overrides: Any) -> Module:
    """`module` wrapped as the `enable_wrap` block around says; outside of one, `module` itself."""
    around = _wrapping.get()
    if around is None:
        return module
    wrapper_cls, kwargs = around
    return wrapper_cls(module, **{**kwargs, **wrap_overrides})
