"""The exceptions of the distributed runtime, with the fields they carry.

Owns: the class tree below `DistError` (the names of torch.distributed plus ours) and its wire form.
Rules: every error is built from keyword fields, keeps them as attributes, survives pickling, and
can be told to another rank as plain msgpack data (`to_wire`) and raised there again as the same
class with the same sentence (`from_wire`). Wrong arguments of a caller are ValueError, TypeError or
RuntimeError as in torch; they are not here.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = [
    "CollectiveMismatch",
    "CollectiveTimeout",
    "DistBackendError",
    "DistError",
    "DistNetworkError",
    "DistStoreError",
    "ForkedProcessError",
    "GroupAborted",
    "PeerLost",
    "QueueEmptyError",
    "SecretError",
    "StoreTimeout",
    "TransportTimeout",
    "WrongSize",
    "from_wire",
    "lost_peer",
    "sentence",
    "to_wire",
]

_by_name: dict[str, type[DistError]] = {}


class DistError(RuntimeError):
    """Base of every error of the distributed runtime. Keyword fields become attributes."""

    def __init__(self, message: str = "", **fields: Any) -> None:
        super().__init__(message)
        self.__dict__.update(fields)

    def __init_subclass__(cls) -> None:
        _by_name[cls.__name__] = cls

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self).__name__, str(self), dict(self._fields()))

    def _fields(self) -> dict[str, Any]:
        """What the error knows, without the notes that Python or the user hung on it."""
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_")}

    def copy(self) -> DistError:
        """The same error without traceback and cause, fit to be raised once more."""
        return _rebuild(type(self).__name__, str(self), self._fields())


_by_name["DistError"] = DistError


def _rebuild(name: str, message: str, fields: dict[str, Any]) -> DistError:
    cls = _by_name.get(name, DistBackendError)
    error = cls.__new__(cls)
    DistError.__init__(error, message, **fields)
    return error


def to_wire(error: BaseException) -> list[Any]:
    """The error as msgpack-able data: [class name, sentence, fields].

    An error that is not ours becomes a `DistBackendError` whose sentence names the original class.
    """
    if isinstance(error, DistError):
        return [type(error).__name__, str(error), error._fields()]
    return ["DistBackendError", f"{type(error).__name__}: {error}", {}]


def from_wire(form: Sequence[Any]) -> DistError:
    """The error that `to_wire` told, as a fresh exception of the same class."""
    name, message, fields = form
    return _rebuild(name, message, fields)


def sentence(error: BaseException) -> str:
    """What an exception says, as the last line of its traceback has it, without notes behind it."""
    lines = traceback.format_exception_only(error)
    notes = [line for note in getattr(error, "__notes__", ()) for line in str(note).split("\n")]
    return lines[-1 - len(notes)].strip()


def lost_peer(error: BaseException | None) -> bool:
    """Whether `error` comes from losing another rank, however it was wrapped."""
    while error is not None:
        if isinstance(error, PeerLost):
            return True
        error = error.__context__ if error.__cause__ is None else error.__cause__
    return False


class DistBackendError(DistError):
    """A collective or a transport failed (name and place as in torch.distributed)."""


class DistNetworkError(DistError):
    """An address cannot be bound or reached, or a connection broke."""


class SecretError(DistError):
    """The job's secret is not there, too short, or known to others; the text never holds it."""


class DistStoreError(DistError):
    """A key-value store refused or could not serve a request."""


class QueueEmptyError(DistStoreError):
    """`queue_pop` without `block` found nothing in the queue."""


class ForkedProcessError(DistError):
    """A forked child used sockets or threads that belong to its parent."""

    def __init__(self, what: str, owner: int) -> None:
        super().__init__(
            f"{what} was opened by process {owner} and cannot be used in its forked child:"
            " sockets and threads do not survive a fork. Start the child with the 'spawn' method,"
            " or open a new one in the child.",
            what=what,
            owner=owner,
        )


class StoreTimeout(DistStoreError):
    """A store request did not finish in time.

    Fields: `timeout` (seconds waited), `keys` (missing keys), `ranks` (missing ranks of a gather).
    """

    timeout: float
    keys: list[str]
    ranks: list[int]

    def __init__(
        self, timeout: float, keys: Iterable[str], ranks: Iterable[int] = (), *, why: str = ""
    ) -> None:
        keys, ranks = list(keys), list(ranks)
        missing = f"no value from ranks {ranks} for" if ranks else "missing"
        super().__init__(
            f"wait timeout after {timeout:.1f} s, {why or missing} keys: {', '.join(keys)}",
            timeout=timeout,
            keys=keys,
            ranks=ranks,
        )


class TransportTimeout(DistNetworkError):
    """Nothing came from (or went to) `rank` before the deadline of a transport call."""

    rank: int | None

    def __init__(self, rank: int | None) -> None:
        peer = "any rank" if rank is None else f"rank {rank}"
        super().__init__(f"nothing moved between this rank and {peer} in time", rank=rank)


class PeerLost(DistNetworkError):
    """A peer is gone. `rank`: who; `orderly`: it closed the group itself instead of dying.

    What is known of its end: `how`, in words; `last`, its last call with file and line; `pid` and
    `host`. Every survivor raises the same sentence.
    """

    rank: int
    orderly: bool
    how: str
    last: str
    pid: int | None
    host: str | None

    def __init__(
        self,
        rank: int,
        *,
        where: str = "",
        orderly: bool = False,
        how: str = "",
        last: str = "",
        pid: int | None = None,
        host: str | None = None,
    ) -> None:
        if orderly:
            what = "has closed its side of the group: it makes no more calls here"
            what += f" ({how})" if how else ""
        elif how:
            what = f"is lost: {how}"
        else:
            what = "is lost (its connection broke): see the output of that rank for the reason"
        if last:
            what += f". Its last call was {last}"
        super().__init__(
            f"{where}{': ' if where else ''}rank {rank} {what}",
            rank=rank,
            orderly=orderly,
            how=how,
            last=last,
            pid=pid,
            host=host,
        )

    def at(self, where: str) -> PeerLost:
        """The same loss, told with the place that met it."""
        fields = self._fields()
        return PeerLost(fields.pop("rank"), where=where, **fields)


class CollectiveMismatch(DistBackendError):
    """Ranks of one group issued different calls under the same sequence number.

    Fields: `group`, `seq`, and `calls`: [rank, call, "file:line"] of every rank that is known.
    """

    group: str
    seq: int
    calls: list[list[Any]]


class WrongSize(DistBackendError):
    """A message of `got` bytes came from `rank` for a receive of `expected` bytes."""

    rank: int
    got: int
    expected: int

    def __init__(self, rank: int, got: int, expected: int) -> None:
        super().__init__(
            f"rank {rank} sent {got} bytes where {expected} are expected",
            rank=rank,
            got=got,
            expected=expected,
        )


class CollectiveTimeout(DistBackendError):
    """A collective did not finish in time.

    Fields: `group`, `seq`, `rank` (waited for), `timeout`.
    """

    group: str
    seq: int | None
    rank: int | None
    timeout: float


class GroupAborted(DistBackendError):
    """The call came after the group had failed or was aborted; the first failure is the cause.

    Field: `rank`, whose doing it was, where one rank aborted the group or failed in it.
    """

    rank: int | None = None
