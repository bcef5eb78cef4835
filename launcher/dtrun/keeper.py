"""The outer process of dtrun: forwards signals to the launcher and outlives its sudden death.

The process a user starts only keeps: its one child is the launcher proper, in a session of its own
so that Ctrl-C reaches it once, from here. When the launcher is killed, its descendants fall to the
keeper, which ends them; when the keeper is killed, the launcher is sent SIGTERM and ends them. So
no single kill leaves an orphan or a run directory behind.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence

from dtrun import errors, process
from dtrun.spec import STOP_SIGNALS

ASK_SIGNAL = signal.SIGUSR1  # the launcher prints what the ranks do, and goes on
CANNOT_START = 126  # exit code, as a shell's for a command that cannot be executed
# The launcher needs less than one second to stop; this is for a launcher that cannot go on.
PATIENCE_SECONDS = 2.0


def keep(
    launch: Callable[[set[int]], int],
    clean: Callable[[], None],
    patience: Callable[[], float] = lambda: PATIENCE_SECONDS,
    stop_signals: Sequence[int] = STOP_SIGNALS,
) -> int:
    """Run `launch` in a child and return its exit code; then `clean`, however the child ended.

    `launch` is given the signals, SIGCHLD among them, that are blocked and that it must handle.
    Returns in both processes, the child with its own result. Blocks until the child has ended, at
    most `patience()` seconds after a signal. No other thread may be running.
    """
    # A signal that is ignored (nohup, a shell's background job) stays ignored for everybody.
    stops = {one for one in stop_signals if signal.getsignal(one) is not signal.SIG_IGN}
    watched = stops | {signal.SIGCHLD, ASK_SIGNAL}
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    process.adopt_orphans()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # None: it was closed when we started
            stream.flush()
    keeper = os.getpid()
    try:
        child = os.fork()
    except OSError as error:
        clean()
        print(f"dtrun: error: cannot start the launcher: {error}", file=sys.stderr)
        return CANNOT_START
    if child == 0:
        os.setsid()
        process.die_with(keeper, signal.SIGTERM)
        process.adopt_orphans()  # not inherited
        try:
            return launch(watched)
        finally:
            clean()
    status = _wait(child, watched, stops, patience)
    process.sweep()
    clean()
    if status < 0:
        text = f"dtrun: the launcher was ended by {errors.signal_name(-status)}, so are its workers"
        print(text, file=sys.stderr)
    return status if status >= 0 else 128 - status


def _wait(child: int, watched: set[int], stops: set[int], patience: Callable[[], float]) -> int:
    """Forward signals until `child` ends; its exit code, negative for a signal."""
    deadline: float | None = None
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if deadline is None:
            signum: int = signal.sigwaitinfo(watched).si_signo
        else:
            info = signal.sigtimedwait(watched, max(0.0, deadline - time.monotonic()))
            signum = signal.SIGKILL if info is None else info.si_signo
        if signum != signal.SIGCHLD:
            os.kill(child, signum)
        if signum in stops:
            deadline = time.monotonic() + patience()
    return os.waitstatus_to_exitcode(ended[1])
