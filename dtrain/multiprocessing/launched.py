"""Functions as programs of ranks: what `notebook_launcher` and `elastic_launch` have in common.

Owns: one run of dtrun, as a user would start it, so ranks, restarts, reports and cleaning up are
dtrun's; the function travels by value in a letter, and nothing is written to a disk. Rule: when the
call is over, however it ends, no process of it runs; when this process dies, they are ended, too.
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

from dtrain.letters import new_letter, path_of, read_letter, write_letter
from dtrain.utils.data.worker import decode, encode
from dtrain.wire import dumps, loads

__all__ = ["call_in_ranks", "first_failure", "run_dtrun", "value_of"]

# dtrun, which asks the kernel to end it with the process of the caller (its first argument).
_DTRUN = (
    "import signal, sys; from dtrun import cli, process; "
    "process.die_with(int(sys.argv.pop(1)), signal.SIGTERM); sys.exit(cli.main())"
)
_RANK = "dtrain.multiprocessing.launched_rank"
# dtrun ends its ranks within 1 s of an interrupt; then they are killed.
_END_SECONDS = 5.0

Told = Mapping[str, Any]


def call_in_ranks(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    flags: Sequence[str],
    count: int,
    *,
    everyone: bool = False,
) -> tuple[int, list[Told]]:
    """Run `function(*args)` in `count` ranks under dtrun: its exit code, and what each rank told.

    A rank that returned tells "rank" and "value" (of rank 0 alone, unless `everyone`), one that
    raised "rank", "message", "pid", "time" and "lost_peer", others nothing. Blocks until all have
    ended. TypeError for what cannot be copied. An interrupt ends all ranks and is raised.
    """
    with _letters(count + 1) as (task, *reports):
        write_letter(task, _packed(function, args, everyone))
        code = run_dtrun([*flags, "-m", _RANK, *map(path_of, (task, *reports))])
        return code, [loads(text) if (text := read_letter(each)) else {} for each in reports]


def value_of(told: Told) -> Any:
    """What a rank returned."""
    head, *buffers = told["value"]
    return decode(head, [bytearray(buffer) for buffer in buffers])


def first_failure(told: Sequence[Told]) -> Told | None:
    """What the rank told that failed first, those that only lost another one last."""
    failed = [one for one in told if "message" in one]
    return min(failed, key=lambda one: (one["lost_peer"], one["time"], one["rank"]), default=None)


def _packed(function: Callable[..., Any], args: tuple[Any, ...], everyone: bool) -> bytes:
    try:
        frames = encode((function, args, _cells(), everyone))
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
        letters.extend(new_letter("dtrain-launched") for _ in range(count))
        yield letters
    finally:
        for letter in letters:
            os.close(letter)


def run_dtrun(arguments: Sequence[str]) -> int:
    """Run dtrun and show what it prints; its exit code. An interrupt is passed on and raised."""
    dtrun = subprocess.Popen(
        [sys.executable, "-c", _DTRUN, str(os.getpid()), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=_environment(os.environ),
        start_new_session=True,  # an interrupt of the caller reaches it once, from here
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
    """One stream of the caller: bytes in, whole characters out."""

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
