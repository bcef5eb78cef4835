"""Looking at ranks while they run: the debug level, counters, a breakpoint on one rank.

Source: torch.distributed.{DebugLevel, get_debug_level, set_debug_level, breakpoint}.
"""

from __future__ import annotations

import enum
import itertools
import logging
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from dtrain.comm.collectives import Barrier
from dtrain.comm.record import GroupStatistics, call_site
from dtrain.distributed.groups import get_rank
from dtrain.distributed.work import seconds
from dtrain.distributed.world import resolve
from dtrain.logs import ROOT, level_from_environ

if TYPE_CHECKING:
    import pdb


class DebugLevel(enum.Enum):
    """What dtrain's loggers say: warnings, INFO records as well, or DEBUG records as well.

    Checks do not depend on it: calls that differ between ranks are always found.
    """

    OFF = 0
    INFO = 1
    DETAIL = 2


_LOGGED = {
    DebugLevel.OFF: logging.WARNING,
    DebugLevel.INFO: logging.INFO,
    DebugLevel.DETAIL: logging.DEBUG,
}


def get_debug_level() -> DebugLevel:
    """The level that dtrain's loggers have now; the finest one that is complete."""
    level = ROOT.getEffectiveLevel()
    if level <= logging.DEBUG:
        return DebugLevel.DETAIL
    return DebugLevel.INFO if level <= logging.INFO else DebugLevel.OFF


def set_debug_level(level: DebugLevel) -> None:
    """Set the level of dtrain's loggers in this process."""
    ROOT.setLevel(_LOGGED[level])


def set_debug_level_from_env() -> None:
    """Set the level that DTRAIN_LOG, DTRAIN_DEBUG, TORCH_DISTRIBUTED_DEBUG or LOGLEVEL asks for.

    ValueError for a value that none of them has.
    """
    ROOT.setLevel(level_from_environ(os.environ))


def statistics(group: Any = None) -> GroupStatistics:
    """What this rank has done in `group` since it was made; counted always, sends nothing.

    `calls[kind]`: `count`, `bytes`, `seconds`, and how many of these seconds were `waited` for
    others; `waits[rank]`: for whom, by rank of the group: who makes the others wait.
    """
    return resolve(group).arrays.statistics()


class _Resumed(Barrier):
    """The end of a breakpoint; the others come long before."""

    __slots__ = ()
    patient = True


_passed: defaultdict[str, Iterator[int]] = defaultdict(lambda: itertools.count(1))


def breakpoint(rank: int = 0, skip: int = 0, timeout_s: float | timedelta | None = 3600) -> None:
    """Stop global rank `rank` in pdb, on its terminal, while all others wait for it.

    All ranks call it. The first `skip` calls at one line do nothing. The others wait at most
    `timeout_s` seconds (None: the group's timeout); the timeouts of other calls do not change.
    Type "up" to get to the frame that called it.
    """
    if skip > 0 and next(_passed[f"{get_rank()} {call_site()}"]) <= skip:
        return
    if get_rank() == rank:
        debugger = _debugger()
        debugger.message(f"Type 'up' to get to the frame that called dist.breakpoint({rank=})")
        debugger.set_trace()
    resolve(None).issue(_Resumed(), timeout=seconds(timeout_s))


def _debugger() -> pdb.Pdb:
    """pdb on the terminal, also where stdin of this process is something else."""
    import pdb

    if sys.stdin is not None and sys.stdin.isatty():
        return pdb.Pdb()
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY)
    except OSError as error:
        raise RuntimeError("dist.breakpoint needs a terminal, and there is none") from error
    return pdb.Pdb(stdin=os.fdopen(terminal))
