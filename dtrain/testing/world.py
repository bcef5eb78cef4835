"""A world of ranks for a test: `run_world(n, fn)` runs `fn(group)` on n ranks, as threads or as
processes.

Owns: starting the ranks, joining them under one deadline, saying which failed first, and the stacks
of all ranks when the deadline passes. Nothing is left behind: threads are joined, processes killed.
Process ranks are forked from a server that knows dtrain already (`processes`). They find `fn` by
its module and name, so it must be a module's function; its arguments and its result are msgpack
data. Thread ranks run in a copy of the caller's context variables, each
in its own.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dtrain.comm.group import ProcessGroup
from dtrain.comm.store.memory import MemoryStore
from dtrain.comm.store.tcp import StoreServer
from dtrain.comm.transports.base import Factory
from dtrain.errors import from_wire
from dtrain.testing.processes import Process, how_ended

__all__ = ["Outcome", "RankFailed", "run_ranks", "run_world"]

# What ranks get after the deadline to notice that their group was aborted.
_LAST_WORDS = 2.0


class RankFailed(RuntimeError):
    """A rank in another process failed with an error of its own; the text is its traceback."""


@dataclass(slots=True)
class Outcome:
    """How one rank ended.

    `order` counts the failures in time (0 failed first); `status` is a process's exit code.
    """

    rank: int
    value: Any = None
    error: BaseException | None = None
    order: int = sys.maxsize
    status: int = 0


def run_world(
    size: int,
    fn: Callable[..., Any],
    *args: Any,
    transport: str | Factory = "local",
    timeout: float = 30.0,
    processes: bool = False,
    name: str = "world",
) -> list[Any]:
    """Run `fn(group, *args)` on `size` ranks and return the results in rank order.

    The error of the rank that failed first is raised, with its traceback and a note that names the
    rank; a rank that fails aborts the group, so that the others end at once. After `timeout`
    seconds TimeoutError is raised, with the stacks of all ranks that still run. That is also the
    default deadline of the group's calls.
    """
    outcomes = run_ranks(
        size, fn, *args, transport=transport, timeout=timeout, processes=processes, name=name
    )
    first = min(outcomes, key=lambda outcome: outcome.order)
    if first.error is not None:
        first.error.add_note(f"raised on rank {first.rank} of {size} (transport {transport})")
        raise first.error
    return [outcome.value for outcome in outcomes]


def run_ranks(
    size: int,
    fn: Callable[..., Any],
    *args: Any,
    transport: str | Factory = "local",
    timeout: float = 30.0,
    processes: bool = False,
    name: str = "world",
    abort: bool = True,
) -> list[Outcome]:
    """As `run_world`, but returns how each rank ended, errors included; raises only TimeoutError.

    With `abort=False` a rank that fails leaves the group in good order instead of aborting it.
    """
    if processes:
        return _run_processes(size, fn, args, transport, timeout, name)
    return _run_threads(size, fn, args, transport, timeout, name, abort)


def _run_threads(
    size: int,
    fn: Callable[..., Any],
    args: Sequence[Any],
    transport: str | Factory,
    timeout: float,
    name: str,
    abort: bool,
) -> list[Outcome]:
    store = MemoryStore(timeout)
    outcomes = [Outcome(rank) for rank in range(size)]
    groups: dict[int, ProcessGroup] = {}
    failures = itertools.count()

    def rank_main(rank: int) -> None:
        outcome = outcomes[rank]
        try:
            groups[rank] = group = ProcessGroup(
                store, rank, size, transport=transport, timeout=timeout, name=name
            )
            outcome.value = fn(group, *args)
        except BaseException as error:
            outcome.error, outcome.order = error, next(failures)
            if rank in groups and abort:
                groups[rank].abort(error)
        finally:
            if rank in groups:
                groups[rank].close()

    threads = [
        threading.Thread(
            target=contextvars.copy_context().run, args=(rank_main, rank), name=f"rank {rank}"
        )
        for rank in range(size)
    ]
    for thread in threads:
        thread.daemon = True
        thread.start()
    _join(threads, time.monotonic() + timeout)
    if late := [thread for thread in threads if thread.is_alive()]:
        stacks = "\n".join(_stack(thread) for thread in late)
        for group in list(groups.values()):
            group.abort("the deadline of run_world has passed")
        _join(threads, time.monotonic() + _LAST_WORDS)
        raise TimeoutError(f"{len(late)} of {size} ranks still run after {timeout} s:\n{stacks}")
    return outcomes


def _join(threads: Sequence[threading.Thread], deadline: float) -> None:
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


def _stack(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    lines = traceback.format_stack(frame) if frame is not None else ["  (ended)\n"]
    return f"{thread.name}:\n{''.join(lines)}"


def _run_processes(
    size: int,
    fn: Callable[..., Any],
    args: Sequence[Any],
    transport: str | Factory,
    timeout: float,
    name: str,
) -> list[Outcome]:
    if not isinstance(transport, str):
        raise TypeError("process ranks need the name of a transport")
    group = {"transport": transport, "name": name}
    with started(size, fn, args, timeout=timeout, group=group) as ranks:
        deadline = time.monotonic() + timeout + _LAST_WORDS
        return _in_time([outcome_of(rank, ranks[rank], deadline) for rank in range(size)])


@contextlib.contextmanager
def started(
    size: int,
    fn: Callable[..., Any],
    args: Sequence[Any],
    *,
    timeout: float,
    group: dict[str, Any] | None,
) -> Iterator[list[Process]]:
    """Ranks as processes and a store for them; all is gone at the end of the block.

    They run `fn(group, *args)`, or `fn(store, rank, size, *args)` when `group` is None.
    """
    task = {
        "module": fn.__module__,
        "file": getattr(sys.modules[fn.__module__], "__file__", None),
        "function": fn.__qualname__,
        "args": list(args),
        "size": size,
        "timeout": timeout,
        "group": group,
    }
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(StoreServer()).port
        ranks = []
        for rank in range(size):
            ranks.append(Process({**task, "rank": rank, "port": port}))
            stack.callback(ranks[-1].close)
        yield ranks


def outcome_of(rank: int, process: Process, deadline: float) -> Outcome:
    """How a rank ended; TimeoutError when it has not by `deadline`."""
    try:
        status = process.wait(deadline)
    except TimeoutError:
        raise TimeoutError(
            f"rank {rank} (process {process.pid}) still runs; its stacks are on stderr"
        ) from None
    report = process.report()
    if report is None:
        error = RankFailed(f"rank {rank} ended with {how_ended(status)}")
        return Outcome(rank, error=error, status=status)
    value, error, trace, when = report
    outcome = Outcome(rank, value, status=status)
    if trace:
        outcome.error = from_wire(error) if error else RankFailed(trace)
        outcome.error.add_note(trace)
        outcome.order = when
    return outcome


def _in_time(outcomes: list[Outcome]) -> list[Outcome]:
    """Number the failures: first those that died without a word, then by the clock, which all ranks
    share.
    """
    failed = [o for o in outcomes if o.error is not None]
    failed.sort(key=lambda o: -1 if o.order == sys.maxsize else o.order)
    for number, outcome in enumerate(failed):
        outcome.order = number
    return outcomes
