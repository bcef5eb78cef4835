"""Starting, dying and stopping, timed: `python benchmarks/launch.py [--torch-python PYTHON]`.

Measures dtrun, and torchrun beside it in turn: from its start to the end of the first all_reduce;
from a rank's SIGKILL until dtrun has seen it, until the other ranks have raised, until all train
again; from Ctrl-C until the last process is gone, whatever the ranks do. Prints one line each:
the median, the longest, how many; inf is never. What the ranks do is benchmarks/launched.py.
"""

import argparse
import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from beside import ONE_THREAD, command, with_torch

SCRIPT = Path(__file__).with_name("launched.py")
DEATHS = {
    "seen": "SIGKILL of 1 of 4: launcher knows",
    "told": "SIGKILL of 1 of 4: all survivors know",
    "again": "SIGKILL of 1 of 4: training again",
}
STOPS = {
    "asleep": "Ctrl-C, ranks in Python",
    "in_c": "Ctrl-C, ranks in a C call",
    "in_collective": "Ctrl-C, ranks in a collective",
    "with_loaders": "Ctrl-C, ranks with 2 loaders each",
}
DEADLINE = 60.0
LOOK_EVERY = 0.001  # seconds
RESTARTS = 3


class Job:
    """A launcher that runs one act in a folder; killed, with all below it, when the block ends."""

    def __init__(self, library, python, nproc, act, folder, restarts=0):
        self.nproc, self.folder, self.restarts = nproc, Path(folder), restarts
        self.read, self.lines = 0, []  # of the history: bytes, and what they say
        flags = ["--max-restarts", str(restarts), str(SCRIPT), library, act, folder]
        env = {**os.environ, **dict.fromkeys(ONE_THREAD, "1"), "XDG_RUNTIME_DIR": folder}
        self.began = time.monotonic()
        self.output = open(self.folder / "output", "wb")  # noqa: SIM115 (closed in __exit__)
        self.launcher = subprocess.Popen(
            [*command(library, python, nproc), *flags],
            stdin=subprocess.DEVNULL, stdout=self.output, stderr=self.output, env=env,
        )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in self.family():
                process.kill()
        self.launcher.wait()
        self.output.close()

    def family(self):
        """The launcher and all below it."""
        outer = psutil.Process(self.launcher.pid)
        return [outer, *outer.children(recursive=True)]

    def events(self, name, start=0):
        """Lines of the history, which is read again only when it has grown: ranks need the core."""
        path = self.folder / "history"
        size = path.stat().st_size if path.exists() else 0
        if size > self.read:
            self.lines = list(map(json.loads, path.read_text().splitlines()))
            self.read = size
        return [line for line in self.lines if (line["event"], line["start"]) == (name, start)]

    def until(self, condition):
        """The time at which `condition()` held; RuntimeError when it will not."""
        deadline = time.monotonic() + DEADLINE
        while not condition():
            if time.monotonic() > deadline or self.launcher.poll():
                output = (self.folder / "output").read_text(errors="replace")
                raise RuntimeError(f"ended, or not within {DEADLINE:g} s:\n{output}")
            time.sleep(LOOK_EVERY)
        return time.monotonic()

    def up(self, least=0):
        """(which, when): the first start from `least` on of which all ranks were up."""

        def complete():
            starts = (start for start in range(least, self.restarts + 1))
            return next((s for s in starts if len(self.events("up", s)) >= self.nproc), None)

        self.until(lambda: complete() is not None)
        start = complete()
        return start, max(line["at"] for line in self.events("up", start))


def first(library, python, nproc, _):
    """Seconds from the launcher's start to the end of the first all_reduce on all ranks."""
    with folder() as place, Job(library, python, nproc, "first", place) as job:
        return job.up()[1] - job.began


def death(library, python, nproc, number):
    """{what: seconds after a kill}: the launcher knows, all survivors do, all train again."""
    with folder() as place, Job(library, python, nproc, "train", place, RESTARTS) as job:
        start, _ = job.up()
        victim = job.events("up", start)[number % nproc]
        struck, found = time.monotonic(), {}
        os.kill(victim["pid"], signal.SIGKILL)
        if library == "dtrain":  # says so to its ranks in a file
            path = f"dtrun-*/{start}/exit-{victim['rank']}"
            found["seen"] = job.until(lambda: any(job.folder.glob(path))) - struck
        try:
            found["again"] = job.up(start + 1)[1] - struck
        except RuntimeError:
            if library == "dtrain":
                raise
            found["again"] = math.inf  # torchrun gave up: each start found addresses of the dead
        told = [line["at"] for line in job.events("told", start)]
        if len(told) == nproc - 1:  # torchrun may have ended them before
            found["told"] = max(told) - struck
    return found


def stop(library, python, nproc, act, _):
    """Seconds from SIGINT until no process of the job is left."""
    with folder() as place, Job(library, python, nproc, act, place) as job:
        job.up()
        everybody = job.family()
        struck = time.monotonic()
        job.launcher.send_signal(signal.SIGINT)
        while any(map(runs, everybody)):
            if time.monotonic() > struck + DEADLINE:
                raise RuntimeError(f"{library}, {act}: not gone after {DEADLINE:g} s")
            job.launcher.poll()
            time.sleep(LOOK_EVERY)
        return time.monotonic() - struck


def runs(process):
    """Whether it is neither gone nor a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def folder():
    """A place whose name is short enough for unix sockets below it."""
    return tempfile.TemporaryDirectory(prefix="launch", dir="/tmp")


def measure(args, pythons):
    """(figure, {library: seconds of each trial}), one by one; the libraries take turns."""

    def trials(count, run, *given):
        found = {library: [] for library, _ in pythons}
        for number in range(count):
            for library, python in pythons:
                found[library].append(run(library, python, *given, number))
        return found

    for nproc in args.nproc if args.starts else ():
        yield f"first all_reduce, {nproc} ranks", trials(args.starts, first, nproc)
    died = trials(args.kills, death, 4)
    for what, name in DEATHS.items() if args.kills else ():
        yield name, {lib: [d[what] for d in found if what in d] for lib, found in died.items()}
    for act, name in STOPS.items() if args.stops else ():
        yield name, trials(args.stops, stop, 2, act)


def cell(seconds):
    """Median, longest and number; nothing when nothing was measured."""
    if not seconds:
        return ""
    return f"{statistics.median(seconds):.3f} ({max(seconds):.3f}) of {len(seconds)}"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nproc", type=int, nargs="+", default=[2, 4], help="ranks to start")
    parser.add_argument("--starts", type=int, default=3, help="of each number of ranks")
    parser.add_argument("--kills", type=int, default=3, help="each in a job of 4 ranks")
    parser.add_argument("--stops", type=int, default=1, help="of each kind")
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter with torch")
    return parser.parse_args()


def main():
    args = arguments()
    python = with_torch(args.torch_python)
    pythons = [("dtrain", sys.executable)] + [("torch", python)] * (python is not None)
    beside = "" if python else "; no PyTorch to compare with"
    print(f"# seconds: median (longest) of n, load {os.getloadavg()[0]:.1f}{beside}")
    print(f"# {'':<42}{'dtrun':<22}{'torchrun':<22}ratio")
    for name, found in measure(args, pythons):
        own, other = found["dtrain"], found.get("torch")
        ratio = ""
        if other and math.isfinite(statistics.median(other)):
            ratio = f"{statistics.median(own) / statistics.median(other):.2f}x"
        line = f"{name:<44}{cell(own):<22}{cell(other):<22}{ratio}"
        print(line.rstrip(), flush=True)


if __name__ == "__main__":
    main()
