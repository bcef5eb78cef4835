"""`dtrun doctor`: can this host run dtrain? Each finding with its remedy; exit code 1 for a failed.

Owns: the command, and the findings about the library, which a process of its own looks at: the
launcher loads neither dtrain nor NumPy. The findings about the host are in `dtrun.findings`. Last,
two ranks really run. Takes about two seconds; nothing is changed, and but for the endpoint of a job
that is asked about nothing leaves this host.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dtrun import cli, findings, options
from dtrun.findings import FAILED, OK, PATIENCE_SECONDS, WARNING, Finding
from dtrun.keeper import CANNOT_START
from dtrun.spec import cores, interpreter_flags

LEAST_MEMORY = 512 << 20  # bytes: an interpreter with dtrain takes 60 MiB, and then comes a model
WIDTH = 100
PRESETS = "PET_"  # what begins so sets flags of dtrun, which are not for the trial


def main(argv: Sequence[str]) -> int:
    """Look, print, and return 1 if something failed."""
    parser = argparse.ArgumentParser(
        prog="dtrun doctor",
        description="Look whether this host can run dtrain; each finding with its remedy.",
    )
    parser.add_argument("--rdzv-endpoint", metavar="HOST[:PORT]", help="look at the way there, too")
    given = parser.parse_args(argv)
    found = []
    for finding in examine(os.environ, given.rdzv_endpoint):
        print("\n".join(lines(finding)), flush=True)
        found.append(finding)
    print(summary(found))
    return 1 if any(one.state == FAILED for one in found) else 0


def examine(environ: Mapping[str, str], endpoint: str | None = None) -> Iterator[Finding]:
    """Every finding, as soon as it is made."""
    yield from (check() for check in findings.HOST)
    if endpoint is not None:
        host, colon, port = endpoint.rpartition(":")
        host, port = (host, port) if colon and port.isdecimal() else (endpoint, "")
        yield findings.endpoint(host.strip("[]"), int(port or options.DEFAULT_PORT))
    facts = library_facts(environ)
    yield library(facts)
    if "error" not in facts:
        yield from (blas(facts), processors(facts), memory(facts), variables(facts, environ))
        yield two_ranks(environ)


def lines(finding: Finding) -> list[str]:
    """`ok       names          vm is 10.0.0.2`; a remedy stands on lines of its own."""
    head = f"{finding.state:8} {finding.check:14} "
    text = _wrapped(head, finding.what)
    return text + _wrapped(" " * len(head) + "-> ", finding.remedy) if finding.remedy else text


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=head, subsequent_indent=" " * len(head),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def summary(found: Sequence[Finding]) -> str:
    """`14 checks: 13 ok, 1 warning, 0 failed`."""
    count = {state: sum(one.state == state for one in found) for state in (OK, WARNING, FAILED)}
    warnings = f"{count[WARNING]} warning{'' if count[WARNING] == 1 else 's'}"
    return f"{len(found)} checks: {count[OK]} ok, {warnings}, {count[FAILED]} failed"


def library_facts(environ: Mapping[str, str]) -> dict[str, Any]:
    """What `python -m dtrain --json` says; or {"error": why it says nothing}."""
    command = [environ.get("PYTHON_EXEC", sys.executable), *interpreter_flags()]
    code, out, err = _run([*command, "-m", "dtrain", "--json"], environ)
    if code:
        return {"error": err.strip().splitlines()[-1] if err.strip() else f"exit code {code}"}
    facts: dict[str, Any] = json.loads(out)
    return facts


def library(facts: Mapping[str, Any]) -> Finding:
    """dtrain and what it needs can be imported by the interpreter of the ranks."""
    if "error" in facts:
        return Finding(
            "library", FAILED, f"dtrain cannot be loaded: {facts['error']}",
            "install it for this interpreter (python -m pip install dtrain), or set PYTHON_EXEC to "
            "the one that has it",
        )  # fmt: skip
    if not facts["zmq_curve"]:
        return Finding(
            "library", WARNING, "this ZeroMQ is built without CURVE: no job over several hosts",
            "install PyPI's pyzmq, which has it: python -m pip install --force-reinstall pyzmq",
        )  # fmt: skip
    what = f"dtrain {facts['dtrain']}, NumPy {facts['packages']['numpy']}, ZeroMQ {facts['zmq']}"
    return Finding("library", OK, what)


def blas(facts: Mapping[str, Any]) -> Finding:
    """NumPy has a BLAS, of this processor's kernels, and it computes right."""
    named = ", ".join(f"{one['internal_api']} {one['version']}" for one in facts["blas"])
    if not facts["products_exact"]:
        return Finding(
            "blas", FAILED, f"matrix products are wrong ({named or 'no BLAS known'})",
            "unset OPENBLAS_CORETYPE, or set it to an older processor's; upgrade NumPy",
        )  # fmt: skip
    if not named:
        return Finding(
            "blas", WARNING, "NumPy uses none that is known: products may be many times slower",
            "install NumPy's own wheel: python -m pip install --force-reinstall numpy",
        )  # fmt: skip
    kernels = ", ".join(str(one["architecture"]) for one in facts["blas"])
    if pinned := facts["variables"].get("OPENBLAS_CORETYPE"):
        return Finding(
            "blas", WARNING, f"{named}, held to the kernels of {pinned} by OPENBLAS_CORETYPE",
            "unset it, unless this BLAS computes wrongly without: the newest kernels can be twice "
            "as fast",
        )  # fmt: skip
    return Finding("blas", OK, f"{named}, kernels for {kernels}, products are exact")


def processors(facts: Mapping[str, Any]) -> Finding:
    """As much processor time as `--nproc-per-node auto` counts on."""
    quota, usable = facts["processor_quota"], facts["cores_usable"]
    if quota is not None and quota < usable:
        return Finding(
            "processors", WARNING, f"{usable} cores, but a limit to the time of {quota:g}",
            f"--nproc-per-node {max(1, int(quota))} instead of auto, or raise the limit of "
            "processor time",
        )  # fmt: skip
    return Finding("processors", OK, f"{usable} cores of {facts['processor']}")


def memory(facts: Mapping[str, Any]) -> Finding:
    """Memory that can still be had, within the control group's limit."""
    free, limit = facts["memory_available"], facts["memory_limit"]
    if free is None:
        return Finding("memory", WARNING, "how much is left cannot be read", "mount /proc")
    within = "" if limit is None else f" of a limit of {limit / 2**30:.1f} GiB"
    what = f"{free / 2**30:.1f} GiB can be had{within}"
    if free < LEAST_MEMORY:
        return Finding(
            "memory", WARNING, what, "end other programs, or raise the container's limit of memory"
        )
    return Finding("memory", OK, what)


def variables(facts: Mapping[str, Any], environ: Mapping[str, str]) -> Finding:
    """No variable with our prefixes is set that nothing reads, as one that is misspelt."""
    flags = [_preset(flag) for flag in cli.make_parser().flags]
    unknown: dict[str, str] = dict(facts["unknown_variables"])
    for name in sorted(environ):
        if name.startswith(PRESETS) and name not in flags:
            unknown[name] = next(iter(difflib.get_close_matches(name, flags, n=1)), "")
    if not unknown:
        return Finding("variables", OK, "each DTRAIN_ and PET_ variable that is set is read")
    near = [f"{one} instead of {name}" for name, one in unknown.items() if one]
    return Finding(
        "variables", WARNING, f"nothing reads {', '.join(unknown)}",
        f"did you mean {', '.join(near)}?" if near else "unset what is not needed any more",
    )  # fmt: skip


def _preset(flag: str) -> str:
    return PRESETS + flag.removeprefix("--").replace("-", "_").upper()


def two_ranks(environ: Mapping[str, str]) -> Finding:
    """Two ranks start, meet and add, as a program's would."""
    run = ["--standalone", "--nproc-per-node", "2", "-m", "dtrain.distributed.selftest"]
    command = [sys.executable, *interpreter_flags(), "-m", "dtrun", *run]
    plain = {name: value for name, value in environ.items() if not name.startswith(PRESETS)}
    threads = {"OMP_NUM_THREADS": str(max(1, cores() // 2))}
    code, out, err = _run(command, threads | plain)
    if code:
        said = [line for line in err.splitlines() if "Error" in line or "error" in line]
        last = (said or err.strip().splitlines() or [f"exit code {code}"])[-1]
        return Finding(
            "two ranks", FAILED, last.strip(),
            "run it for the whole report: dtrun --nproc-per-node 2 -m dtrain.distributed.selftest",
        )  # fmt: skip
    return Finding("two ranks", OK, out.strip().rpartition("]: ")[2])


def _run(command: Sequence[str], environ: Mapping[str, str]) -> tuple[int, str, str]:
    """Exit code, output and errors of a process; CANNOT_START and why if it did not end."""
    try:
        done = subprocess.run(
            command, env=dict(environ), capture_output=True, text=True, errors="replace",
            stdin=subprocess.DEVNULL, timeout=PATIENCE_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return CANNOT_START, "", f"no end after {PATIENCE_SECONDS:.0f} s: {shlex.join(command)}"
    except OSError as error:
        return CANNOT_START, "", str(error)
    return done.returncode, done.stdout, done.stderr
