"""Reading an object without running code: a small machine for the pickles that `save` writes.

Rules:
1. Opcodes are carried out here; `pickletools` decodes only the arguments of those in STEPS, and
   one that plain data, tensors and allowed classes do not need is refused.
2. Only names in `portable.MEANINGS` and those a caller allowed (`add_safe_globals`) are looked
   up, by comparison with what is allowed: nothing is imported because a file says so.
3. Only those are called, and only allowed classes get a state.
Whatever is refused raises UnpicklingError, "Weights only load failed. ...".
"""

from __future__ import annotations

import contextlib
import io
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from dtrain.serialization.pickled import UnpicklingError, name_in_torch
from dtrain.serialization.portable import MEANINGS, Global

_allowed: dict[Global, Any] = {}  # what callers declared safe, in this process


# --- what is allowed -----------------------------------------------------------------------------


def add_safe_globals(safe_globals: list[Any]) -> None:
    """Let `load(weights_only=True)` build instances of these classes and call these functions.

    An entry may be (object, "module.name") for files that know it under another name. Allow only
    what may be called with any arguments. Source: torch.serialization.add_safe_globals.
    """
    for entry in safe_globals:
        kind, name = entry if isinstance(entry, tuple) else (entry, None)
        path = name_in_torch(kind) if name is None else Global(*name.rsplit(".", 1))
        _allowed[path] = kind


def get_safe_globals() -> list[Any]:
    """What `add_safe_globals` has allowed so far."""
    return list(_allowed.values())


def clear_safe_globals() -> None:
    """Take back everything that `add_safe_globals` has allowed."""
    _allowed.clear()


@contextlib.contextmanager
def safe_globals(safe_globals: list[Any]) -> Iterator[None]:
    """`add_safe_globals` for the duration of a block."""
    before = dict(_allowed)
    add_safe_globals(safe_globals)
    try:
        yield
    finally:
        _allowed.clear()
        _allowed.update(before)


# --- the machine ---------------------------------------------------------------------------------


def unpickle(data: bytes, load_storage: Callable[[Any], Any]) -> Any:
    """The object in `data`. UnpicklingError for everything that is not allowed, or malformed."""
    try:
        return _Machine(load_storage).run(data)
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, EOFError) as error:
        raise refused(f"the pickle is malformed: {type(error).__name__}: {error}") from error


def refused(reason: str) -> Exception:
    """The error of a file that cannot be read without running code."""
    return UnpicklingError(
        f"Weights only load failed. {reason}\n"
        "With weights_only=False the file may be read, but that runs any code that it contains: "
        "do it only with files from a source you trust."
    )


class _Machine:
    """A stack, a memo and the marks on the stack; `run` carries out one pickle."""

    def __init__(self, load_storage: Callable[[Any], Any]) -> None:
        self.load_storage = load_storage
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.callables: dict[int, Any] = {}  # {id: object} of the names that were looked up

    def run(self, data: bytes) -> Any:
        stream = io.BytesIO(data)
        while True:
            code = stream.read(1).decode("latin-1")
            opcode = pickletools.code2op.get(code)
            name = opcode.name if opcode else f"{code!r}"
            if name == "STOP":
                return self.stack.pop()
            step = STEPS.get(name)
            if opcode is None or step is None:
                raise refused(f"Unsupported operand {name} at byte {stream.tell() - len(code)}.")
            step(self, opcode.arg.reader(stream) if opcode.arg else None)

    def nothing(self, argument: Any) -> None:
        """For opcodes that say how the pickle is laid out."""

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def above_mark(self) -> list[Any]:
        """Take everything above the newest mark off the stack."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    # containers

    def tuple(self, _: Any) -> None:
        self.push(tuple(self.above_mark()))

    def tuple_of(self, count: int) -> None:
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def append(self, _: Any) -> None:
        item = self.stack.pop()
        self.top(list).append(item)

    def appends(self, _: Any) -> None:
        items = self.above_mark()
        self.top(list).extend(items)

    def add_items(self, _: Any) -> None:
        items = self.above_mark()
        self.top(set).update(items)

    def set_item(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.top(dict, OrderedDict)[key] = value

    def set_items(self, _: Any) -> None:
        items = self.above_mark()
        self.top(dict, OrderedDict).update(zip(items[0::2], items[1::2], strict=True))

    def top(self, *kinds: type) -> Any:
        """The container on top of the stack, which must be of one of `kinds`."""
        if type(self.stack[-1]) not in kinds:
            raise refused(f"Can only add to {kinds[0].__name__}, got {type(self.stack[-1])}.")
        return self.stack[-1]

    # memo

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def get(self, index: int) -> None:
        self.push(self.memo[index])

    # names, calls and states

    def global_(self, argument: str) -> None:
        self.look_up(*argument.split(" ", 1))

    def stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.look_up(module, name)

    def look_up(self, module: str, name: str) -> None:
        path = Global(module, name)
        if path not in MEANINGS and path not in _allowed:
            raise refused(
                f"Unsupported global: GLOBAL {module}.{name} was not an allowed global by "
                f"default. Please use `dtrain.serialization.add_safe_globals([{name}])` or the "
                f"`dtrain.serialization.safe_globals([{name}])` context manager to allowlist this "
                "global if you trust this class/function."
            )
        found = MEANINGS[path] if path in MEANINGS else _allowed[path]
        self.callables[id(found)] = found
        self.push(found)

    def reduce(self, _: Any) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.push(self.called(function)(*args))

    def new_object(self, _: Any) -> None:
        args, kind = self.stack.pop(), self.stack.pop()
        kind = self.called(kind)
        self.push(kind.__new__(kind, *args))

    def called(self, function: Any) -> Any:
        """`function`, if it is one that a name in the pickle stood for."""
        if self.callables.get(id(function)) is not function or not callable(function):
            raise refused(f"Trying to call what is not an allowed global: {function!r}.")
        return function

    def build(self, _: Any) -> None:
        state, instance = self.stack.pop(), self.stack[-1]
        if type(instance) is OrderedDict:
            instance.__dict__.update(state)
        elif type(instance) not in _allowed.values():
            raise refused(f"Can only build OrderedDict and allowed classes, got {type(instance)}.")
        elif hasattr(instance, "__setstate__"):
            instance.__setstate__(state)
        else:
            instance.__dict__.update(state)

    def persistent(self, _: Any) -> None:
        self.push(self.load_storage(self.stack.pop()))


_LITERALS = (
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "BINUNICODE8", "SHORT_BINUNICODE"),
    *("BINBYTES", "BINBYTES8", "SHORT_BINBYTES"),
)
# {opcode: what it does with its argument}
STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(_LITERALS, _Machine.push),
    **dict.fromkeys(("PROTO", "FRAME"), _Machine.nothing),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.get),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_SET": lambda machine, _: machine.push(set()),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "TUPLE": _Machine.tuple,
    "MARK": _Machine.mark,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "ADDITEMS": _Machine.add_items,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "MEMOIZE": _Machine.memoize,
    "GLOBAL": _Machine.global_,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.new_object,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}
