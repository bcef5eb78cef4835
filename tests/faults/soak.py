"""Jobs that are killed again and again: `python -m tests.faults.soak [--minutes 10]`.

First each of the eighteen phases, two victims each, in one job; then one long job of which somebody
is killed every ten seconds: a rank, several, all, the launcher or its keeper, after which dtrun is
started again. Checked: nobody hangs, the final weights are those of a run without faults to the
last bit, nothing is left behind, dtrun grows in neither memory, descriptors nor threads. The counts
it prints stand in docs/reliability.md. `tests/faults/test_phases.py` runs a part of it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from tests.faults import phases
from tests.tree import ROOT

EVERY = 10.0  # seconds between kills, or until training goes on again
HANGS = 60.0  # seconds without any event in the history: somebody hangs
# Of the time between two looks, which are 0.1 s apart, no more counts for HANGS: what is missing,
# other programs had all cores for, and ranks cannot start without one.
COUNTS = 0.3
KINDS = ("a rank", "a rank", "two ranks", "all ranks", "the launcher", "the keeper", "everything")


class Job:
    """The training job in `folder`, started with dtrun as often as needed."""

    def __init__(self, folder: Path, world: int, steps: int, pause: float = 0.0) -> None:
        self.folder, self.world, self.steps, self.pause = folder, world, steps, pause
        self.runs = folder / "r"
        self.runs.mkdir()

    def start(self, restarts: int = 0, plan: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        """dtrun, its output in the folder."""
        flags = ["--nproc-per-node", self.world, "--max-restarts", restarts]
        script = [ROOT / "tests" / "faults" / "training.py", self.folder, self.steps, self.pause]
        command = [sys.executable, "-m", "dtrun", *flags, *script, *plan]
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PET_", "TORCHELASTIC_"))}
        path = os.pathsep.join([str(ROOT), str(ROOT / "launcher")])
        kept |= {"PYTHONPATH": path, "TMPDIR": str(self.runs)}
        with open(self.folder / "output", "ab") as output:
            return subprocess.Popen(
                list(map(str, command)),
                cwd=ROOT,
                env=kept,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def history(self) -> list[dict]:
        """What has happened so far."""
        with contextlib.suppress(FileNotFoundError):
            lines = (self.folder / "history").read_text().splitlines()
            return [json.loads(line) for line in lines]
        return []

    def note_strike(self, what: str) -> None:
        """A line in the history, as the job writes them."""
        line = {"at": time.monotonic(), "event": "struck", "phase": what}
        with open(self.folder / "history", "a") as file:
            file.write(json.dumps(line) + "\n")

    def output(self) -> str:
        """What dtrun and the ranks have printed."""
        return (self.folder / "output").read_text(errors="replace")

    def digests(self) -> set[str]:
        """Of the final weights of all ranks: one, if all is well."""
        ends = [line for line in self.history() if line["event"] == "end"]
        assert len(ends) >= self.world, self.output()[-5000:]
        return {line["digest"] for line in ends}

    def leftovers(self) -> list[str]:
        """Processes, files and shared memory that should be gone."""
        pids = {line["pid"] for line in self.history() if "pid" in line}
        found = [f"process {pid}" for pid in pids if _lives(pid)]
        places = (self.runs, Path(tempfile.gettempdir()), Path("/dev/shm"))
        found += [str(p) for pid in pids for base in places for p in base.glob(f"dtrain-{pid}-*")]
        found += [str(p) for p in self.runs.iterdir()]
        found += [str(p) for p in (self.folder / "checkpoints").iterdir() if "partial" in p.name]
        names = Path("/proc/net/unix").read_text()
        return found + [f"@dtrain-{pid}-" for pid in pids if f"dtrain-{pid}-" in names]


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def recoveries(history: Sequence[dict]) -> list[float]:
    """Seconds from each strike to the first step that all ranks have done after it."""
    found = []
    strikes = [line["at"] for line in history if line["event"] == "struck"]
    for struck, until in zip(strikes, [*strikes[1:], float("inf")], strict=True):
        steps = [
            line["at"]
            for line in history
            if line["event"] in ("step", "end") and struck < line["at"] < until
        ]
        if steps:
            found.append(
                max(steps[: len({line.get("rank") for line in history} - {None})]) - struck
            )
    return found


def told(history: Sequence[dict]) -> list[float]:
    """Seconds from each strike until a surviving rank had raised an error that says so."""
    strikes = [line["at"] for line in history if line["event"] == "struck"]
    lost = [line["at"] for line in history if line["event"] == "lost"]
    return [at - max(s for s in strikes if s < at) for at in lost if strikes and at > strikes[0]]


def reference(folder: Path, world: int, steps: int) -> str:
    """The digest of a run without faults."""
    job = Job(_fresh(folder, "reference"), world, steps)
    assert job.start().wait(600) == 0, job.output()
    (digest,) = job.digests()
    return digest


def through_phases(folder: Path, world: int, plan: Sequence[tuple[str, int]], steps: int) -> Job:
    """A job that is killed once in each phase of `plan`, run to its end."""
    job = Job(_fresh(folder, "phases"), world, steps)
    process = job.start(len(plan), [f"{name}:{victim}" for name, victim in plan])
    try:
        code = process.wait(60 + 30 * len(plan))
    finally:
        _end(process)
    assert code == 0, job.output()[-5000:]
    struck = [line["phase"] for line in job.history() if line["event"] == "struck"]
    assert struck == [name for name, _ in plan]
    return job


def _fresh(folder: Path, name: str) -> Path:
    path = folder / name
    path.mkdir()
    return path


class Trouble(Exception):
    """A promise that was not kept."""


def soak(folder: Path, world: int, minutes: float, seed: int) -> tuple[Job, dict[str, int], str]:
    """The long job; how often what was killed, and how dtrun has grown."""
    dice = random.Random(seed)
    job = Job(_fresh(folder, "soak"), world, steps=int(minutes * 60 * 8), pause=0.1)
    counts: dict[str, int] = dict.fromkeys(KINDS, 0)
    process, sizes = job.start(10_000), []
    due = time.monotonic() + EVERY
    still, events, looked = 0.0, 0, time.monotonic()
    try:
        while (code := process.poll()) is None or code != 0:
            if code is not None:
                process = job.start(10_000)
            history = job.history()
            still = 0.0 if len(history) > events else still + _counted(looked)
            events, looked = len(history), time.monotonic()
            if still > HANGS + EVERY:
                raise Trouble(f"nothing has happened for {HANGS:g} s: {job.output()[-5000:]}")
            trains = bool(history) and history[-1]["event"] == "step"
            if time.monotonic() >= due and code is None and trains:
                due = time.monotonic() + EVERY
                kind = dice.choice(KINDS)
                victims = _victims(process.pid, kind, dice)
                if victims:
                    sizes.append(_size(process.pid))
                    job.note_strike(kind)
                    counts[kind] += 1
                    for victim in victims:
                        with contextlib.suppress(psutil.NoSuchProcess):
                            victim.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
    finally:
        _end(process)
    return job, counts, _growth([size for size in sizes if size])


def _counted(looked: float) -> float:
    return min(time.monotonic() - looked, COUNTS)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop a job that still runs, because of what was found."""
    if process.poll() is None:
        process.terminate()  # SIGINT may be ignored, as under nohup
        process.wait(HANGS)


def _victims(keeper: int, kind: str, dice: random.Random) -> list[psutil.Process]:
    """Whom to kill; nobody while dtrun is not complete."""
    outer = psutil.Process(keeper)
    launchers = outer.children()
    ranks = launchers[0].children() if launchers else []
    if not ranks:
        return []
    dice.shuffle(ranks)
    return {
        "a rank": ranks[:1],
        "two ranks": ranks[:2],
        "all ranks": ranks,
        "the launcher": launchers,
        "the keeper": [outer],
        "everything": [outer, *launchers, *ranks],
    }[kind]


def _size(keeper: int) -> tuple[int, int, int, int] | None:
    """Memory, descriptors and threads of the launcher, and which it is."""
    launchers = psutil.Process(keeper).children()
    if not launchers:
        return None
    one = launchers[0]
    return one.memory_info().rss, one.num_fds(), one.num_threads(), one.pid


def _growth(sizes: Sequence[tuple[int, int, int, int]]) -> str:
    """How the launchers have grown from their first strike to their last."""
    lives: dict[int, list[tuple[int, int, int, int]]] = {}
    for size in sizes:
        lives.setdefault(size[3], []).append(size)
    grown = [
        [late - early for early, late in zip(life[0], life[-1], strict=True)]
        for life in lives.values()
    ]
    worst = [max(one[i] for one in grown) for i in range(3)]
    return (
        f"at most {worst[0] / 1024:.0f} KiB, {worst[1]} descriptors, {worst[2]} threads in one life"
    )


def _say(name: str, seconds: Sequence[float]) -> None:
    if seconds:
        median, most = statistics.median(seconds), max(seconds)
        print(f"  {name}: median {median:.2f} s, most {most:.2f} s, n = {len(seconds)}", flush=True)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A place whose name is short enough for unix sockets below it."""
    with tempfile.TemporaryDirectory(prefix="soak", dir="/tmp") as name:
        yield Path(name)


def report(job: Job, expected: str) -> None:
    """Print what was found; raises Trouble where it is not what is promised."""
    history = job.history()
    _say("a survivor has raised", told(history))
    _say("training again", recoveries(history))
    if job.digests() != {expected}:
        raise Trouble(f"the final weights differ: {job.digests()}, expected {expected}")
    if left := job.leftovers():
        raise Trouble(f"left behind: {left}")
    print("  final bits equal, nothing left behind, no hang", flush=True)


def main() -> None:
    """Run both, and print the counts."""
    parser = argparse.ArgumentParser(description="Kill a training job again and again.")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--world", type=int, default=4)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    given = parser.parse_args()
    print(f"seed {given.seed}, {given.world} ranks", flush=True)
    with _folder() as folder:
        plan = phases.kills(given.world)
        expected = reference(folder, given.world, 150)
        job = through_phases(folder, given.world, plan, 150)
        print(f"phases: {len(plan)} kills in {len(phases.PHASES)} phases", flush=True)
        report(job, expected)
    with _folder() as folder:
        job, counts, growth = soak(folder, given.world, given.minutes, given.seed)
        expected = reference(folder, given.world, job.steps)
        kills = ", ".join(f"{kind} {count}" for kind, count in counts.items())
        print(
            f"soak: {sum(counts.values())} kills: {kills}\n  launcher grown: {growth}", flush=True
        )
        report(job, expected)


if __name__ == "__main__":
    main()
