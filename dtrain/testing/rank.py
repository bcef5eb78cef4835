"""One rank of `run_world(processes=True)`: `python -m dtrain.testing.rank`, started by `world`
only.

Reads its task as msgpack from standard input, runs the function, and writes [value, error,
traceback, time] as msgpack to what was standard output; what the function prints goes to standard
error.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import runpy
import sys
import time
import traceback
from functools import reduce
from typing import Any

from dtrain.comm.group import ProcessGroup
from dtrain.comm.store.tcp import TcpStore
from dtrain.errors import DistError, to_wire
from dtrain.wire import dumps, loads


def main() -> None:
    """Run one task."""
    task = loads(sys.stdin.buffer.read())
    report_to = os.dup(1)
    os.dup2(2, 1)
    faulthandler.dump_traceback_later(task["timeout"], exit=True)
    report = _run(task)
    faulthandler.cancel_dump_traceback_later()
    with os.fdopen(report_to, "wb") as out:
        out.write(dumps(report))


def _run(task: dict[str, Any]) -> list[Any]:
    """[value, error, traceback, time of the failure].

    A failure is dated before others hear of it.
    """
    try:
        sys.path[:] = task["path"]
        function = _find(task["module"], task["file"], task["function"])
        with TcpStore("127.0.0.1", task["port"], timeout=task["timeout"]) as store:
            group = _join(store, task)
            try:
                return [function(group, *task["args"]), None, "", 0]
            except BaseException as error:
                report = _failure(error)
                group.abort(error)
                return report
            finally:
                group.close()
    except BaseException as error:
        return _failure(error)


def _failure(error: BaseException) -> list[Any]:
    form = to_wire(error) if isinstance(error, DistError) else None
    return [None, form, traceback.format_exc(), time.monotonic_ns()]


def _join(store: TcpStore, task: dict[str, Any]) -> ProcessGroup:
    return ProcessGroup(
        store,
        task["rank"],
        task["size"],
        transport=task["transport"],
        timeout=task["timeout"],
        name=task["name"],
    )


def _find(module: str, file: str | None, name: str) -> Any:
    if module == "__main__" and file is not None:
        return reduce(lambda at, part: at[part], name.split("."), runpy.run_path(file))
    return reduce(getattr, name.split("."), importlib.import_module(module))


if __name__ == "__main__":
    main()
