"""What a module owns and how it is found: parameters, buffers and child modules by name.

Rules: the three live in `_parameters`, `_buffers` and `_modules`, never in the instance's
`__dict__`; assignment sorts a value into its table; a name is in one table only. Iteration is in
the order of registration, depth first. Source: torch.nn.Module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from dtrain.missing import missing_attribute
from dtrain.nn.parameter import Buffer, Parameter
from dtrain.tensor import Tensor

if TYPE_CHECKING:
    from dtrain.nn.modules.module import Module

TABLES = ("_parameters", "_buffers", "_modules")


def type_name(value: Any) -> str:
    """The type of `value` as error sentences name it. Source: torch.typename."""
    if isinstance(value, Tensor):
        return value.type()
    kind = value if isinstance(value, type) else type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else (
        f"{kind.__module__}.{kind.__qualname__}"
    )  # fmt: skip


def check_name(owner: Any, table: str, kind: str, name: Any) -> None:
    """Refuse a name that cannot be registered in `table`."""
    if table not in owner.__dict__:
        raise AttributeError(f"cannot assign {kind} before Module.__init__() call")
    if not isinstance(name, str):
        raise TypeError(f"{kind} name should be a string. Got {type_name(name)}")
    if hasattr(owner, name) and name not in owner.__dict__[table]:
        raise KeyError(f"attribute '{name}' already exists")
    if "." in name:
        got = f", got: {name}" if kind == "module" else ""
        raise KeyError(f'{kind} name can\'t contain "."{got}')
    if name == "":
        raise KeyError(f'{kind} name can\'t be empty string ""')


class Tree:
    """The part of Module that owns attributes and walks the tree. Only Module derives from it."""

    __dict__: dict[str, Any]
    _parameters: dict[str, Parameter | None]
    _buffers: dict[str, Tensor | None]
    _modules: dict[str, Module | None]
    _non_persistent_buffers_set: set[str]

    # --- registering ---

    def register_parameter(self, name: str, param: Parameter | None) -> None:
        """Add a parameter under `name`; None reserves the name for "there is none".

        Errors as in torch: KeyError for a name that is taken, empty or dotted; TypeError for
        anything but a Parameter; ValueError for one that was computed.
        """
        check_name(self, "_parameters", "parameter", name)
        if param is not None:
            if not isinstance(param, Parameter):
                raise TypeError(
                    f"cannot assign '{type_name(param)}' object to parameter '{name}' "
                    "(dtrain.nn.Parameter or None required)"
                )
            if param.grad_fn is not None:
                raise ValueError(
                    f"Cannot assign non-leaf Tensor to parameter '{name}'. Model parameters must "
                    f"be created explicitly. To express '{name}' as a function of another Tensor, "
                    "compute the value in the forward() method."
                )
        self._parameters[name] = param

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Add a buffer: state that is not trained. Only persistent ones are in the state_dict."""
        check_name(self, "_buffers", "buffer", name)
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(
                f"cannot assign '{type_name(tensor)}' object to buffer '{name}' "
                "(dtrain Tensor or None required)"
            )
        self._buffers[name] = tensor
        if persistent:
            self._non_persistent_buffers_set.discard(name)
        else:
            self._non_persistent_buffers_set.add(name)

    def add_module(self, name: str, module: Module | None) -> None:
        """Add a child module under `name`."""
        if module is not None and not isinstance(module, Tree):
            raise TypeError(f"{type_name(module)} is not a Module subclass")
        check_name(self, "_modules", "module", name)
        self._modules[name] = module

    def register_module(self, name: str, module: Module | None) -> None:
        """The same as `add_module`."""
        self.add_module(name, module)

    # --- attributes ---

    def __getattr__(self, name: str) -> Any:
        # Reached only for what is not in the instance's or the class's dictionary. Spelt out:
        # forward reads its weights this way (a loop over the tables takes 1.6 times as long).
        fields = self.__dict__
        if "_parameters" in fields:
            if name in fields["_parameters"]:
                return fields["_parameters"][name]
            if name in fields["_modules"]:
                return fields["_modules"][name]
            if name in fields["_buffers"]:
                return fields["_buffers"][name]
        raise missing_attribute(
            f"'{type(self).__name__}' object has no attribute '{name}'", name, self.__dir__
        )

    def __setattr__(self, name: str, value: Any) -> None:
        kind = _table_for(self, name, value)
        if kind is None:
            object.__setattr__(self, name, value)
            return
        if kind not in self.__dict__:
            what = "module" if kind == "_modules" else "parameters"
            raise AttributeError(f"cannot assign {what} before Module.__init__() call")
        if name not in self.__dict__[kind]:
            self._forget(name)
        if kind == "_parameters":
            self.register_parameter(name, value)
        elif isinstance(value, Buffer):
            self.register_buffer(name, value, value.persistent)
        else:
            self.__dict__[kind][name] = value

    def __delattr__(self, name: str) -> None:
        if any(name in self.__dict__[table] for table in TABLES):
            self._forget(name)
        else:
            object.__delattr__(self, name)

    def _forget(self, name: str) -> None:
        """Take `name` out of every table and the instance's dictionary."""
        for table in (self.__dict__, *(self.__dict__.get(t, {}) for t in TABLES)):
            table.pop(name, None)
        self._non_persistent_buffers_set.discard(name)

    def __dir__(self) -> list[str]:
        names = {*dir(type(self)), *self.__dict__}
        names.update(*(self.__dict__.get(table, ()) for table in TABLES))
        return sorted(name for name in names if not name[:1].isdigit())

    # --- walking ---

    def named_modules(
        self, memo: set[Any] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Module]]:
        """(dotted name, module) of this module ("") and all below; each module once.

        `remove_duplicate=False` gives a shared module under each of its names.
        """
        memo = set() if memo is None else memo
        if self in memo:
            return
        if remove_duplicate:
            memo.add(self)
        yield prefix, self
        for name, module in self._modules.items():
            if module is not None:
                below = f"{prefix}.{name}" if prefix else name
                yield from module.named_modules(memo, below, remove_duplicate)

    def modules(self) -> Iterator[Module]:
        """This module and all below; each once."""
        for _, module in self.named_modules():
            yield module

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """(name, module) of the direct children; each module once."""
        seen: set[Module] = set()
        for name, module in self._modules.items():
            if module is not None and module not in seen:
                seen.add(module)
                yield name, module

    def children(self) -> Iterator[Module]:
        """The direct children; each once."""
        for _, module in self.named_children():
            yield module

    def _named_members(
        self,
        get_members_fn: Callable[[Module], Iterable[tuple[str, Any]]],
        prefix: str = "",
        recurse: bool = True,
        remove_duplicate: bool = True,
    ) -> Iterator[tuple[str, Any]]:
        """(dotted name, member) of what `get_members_fn` gives for each module."""
        seen: set[int] = set()
        modules: Iterable[tuple[str, Any]] = [(prefix, self)]
        if recurse:
            modules = self.named_modules(prefix=prefix, remove_duplicate=remove_duplicate)
        for module_prefix, module in modules:
            for name, member in get_members_fn(module):
                if member is None or id(member) in seen:
                    continue
                if remove_duplicate:
                    seen.add(id(member))
                yield f"{module_prefix}.{name}" if module_prefix else name, member

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Parameter]]:
        """(dotted name, parameter) of this module and, with `recurse`, of all below."""
        return self._named_members(
            lambda module: module._parameters.items(), prefix, recurse, remove_duplicate
        )

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """The parameters of this module and, with `recurse`, of all below; each once."""
        for _, parameter in self.named_parameters(recurse=recurse):
            yield parameter

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """(dotted name, buffer) of this module and, with `recurse`, of all below."""
        return self._named_members(
            lambda module: module._buffers.items(), prefix, recurse, remove_duplicate
        )

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        """The buffers of this module and, with `recurse`, of all below; each once."""
        for _, buffer in self.named_buffers(recurse=recurse):
            yield buffer

    # --- by dotted name ---

    def get_submodule(self, target: str) -> Module:
        """The module at a dotted path ("" is this one). AttributeError names what is missing."""
        module: Any = self
        for name in target.split(".") if target else ():
            if not hasattr(module, name):
                raise _no_member(module, name, "_modules")
            module = getattr(module, name)
            if not isinstance(module, Tree):
                raise AttributeError(f"`{name}` is not an nn.Module")
        return module

    def get_parameter(self, target: str) -> Parameter:
        """The parameter at a dotted path."""
        return self._get_member(target, "an nn.Parameter", "_parameters")

    def get_buffer(self, target: str) -> Tensor:
        """The buffer at a dotted path."""
        return self._get_member(target, "a buffer", "_buffers")

    def _get_member(self, target: str, kind: str, table: str) -> Any:
        path, _, name = target.rpartition(".")
        owner = self.get_submodule(path)
        if not hasattr(owner, name):
            raise _no_member(owner, name, table)
        if owner.__dict__[table].get(name) is None:
            raise AttributeError(f"`{name}` is not {kind}")
        return owner.__dict__[table][name]


def _no_member(owner: Tree, name: str, table: str) -> AttributeError:
    kind = type(owner).__name__
    return missing_attribute(f"{kind} has no attribute `{name}`", name, owner.__dict__[table].keys)


def _table_for(owner: Tree, name: str, value: Any) -> str | None:
    """The table an assignment goes to, None for a plain attribute; TypeError as in torch."""
    fields = owner.__dict__
    if isinstance(value, Parameter):
        return "_parameters"
    if isinstance(value, Tree):
        if name in fields.get("_parameters", ()):
            raise _wrong_kind(value, "parameter", name, "dtrain.nn.Parameter")
        return "_modules"
    if name in fields.get("_parameters", ()):
        if value is not None:
            raise _wrong_kind(value, "parameter", name, "dtrain.nn.Parameter")
        return "_parameters"
    if name in fields.get("_modules", ()):
        if value is not None:
            raise _wrong_kind(value, "child module", name, "dtrain.nn.Module")
        return "_modules"
    if isinstance(value, Buffer) or name in fields.get("_buffers", ()):
        if value is not None and not isinstance(value, Tensor):
            raise _wrong_kind(value, "buffer", name, "dtrain.nn.Buffer, dtrain.Tensor")
        return "_buffers"
    return None


def _wrong_kind(value: Any, role: str, name: str, expected: str) -> TypeError:
    return TypeError(
        f"cannot assign '{type_name(value)}' as {role} '{name}' ({expected} or None expected)"
    )
