"""A world of ranks that use `dtrain.distributed`: `run_distributed(n, fn)`.

The same world as `run_world`'s, with the default process group joined and a default generator of
its own on every rank, so that `fn` is written like a training script.
"""

from __future__ import annotations

import contextlib
import pkgutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from dtrain.comm.group import ProcessGroup as ArrayGroup
from dtrain.comm.transports.base import Factory
from dtrain.distributed.world import ProcessGroup, own_world
from dtrain.generator import Generator
from dtrain.random import use_generator
from dtrain.testing.world import run_world


def run_distributed(
    size: int,
    fn: Callable[..., Any],
    *args: Any,
    transport: str | Factory = "local",
    timeout: float = 30.0,
    processes: bool = False,
) -> list[Any]:
    """Run `fn(*args)` on `size` ranks that have joined the default group; results in rank order.

    Ranks are threads, or processes (then `fn` is a module's function, its arguments and result are
    plain data). The error of the rank that failed first is raised. Blocks until all ranks have
    ended, at most about `timeout` seconds.
    """
    if processes:
        where = [fn.__module__, fn.__qualname__]
        return run_world(
            size, run_by_name, *where, *args, transport=transport, timeout=timeout, processes=True
        )
    return run_world(size, partial(_joined, fn, args), transport=transport, timeout=timeout)


def run_by_name(group: ArrayGroup, module: str, function: str, *args: Any) -> Any:
    """What a process rank runs: the function found by its name, joined."""
    return _joined(pkgutil.resolve_name(f"{module}:{function}"), args, group)


def _joined(fn: Callable[..., Any], args: tuple[Any, ...], group: ArrayGroup) -> Any:
    with joined(group):
        return fn(*args)


@contextlib.contextmanager
def joined(group: ArrayGroup) -> Iterator[None]:
    """Inside the block `group` is the default group of `dtrain.distributed` for this thread.

    An error that leaves the block aborts the group, so that the others learn the reason.
    """
    with own_world() as world, use_generator(Generator()):
        world.default = ProcessGroup(group, range(group.size), "testing", "default_pg")
        world.made.append(world.default)
        world.store = group.store
        try:
            yield
        except BaseException as error:
            group.abort(error)
            raise
