"""Remote references: `RRef`, a handle of a value that lives on its owner.

Rules: 1. there is at most one handle of a reference in a process at a time; it carries the credits
that the owner's books (`ledger`) hold for this worker. 2. A handle that dies only leaves a note for
the I/O thread: a finalizer takes no lock and sends nothing. 3. Handles travel as arguments and
results of calls; they cannot be pickled, since a copy that nobody counts would outlive its value.

Source: torch.distributed.rpc.RRef.
"""

from __future__ import annotations

from typing import Any, NoReturn

from dtrain.distributed.rpc import current
from dtrain.distributed.rpc.constants import UNSET_RPC_TIMEOUT
from dtrain.distributed.rpc.functions import outcome
from dtrain.distributed.rpc.ledger import Name
from dtrain.distributed.rpc.names import export, resolve
from dtrain.distributed.rpc.options import WorkerInfo

__all__ = ["RRef", "called"]

# On a function that calls another: which of its arguments the other is; its arguments come next.
RELAY = "_relayed_rpc_argument"


class RRef:
    """A reference to `value`, owned by this worker; `remote` makes those that others own.

    `type_hint` is accepted and ignored.
    """

    def __init__(self, value: Any, type_hint: Any = None) -> None:
        self._attach(current.agent(), None)
        self._agent.references.adopt(self, value)

    def _attach(self, agent: Any, name: Name | None) -> None:
        self._agent = agent
        self.name: Any = name if name is not None else agent.references.new_name(agent.rank)
        self.credits = 0
        self._made: Any = None  # the answer to the call that makes the value; None: it is there
        self._note = agent.references.note_drop

    @classmethod
    def _of(cls, agent: Any, name: Name) -> RRef:
        handle = cls.__new__(cls)
        handle._attach(agent, name)
        return handle

    def is_owner(self) -> bool:
        """Whether the value lives in this worker."""
        return bool(self.name.owner == self._agent.rank)

    def owner(self) -> WorkerInfo:
        """The worker in which the value lives."""
        return WorkerInfo(self._agent.names[self.name.owner], self.name.owner)

    def owner_name(self) -> str:
        """The name of `owner()`."""
        return self.owner().name

    def confirmed_by_owner(self) -> bool:
        """Whether the owner is known to have the value, or the error of what should make it."""
        return self._made is None or self._made.done()

    def _get_future(self) -> Any:
        """The future of the call of `remote` that makes the value; RuntimeError if none did."""
        if self._made is None:
            raise RuntimeError(f"{self} was not made by a call of remote on this worker")
        return self._made

    def to_here(self, timeout: float = UNSET_RPC_TIMEOUT) -> Any:
        """A copy of the value; of the owner's, the value itself.

        Blocks until it is there, at most `timeout` seconds (0: for ever; default: that of
        `init_rpc`). Raises what the function that makes it raised, `RpcTimeout`, `PeerLost`.
        """
        return (current.recorder.get() or self._agent).fetch(self, timeout)

    def local_value(self) -> Any:
        """The value itself, on its owner; RuntimeError elsewhere. Blocks until it is there."""
        if not self.is_owner():
            here = self._agent.names[self._agent.rank]
            raise RuntimeError(
                f"Cannot call local_value() on a non-owner reference: {self} is owned by worker "
                f"{self.owner_name()!r}, this is {here!r}. Use to_here(), or call a function there"
            )
        return self._agent.local_value(self)

    def rpc_sync(self, timeout: float = UNSET_RPC_TIMEOUT) -> Proxy:
        """A proxy: its methods run on the owner, on the value, and return their results."""
        return Proxy(self, "rpc_sync", timeout)

    def rpc_async(self, timeout: float = UNSET_RPC_TIMEOUT) -> Proxy:
        """As `rpc_sync`; methods return futures."""
        return Proxy(self, "rpc_async", timeout)

    def remote(self, timeout: float = UNSET_RPC_TIMEOUT) -> Proxy:
        """As `rpc_sync`; methods return references to their results."""
        return Proxy(self, "remote", timeout)

    def backward(self, dist_autograd_ctx_id: int = -1, retain_graph: bool = False) -> None:
        """Run backward from the value, a scalar, on its owner, in a distributed autograd context.

        Without one (-1): through the owner's own graph, into `.grad`. Blocks until it is done.
        """
        if not self.is_owner() and dist_autograd_ctx_id == -1:
            raise RuntimeError("User RRefs require 'dist_autograd_ctx_id' to be specified")
        run = resolve("dtrain.distributed.autograd.calls", "backward_of")
        parts = (self, dist_autograd_ctx_id, retain_graph)
        if self.is_owner():
            run(*parts)
        else:
            self._agent.rpc_sync(self.name.owner, run, parts, {}, UNSET_RPC_TIMEOUT)

    def __getattr__(self, name: str) -> NoReturn:
        ways = (
            ""
            if name.startswith("_")
            else (
                f". Methods of the value: rpc_sync().{name}(...); the value itself: to_here(), or "
                "local_value() on its owner"
            )
        )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{ways}")

    def __repr__(self) -> str:
        kind = "OwnerRRef" if self.is_owner() else "UserRRef"
        return f"{kind}({self.name.creator}.{self.name.number} on {self.owner_name()!r})"

    def __reduce__(self) -> Any:
        raise RuntimeError(
            "an RRef can only travel in the arguments and results of rpc calls, where it is counted"
        )

    def __del__(self) -> None:
        note = getattr(self, "_note", None)
        if note is not None:
            note(self.name, self.credits)


class Proxy:
    """Methods of a remote value as methods of this object."""

    def __init__(self, reference: RRef, way: str, timeout: float) -> None:
        self._reference, self._way, self._timeout = reference, way, timeout

    def __getattr__(self, method: str) -> Any:
        if method.startswith("__"):  # what copy and pickle ask of every object
            raise AttributeError(method)
        return lambda *args, **kwargs: self._call(method, args, kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call("__call__", args, kwargs)

    def _call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        reference = self._reference
        call = getattr(current.recorder.get() or reference._agent, self._way)
        parts = (reference, method, args, kwargs)
        return call(reference.name.owner, invoke, parts, {}, self._timeout)


@export
def invoke(reference: RRef, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a proxy calls on the owner. Methods with two leading underscores are not for others."""
    if method.startswith("__") and method != "__call__":
        raise TypeError(f"{method} may not be called by other workers")
    function = getattr(reference.local_value(), method)
    return outcome(function, function(*args, **kwargs))


def called(function: Any, args: Any) -> str:
    """What a call is named in errors and statistics: its function, or the method of a proxy."""
    place = getattr(function, RELAY, None)
    if isinstance(place, int):
        return called(args[place], args[place + 1])
    if function is invoke:
        return f"{args[1]} of a reference"
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', function)}"
