"""How ranks fail, told to who started them: `record`, and what a failed launch raises.

Under dtrun every uncaught exception is recorded and shown, with or without `record`. What it adds:
programs that dtrun runs as they are (`--no-python`) leave their traceback, too.
Source of the names: torch.distributed.elastic.multiprocessing.errors.
"""

from __future__ import annotations

import faulthandler
import functools
import json
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

from dtrain.errors import lost_peer, sentence
from dtrain.processes import signal_name

__all__ = ["ChildFailedError", "ErrorHandler", "ProcessFailure", "get_error_handler", "record"]

P, R = ParamSpec("P"), TypeVar("R")


@dataclass
class ProcessFailure:
    """One rank that failed; `exitcode` is negative for a signal. `time`: seconds since the epoch,
    also as `timestamp`.
    """

    local_rank: int
    pid: int
    exitcode: int
    error_file: str = "<N/A>"
    message: str = ""
    time: float = field(default_factory=time.time)

    @property
    def timestamp(self) -> int:
        """Whole seconds since the epoch."""
        return int(self.time)

    def signal_name(self) -> str:
        """SIGKILL for an exit code of -9; "<N/A>" when no signal ended it."""
        return "<N/A>" if self.exitcode >= 0 else signal_name(-self.exitcode)


class ChildFailedError(Exception):
    """Ranks of a launch failed: `failures` is {global rank: ProcessFailure}; -1 stands for a rank
    that could not say which it was.
    """

    def __init__(self, name: str, failures: dict[int, ProcessFailure]) -> None:
        self.name, self.failures = name, failures
        rank, first = self.get_first_failure()
        others = f", and {len(failures) - 1} more" if len(failures) > 1 else ""
        who = f"rank {rank} (pid: {first.pid})" if rank >= 0 else "a rank"
        super().__init__(
            f"{name} FAILED: {who} with exit code {first.exitcode}"
            f"{f', {first.message}' if first.message else ''}{others}; see the report above"
        )

    def get_first_failure(self) -> tuple[int, ProcessFailure]:
        """The rank that failed first, and how."""
        rank = min(self.failures, key=lambda rank: self.failures[rank].time)
        return rank, self.failures[rank]


class ErrorHandler:
    """Writes the exception that ends this process where dtrun looks for it."""

    def initialize(self) -> None:
        """Let a crash of the interpreter show its stacks."""
        if not faulthandler.is_enabled():
            faulthandler.enable()

    def record_exception(self, error: BaseException) -> None:
        """Write the file that TORCHELASTIC_ERROR_FILE names, if it does, in one rename."""
        path = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if path is None:
            return
        fields = {
            "time": time.time(),
            "rank": int(os.environ.get("RANK", "0")),
            "pid": os.getpid(),
            "thread": None,
            "lost_peer": lost_peer(error),
            "message": sentence(error),
            "traceback": "".join(traceback.format_exception(error)),
        }
        with open(f"{path}.partial", "w", encoding="utf-8", errors="backslashreplace") as file:
            json.dump(fields, file)
        os.replace(f"{path}.partial", path)


def get_error_handler() -> ErrorHandler:
    """The one that `record` uses."""
    return ErrorHandler()


def record(fn: Callable[P, R], error_handler: ErrorHandler | None = None) -> Callable[P, R | None]:
    """A decorator of the program's main function: what it raises is recorded, and raised.

    As in torch, `SystemExit` with code 0 makes the function return None.
    """
    handler = error_handler or get_error_handler()

    @functools.wraps(fn)
    def recorded(*args: P.args, **kwargs: P.kwargs) -> R | None:
        handler.initialize()
        try:
            return fn(*args, **kwargs)
        except SystemExit as end:
            if end.code == 0:
                return None
            raise
        except Exception as error:
            handler.record_exception(error)
            raise

    return recorded
