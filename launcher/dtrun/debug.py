"""`dtrun debug [RUN]`: the table of a run that hangs or has failed, from another terminal.

RUN is a run id, a run directory, or a log directory of `--log-dir`; without it, the one run of this
user that there is. Owns: finding the directory of the last attempt, and asking a process of its own
for the text: reading records loads dtrain and NumPy, whose threads a launcher that forks does
without. Exit code 0, or 2 with one line when there is no such run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dtrun import table
from dtrun.rendezvous import RUN_FILE
from dtrun.spec import interpreter_flags

SHOWN = 10
PATIENCE_SECONDS = 10.0


def main(argv: Sequence[str]) -> int:
    """Print the table; see above."""
    parser = argparse.ArgumentParser(
        prog="dtrun debug", description="Show what the ranks of a run did last and do now."
    )
    parser.add_argument("run", nargs="?", help="run id, run directory or log directory")
    parser.add_argument("-n", type=int, default=SHOWN, help="calls of each group (default 10)")
    # For dtrun's own use: the lines of its report, and copies of the records beside the logs.
    parser.add_argument("--report", metavar="COPY_TO", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.report is not None:
        sys.stdout.writelines(f"{line}\n" for line in table.last_calls(given.run))
        if given.report:
            keep_records(given.run, given.report)
        return 0
    try:
        directory = find(given.run, os.environ)
    except LookupError as error:
        print(f"dtrun debug: error: {error}", file=sys.stderr)
        return 2
    sys.stdout.write(table.table(directory, given.n))
    return 0


def find(run: str | None, environ: Mapping[str, str]) -> str:
    """The directory with the flight records of the last attempt; LookupError without one."""
    if run is not None and os.path.isdir(run):
        return _records_in(Path(run))
    runs = [path for path in run_dirs(environ) if run is None or _id_of(path) == run]
    if not runs:
        what = "no run of this user" if run is None else f"no run, and no directory, {run!r}"
        raise LookupError(f"there is {what} on this host")
    if len(runs) > 1:
        listed = ", ".join(f"{_id_of(path)} ({path})" for path in runs)
        raise LookupError(f"there are several runs: {listed}; name one")
    return _records_in(runs[0])


def run_dirs(environ: Mapping[str, str]) -> list[Path]:
    """The run directories of this user, wherever `rendezvous.make_run_dir` may have put them."""
    bases = [environ.get("XDG_RUNTIME_DIR"), environ.get("TMPDIR"), "/tmp"]
    found = {path for base in bases if base for path in Path(base).glob(f"dtrun-*/{RUN_FILE}")}
    return sorted(path.parent for path in found if path.stat().st_uid == os.geteuid())


def _id_of(run_dir: Path) -> str:
    return (run_dir / RUN_FILE).read_text(encoding="utf-8")


def _records_in(directory: Path) -> str:
    """`directory`, or the last attempt below it (of the youngest run in a log directory)."""
    depths = ("flight-*", "*/flight-*", "*/*/flight-*")
    found = [path.parent for depth in depths for path in directory.glob(depth)]
    if not found:
        raise LookupError(f"no rank has joined a group yet: no flight record in {directory}")
    return str(max(found, key=lambda path: path.stat().st_mtime))


def keep_records(run_dir: str, target: str) -> None:
    """Keep the records of an attempt that has ended."""
    from dtrain import flight

    for path in Path(run_dir).glob("flight-*"):
        flight.copy(path, Path(target, path.name))


def ask(directory: str, *options: str) -> str:
    """What `dtrun debug` says of a directory, or what went wrong; "" without records.

    Blocks at most PATIENCE_SECONDS.
    """
    if not table.has_records(directory):
        return ""
    command = [sys.executable, *interpreter_flags(), "-m", "dtrun", "debug", directory, *options]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=PATIENCE_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"dtrun: cannot read the flight records: {error}\n"
    return done.stdout or done.stderr


def write_run_id(run_dir: str, run_id: str) -> None:
    """Say which run a run directory belongs to."""
    Path(run_dir, RUN_FILE).write_text(run_id, encoding="utf-8")
