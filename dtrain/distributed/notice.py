"""Being asked to stop: `should_stop`, on which all ranks agree at the same step.

A machine that is about to be taken away sends SIGTERM, or SIGUSR1 where a batch system is told to;
to one rank, some, or through dtrun to all, each at a moment of its own. `should_stop`, called by
every rank at the end of a step, is true on all of them in the same step, so that they can save a
checkpoint together and end with 0. Rules: 1. a signal handler only sets a flag. 2. Who has called
`should_stop` once no longer dies of these signals; dtrun knows it by a file in the run directory,
and gives such ranks `--shutdown-timeout` seconds instead of one.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from dtrain.comm.collectives import AllReduce
from dtrain.comm.reduce import ReduceOp
from dtrain.distributed.world import current_world, resolve
from dtrain.env import local_rank

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_listens = False
_signalled = False


def should_stop(group: Any = None) -> bool:
    """Whether a rank of `group` has been asked to stop: the same answer on all of them.

    A collective, of one byte: every rank calls it, at the same place of its loop. Without a process
    group the answer is this process's own. The first call, in the main thread, takes over SIGTERM
    and SIGUSR1. Not in torch.
    """
    listen()
    world = current_world()
    asked = _signalled or world.stop_wanted
    if world.default is not None or group is not None:
        told = np.array([asked], np.uint8)
        resolve(group).issue(AllReduce(told, ReduceOp.MAX))
        asked = bool(told[0])
    world.stop_wanted = asked
    return asked


def request_stop() -> None:
    """Ask all ranks to stop at their next `should_stop`, as a signal to this one would."""
    current_world().stop_wanted = True


def listen() -> None:
    """Take over the signals, once, and let dtrun know; nothing in threads other than the main."""
    global _listens
    if _listens or threading.current_thread() is not threading.main_thread():
        return
    _listens = True
    for signum in SIGNALS:
        signal.signal(signum, _hear)
    directory, rank = os.environ.get("DTRAIN_RUN_DIR"), local_rank()
    if directory and rank is not None:
        Path(directory, f"heeds-{rank}").touch()


def _hear(signum: int, frame: FrameType | None) -> None:
    global _signalled
    _signalled = True
