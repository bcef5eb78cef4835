"""`notebook_launcher`: ranks for a function of a notebook's cell, with their output in the cell.

Owns: the call. It runs dtrun as a user would, so ranks, restarts, reports and cleaning up are
dtrun's; the function travels by value in a letter, and nothing is written to a disk. Rule: when the
call is over, however it ends, no process of it runs; when the kernel dies, they are ended, too.
"""

from __future__ import annotations

import codecs
import linecache
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

from dtrain import machine
from dtrain.letters import new_letter, path_of, read_letter, write_letter
from dtrain.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException
from dtrain.utils.data.worker import decode, encode
from dtrain.wire import dumps, loads

__all__ = ["notebook_launcher"]

# dtrun, which asks the kernel to end it with the process of the notebook (its first argument).
_DTRUN = (
    "import signal, sys; from dtrun import cli, process; "
    "process.die_with(int(sys.argv.pop(1)), signal.SIGTERM); sys.exit(cli.main())"
)
_RANK = "dtrain.multiprocessing.notebook_rank"
# dtrun ends its ranks within 1 s of an interrupt; then they are killed.
_END_SECONDS = 5.0


def notebook_launcher(
    function: Callable[..., Any],
    args: tuple[Any, ...] = (),
    num_processes: int | None = None,
    *,
    max_restarts: int = 0,
    log_line_prefix_template: str | None = None,
) -> Any:
    """Run `function(*args)` in `num_processes` ranks (None: one a core); what rank 0 returned.

    `function` may be of a cell: it, its arguments and the globals it uses are copied to new
    processes, in which `torch.distributed.init_process_group()` finds the others. What the ranks
    print appears as it comes, with their numbers. Blocks until all have ended.

    Raises `ProcessRaisedException` when a rank raised, after dtrun's report with the traceback, and
    `ProcessExitedException` when one ended otherwise; TypeError for what cannot be copied. An
    interrupt ends all ranks and is raised. Source: Accelerate's function of this name.
    """
    count = machine.cores() if num_processes is None else num_processes
    if count < 1:
        raise ValueError(f"num_processes must be at least 1, got {num_processes}")
    with _letters(count + 1) as (task, *reports):
        write_letter(task, _packed(function, args))
        flags = ["--standalone", f"--nproc-per-node={count}", f"--max-restarts={max_restarts}"]
        if log_line_prefix_template is not None:
            flags.append(f"--log-line-prefix-template={log_line_prefix_template}")
        code = _run([*flags, "-m", _RANK, *map(path_of, (task, *reports))])
        told = [loads(text) if (text := read_letter(report)) else {} for report in reports]
    if code:
        raise _failure(code, told)
    head, *buffers = told[0]["value"]
    return decode(head, [bytearray(buffer) for buffer in buffers])


def _packed(function: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    try:
        frames = encode((function, args, _cells()))
    except Exception as error:
        raise TypeError(
            f"{getattr(function, '__name__', function)!r}, its arguments, or a global it uses "
            f"cannot be copied to other processes: {error}. Make it inside of the function."
        ) from error
    return dumps([bytes(frame) for frame in frames])


def _cells() -> dict[str, list[str]]:
    """The lines of all code that stands in no file, as cells do: tracebacks of ranks show them."""
    entries = [(name, linecache.getlines(name)) for name in list(linecache.cache)]
    return {name: lines for name, lines in entries if lines and not os.path.exists(name)}


@contextmanager
def _letters(count: int) -> Iterator[list[int]]:
    letters: list[int] = []
    try:
        letters.extend(new_letter("dtrain-notebook") for _ in range(count))
        yield letters
    finally:
        for letter in letters:
            os.close(letter)


def _run(arguments: Sequence[str]) -> int:
    """Run dtrun and show what it prints; its exit code. An interrupt is passed on and raised."""
    dtrun = subprocess.Popen(
        [sys.executable, "-c", _DTRUN, str(os.getpid()), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=_environment(os.environ),
        start_new_session=True,  # an interrupt of the notebook reaches it once, from here
    )
    try:
        with selectors.DefaultSelector() as selector:
            assert dtrun.stdout is not None
            assert dtrun.stderr is not None
            selector.register(dtrun.stdout, selectors.EVENT_READ, _Shown(sys.stdout))
            selector.register(dtrun.stderr, selectors.EVENT_READ, _Shown(sys.stderr))
            try:
                _show(selector)
            except KeyboardInterrupt:
                dtrun.send_signal(signal.SIGINT)
                _show(selector, time.monotonic() + _END_SECONDS)
                raise
        return dtrun.wait(_END_SECONDS)
    finally:
        if dtrun.poll() is None:
            dtrun.kill()
            dtrun.wait()
        for pipe in (dtrun.stdout, dtrun.stderr):
            if pipe is not None:
                pipe.close()


class _Shown:
    """One stream of the notebook: bytes in, whole characters out."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def write(self, data: bytes) -> None:
        self._stream.write(self._decoder.decode(data, final=not data))
        self._stream.flush()


def _show(selector: selectors.BaseSelector, deadline: float | None = None) -> None:
    """Copy all streams until each has ended, or to the `deadline`."""
    while selector.get_map():
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return
        for key, _ in selector.select(left):
            data = os.read(key.fd, 1 << 16)
            key.data.write(data)
            if not data:
                selector.unregister(key.fileobj)


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """That of this process, with its import path; PET_ variables are for a dtrun of a shell."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    plain = {name: value for name, value in environ.items() if not name.startswith(_PRESETS)}
    return plain | {"PYTHONPATH": path}


_PRESETS = "PET_"


def _failure(code: int, told: Sequence[Mapping[str, Any]]) -> Exception:
    """The exception of a run: of its first failure that is not the loss of another rank."""
    failed = [
        (bool(one["lost_peer"]), float(one["time"]), rank, one)
        for rank, one in enumerate(told)
        if "message" in one
    ]
    if not failed:
        return ProcessExitedException(
            f"the ranks ended with exit code {code}: see the report above for which, and why",
            error_index=-1,
            error_pid=-1,
            exit_code=code,
        )
    *_, rank, first = min(failed, key=lambda one: one[:3])
    return ProcessRaisedException(
        f"process {rank} terminated with {first['message']} (its traceback is in the report above)",
        rank,
        int(first["pid"]),
    )
