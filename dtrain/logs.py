"""Rank-aware logging on the standard library: `get_logger`, a formatter, JSON lines on request.

All loggers live below "dtrain". Warnings and worse go to stderr until the program configures
logging itself: as soon as the root logger or "dtrain" has a handler of the program, ours keeps
silent, so nothing is said twice. The level is read from the environment with the first logger:
DTRAIN_LOG, else DTRAIN_DEBUG or TORCH_DISTRIBUTED_DEBUG (INFO, DETAIL), else LOGLEVEL, else
WARNING.

The module is not called `log`: its import would put it in the place of the function `dtrain.log`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from typing import Final, TextIO

__all__ = ["JsonFormatter", "RankFormatter", "add_json_handler", "get_logger", "level_from_environ"]

ROOT: Final = logging.getLogger("dtrain")
TORCH_DEBUG_LEVELS: Final = {"OFF": None, "INFO": logging.INFO, "DETAIL": logging.DEBUG}


class RankFormatter(logging.Formatter):
    """`[rank1] WARNING dtrain.comm.group: text`; without RANK in the environment no rank."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """The record as text, its traceback after it."""
        rank = os.environ.get("RANK")
        return f"{'' if rank is None else f'[rank{rank}] '}{super().format(record)}"


class JsonFormatter(logging.Formatter):
    """One JSON object per record: time (s since the epoch), level, logger, rank, pid, message."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line; `error` holds the traceback when there is one."""
        rank = os.environ.get("RANK")
        fields = {
            "time": record.created,
            "level": record.levelname,
            "logger": record.name,
            "rank": int(rank) if rank and rank.isdecimal() else None,
            "pid": record.process,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


class _LastResort(logging.StreamHandler[TextIO]):
    """Writes to the current sys.stderr as long as nobody else handles the records of dtrain."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.setFormatter(RankFormatter())

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        """sys.stderr as it is now: programs and tests exchange it."""
        return sys.stderr

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record unless the program has handlers of its own."""
        others = [one for one in ROOT.handlers if not isinstance(one.formatter, JsonFormatter)]
        if others == [self] and not logging.getLogger().handlers:
            super().emit(record)


def get_logger(name: str = "dtrain") -> logging.Logger:
    """The logger `name`, which is "dtrain" or below it; ValueError otherwise.

    The first call reads the level from the environment, which raises ValueError for a bad one.
    """
    if name != "dtrain" and not name.startswith("dtrain."):
        raise ValueError(f"loggers of dtrain are named dtrain or dtrain.*, got {name!r}")
    if not ROOT.handlers:
        ROOT.addHandler(_LastResort())
        if ROOT.level == logging.NOTSET:  # a level set by the program stays
            ROOT.setLevel(level_from_environ())
    return logging.getLogger(name)


def add_json_handler(path: str) -> logging.Handler:
    """Append every record of dtrain to the file `path` as JSON lines; returns the handler.

    Remove it with `logging.getLogger("dtrain").removeHandler(handler)` and close it.
    """
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(JsonFormatter())
    get_logger().addHandler(handler)
    return handler


def level_from_environ(environ: Mapping[str, str] = os.environ) -> int:
    """The level that DTRAIN_LOG, DTRAIN_DEBUG, TORCH_DISTRIBUTED_DEBUG or LOGLEVEL asks for: the
    first of them that is set.
    """
    if environ.get("DTRAIN_LOG"):
        return _level("DTRAIN_LOG", environ["DTRAIN_LOG"])
    variable = "DTRAIN_DEBUG" if environ.get("DTRAIN_DEBUG") else "TORCH_DISTRIBUTED_DEBUG"
    debug = environ.get(variable, "OFF").upper()
    if debug not in TORCH_DEBUG_LEVELS:
        raise ValueError(
            f"The value of {variable} must be OFF, INFO, or DETAIL. Got {environ[variable]!r}"
        )
    level = TORCH_DEBUG_LEVELS[debug]
    return level if level is not None else _level("LOGLEVEL", environ.get("LOGLEVEL") or "WARNING")


def _level(variable: str, text: str) -> int:
    if text.isdecimal():
        return int(text)
    levels = logging.getLevelNamesMapping()
    if text.upper() not in levels:
        raise ValueError(f"{variable} must be one of {', '.join(levels)} or a number, got {text!r}")
    return levels[text.upper()]
