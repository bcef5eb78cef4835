"""One rank of `run_world(processes=True)`, in a process forked by `fork_server`.

Owns: `run`, which reads its task as msgpack from a letter, runs the function, and writes [value,
error, traceback, time] into the letter in its place. What the function prints goes to standard
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
from dtrain.letters import clear_letter, read_letter, write_letter
from dtrain.wire import dumps, loads


def run(letter: int) -> int:
    """Do the task in `letter` and report; the exit status."""
    task = loads(read_letter(letter))
    clear_letter(letter)
    os.chdir(task["cwd"])
    os.environ.clear()
    os.environ.update(task["environ"])
    sys.path[:] = task["path"]
    faulthandler.dump_traceback_later(task["timeout"], exit=True)
    report = _run(task)
    faulthandler.cancel_dump_traceback_later()
    write_letter(letter, dumps(report))
    return 0


def _run(task: dict[str, Any]) -> list[Any]:
    """[value, error, traceback, time of the failure].

    A failure is dated before others hear of it.
    """
    try:
        function = _find(task["module"], task["file"], task["function"])
        with TcpStore("127.0.0.1", task["port"], timeout=task["timeout"]) as store:
            if not task["group"]:
                return [function(store, task["rank"], task["size"], *task["args"]), None, "", 0]
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
        timeout=task["timeout"],
        **task["group"],
    )


def _find(module: str, file: str | None, name: str) -> Any:
    if module == "__main__" and file is not None:
        return reduce(lambda at, part: at[part], name.split("."), runpy.run_path(file))
    return reduce(getattr, name.split("."), importlib.import_module(module))
