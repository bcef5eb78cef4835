"""Starting processes so that none can outlive us, and ending those that are ours.

Rules: a worker leads its own session, is killed by the kernel when its parent dies
(PR_SET_PDEATHSIG), and is signalled as a process group. Orphans below us come back to us
(PR_SET_CHILD_SUBREAPER), so what `sweep` ends is exactly what we started, found by kinship and
never by name. Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Collection, Mapping, Sequence

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
# What `sweep` sends, and how long it waits for all to end.
SWEEP = ((None, 0.15), (signal.SIGTERM, 0.15), (signal.SIGKILL, 1.0))


def die_with(parent: int, signum: int) -> None:
    """Ask the kernel to send us `signum` when `parent` dies; now, if it is dead already."""
    _prctl(PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent:
        os.kill(os.getpid(), signum)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def spawn(
    argv: Sequence[str],
    env: Mapping[str, str],
    stdin: int | None,
    stdout: int | None,
    stderr: int | None,
    inherited: Sequence[int] = (),
    cores: Collection[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a worker; `stdin`, `stdout` and `stderr` are as in Popen, which names the errors.

    It has the descriptors `inherited` under the same numbers, and runs on `cores`, if any are
    named.

    Call it from the main thread: the parent-death signal follows the thread that forked.
    """
    launcher = os.getpid()

    def prepare() -> None:
        die_with(launcher, signal.SIGKILL)
        if cores:
            os.sched_setaffinity(0, cores)

    return subprocess.Popen(
        argv,
        env=env,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        pass_fds=inherited,
        start_new_session=True,
        # No other thread exists that could hold a lock over the fork.
        preexec_fn=prepare,
    )


def signal_group(worker: subprocess.Popen[bytes], signum: int) -> None:
    """Send `signum` to a worker that was not waited for, and to all of its process group."""
    # An unreaped leader keeps its group's number from being used again.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signum)


def make_memory() -> tuple[int, int]:
    """Two nameless files in memory, of no size yet: where a rank keeps what is to outlive it."""
    first, second = (os.memfd_create("dtrun-memory", os.MFD_CLOEXEC) for _ in range(2))
    return first, second


def sweep(spared: Collection[int] = ()) -> int:
    """End and reap every child still there but `spared`, and what falls to us when it ends.

    Some are about to end by themselves, like multiprocessing's resource tracker, which removes
    shared memory first. The others get SIGTERM, then SIGKILL; their number is returned. Blocks for
    1.3 seconds at most.
    """
    if not _has_children():
        return 0
    import psutil  # seldom needed, and as long to import as a process takes to start

    me, ended = psutil.Process(), set()
    for signum, seconds in SWEEP:
        # Ending a parent hands us its children: go on until there are none.
        while left := [child for child in me.children() if child.pid not in spared]:
            for child in left if signum is not None else ():
                ended.add(child.pid)
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.send_signal(signum)  # psutil compares start times: never a stranger
            if psutil.wait_procs(left, timeout=seconds)[1]:
                break
    return len(ended)


def _has_children() -> bool:
    """Whether a child remains; those that have ended are reaped."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value}) failed")
