"""The first code of a worker: runs the user's script as Python would, and records how it failed.

dtrun starts this file by its path: `worker.py script|module TARGET ARGS...`. It imports nothing of
dtrun, and the script sees what `python TARGET ARGS...` (or `python -m`) would have given it: argv,
path[0], `__main__`, exit code. An uncaught exception goes to TORCHELASTIC_ERROR_FILE and is shown
by dtrun, in full and once; frames of this file are left out. Crashes (faulthandler) go to a file
in the run directory. A hook that the script puts into sys.excepthook is called as usual.
"""

from __future__ import annotations

import builtins
import faulthandler
import os
import sys
import threading
from types import ModuleType, TracebackType

OWN_FILES = (__file__, "<frozen runpy>")
# A process this long after its end is stuck, in a thread or at exit: show what dtrun would show.
LINGER_SECONDS = 1.0


class Recorder:
    """Writes this process's error file: the uncaught exception of the main thread or of another."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.pid = os.getpid()
        self.rank = int(os.environ["RANK"])

    def record(self, error: BaseException, thread: str | None = None) -> bool:
        """Write `error` atomically and say whether that was done; a forked child never does."""
        if os.getpid() != self.pid:
            return False
        try:
            self._write(error, thread)
        except Exception as trouble:  # whatever it is, it must not hide `error`
            print(f"dtrun: cannot record the next traceback: {trouble!r}", file=sys.stderr)
            return False
        return True

    def main_failed(self, error: BaseException) -> None:
        """Record `error`, which is about to end the process, so that dtrun shows it."""
        error = error.with_traceback(user_frames(error.__traceback__))
        show = sys.excepthook
        if self.record(error) and show is sys.__excepthook__:
            sys.excepthook = lambda *_: None
            info = (type(error), error, error.__traceback__)
            lingering = threading.Timer(LINGER_SECONDS, show, info)
            lingering.daemon = True
            lingering.start()
        else:
            sys.excepthook = lambda kind, value, trace: show(kind, value, user_frames(trace))

    def _write(self, error: BaseException, thread: str | None) -> None:
        import json
        import time
        import traceback

        fields = {
            "time": time.time(),
            "rank": self.rank,
            "pid": self.pid,
            "thread": thread,
            "lost_peer": lost_peer(error),
            "message": sentence(traceback.format_exception_only(error), error),
            "traceback": "".join(traceback.format_exception(error)),
        }
        partial = f"{self.path}.partial"
        with open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
            json.dump(fields, file)
        os.replace(partial, self.path)


def sentence(lines: list[str], error: BaseException) -> str:
    """What the exception says, without the notes that stand behind it."""
    notes = [line for note in getattr(error, "__notes__", ()) for line in str(note).split("\n")]
    return lines[-1 - len(notes)].strip()


def user_frames(trace: TracebackType | None) -> TracebackType | None:
    """The traceback below the frames that only dtrun has put there."""
    while trace is not None and trace.tb_frame.f_code.co_filename in OWN_FILES:
        trace = trace.tb_next
    return trace


def lost_peer(error: BaseException | None) -> bool:
    """Whether `error` comes from losing another rank, however it was wrapped."""
    while error is not None:
        if any(kind.__name__ == "PeerLost" for kind in type(error).__mro__):
            return True
        error = error.__context__ if error.__cause__ is None else error.__cause__
    return False


def install(path: str) -> Recorder:
    """Hook exceptions of threads and crashes of the interpreter; the main thread's are run()'s."""
    recorder = Recorder(path)
    show = threading.excepthook

    def thread_failed(args: threading.ExceptHookArgs) -> None:
        show(args)
        if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
            recorder.record(args.exc_value, args.thread.name if args.thread else "?")

    threading.excepthook = thread_failed
    if not faulthandler.is_enabled():
        own = os.environ.get("DTRAIN_LOCAL_RANK") or os.environ["LOCAL_RANK"]
        fault_log = os.path.join(os.environ["DTRAIN_RUN_DIR"], f"fault-{own}.log")
        faulthandler.enable(os.open(fault_log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644))
    return recorder


def run(kind: str, target: str, args: list[str]) -> None:
    """Run the script or module as `__main__`, in a module of its own."""
    main = ModuleType("__main__")
    main.__dict__.update(__builtins__=builtins, __annotations__={})
    sys.modules["__main__"] = main
    if kind == "module":
        run_module(target, args)
    else:
        run_script(main, target, args)


def run_script(main: ModuleType, path: str, args: list[str]) -> None:
    """What `python path args...` does."""
    sys.argv[:] = [path, *args]
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    from importlib.machinery import SourceFileLoader

    main.__file__ = os.path.abspath(path)
    main.__loader__ = SourceFileLoader("__main__", main.__file__)
    main.__cached__ = None  # type: ignore[attr-defined]
    with open(path, "rb") as file:
        code = compile(file.read(), main.__file__, "exec", dont_inherit=True)
    exec(code, main.__dict__)


def run_module(name: str, args: list[str]) -> None:
    """What `python -m name args...` does."""
    import runpy

    sys.argv[:] = ["-m", *args]
    if not sys.flags.safe_path:
        sys.path[0] = os.getcwd()
    # Private, but it is what the interpreter itself calls for -m; run_module() would take
    # `__main__` away again while threads and exit handlers still need it.
    runpy._run_module_as_main(name)  # type: ignore[attr-defined]


if __name__ == "__main__":
    recorder = install(os.environ["TORCHELASTIC_ERROR_FILE"])
    try:
        run(sys.argv[1], sys.argv[2], sys.argv[3:])
    except SystemExit:
        raise
    except BaseException as error:
        recorder.main_failed(error)
        raise
