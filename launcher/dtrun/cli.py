"""The command line: torchrun's everyday flags, checked, and the entry point `main`.

Every long flag is spelled with dashes or underscores and takes its default from PET_<NAME>. What
is wrong is said in one line, exit code 2. A flag that changes nothing here says so in its help. The
script's own arguments are passed on untouched.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from dtrun import debug, keeper, numa, options, output, placement, secret
from dtrun.agent import Agent
from dtrun.cluster import ClusterAgent
from dtrun.keeper import CANNOT_START, PATIENCE_SECONDS
from dtrun.rendezvous import claim, make_run_dir, remove_leftovers, remove_run_dir
from dtrun.spec import STOP_SIGNALS, Spec, any_heeds


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints take one line."""

    flags: tuple[str, ...] = ()

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and exit with code 2."""
        self.exit(2, f"dtrun: error: {message}\n")

    def flag(self, name: str, short: str | None = None, **options: object) -> None:
        """Add `--some-name`, `--some_name` and perhaps a short form; the default may be PET_'s."""
        underscored = f"--{name[2:].replace('-', '_')}"
        names = [n for n in (short, *dict.fromkeys((name, underscored))) if n is not None]
        self.flags += (name,)
        variable = f"PET_{underscored[2:].upper()}"
        preset = os.environ.get(variable)
        if preset is not None:
            is_switch = options.get("action") == "store_true"
            options["default"] = self._switch(variable, preset) if is_switch else preset
        self.add_argument(*names, **options)  # type: ignore[arg-type]

    def _switch(self, variable: str, preset: str) -> bool:
        if preset not in ("0", "1"):
            self.error(f"{variable} must be 0 or 1, got {preset!r}")
        return preset == "1"


def make_parser() -> Parser:
    """All flags that are honoured."""
    parser = Parser(
        prog="dtrun",
        usage="dtrun [flags] training_script [script arguments]",
        description="Start the ranks of a distributed program on this machine and watch them; "
        "or, as dtrun keygen, print a new secret for --secret-file; as dtrun doctor, look whether "
        "this host can run them; as dtrun debug, show what the ranks of a run do; as dtrun k8s or "
        "dtrun slurm, print a manifest for these flags. "
        "Each flag takes its default from PET_<NAME>, as in torchrun.",
        allow_abbrev=False,
    )
    add = parser.flag
    add("--nproc-per-node", default="1", metavar="N", help="ranks: a number, or auto/cpu: cores")
    add("--standalone", action="store_true", help="one node, a free port: overrides --rdzv-*")
    add("--nnodes", default="1", metavar="N", help="nodes, or MIN:MAX, which may come and go")
    add("--node-rank", type=int, default=0, metavar="I", help="this node, from 0 (static)")
    add("--master-addr", default="127.0.0.1", metavar="HOST", help="where node 0 is")
    add("--master-port", default="0", metavar="PORT", help="default: a free one")
    add("--max-restarts", type=int, default=0, metavar="N", help="of the whole group")
    add("--module", "-m", action="store_true", help="run the script as python -m does")
    add("--no-python", action="store_true", help="the script is a program, not for Python")
    add("--run-path", action="store_true", help="the script, as without this flag (runpy's way)")
    add("--role", default="default", help="ROLE_NAME of the workers")
    add("--log-dir", metavar="DIR", help="for log and error files")
    streams = "files for 1 stdout, 2 stderr, 3 both, or per local rank: 0:1,1:3"
    add("--redirects", "-r", default="0", metavar="S", help=f"not on the console: {streams}")
    add("--tee", "-t", default="0", metavar="S", help=f"and on the console: {streams}")
    add("--local-ranks-filter", default="", metavar="I,J", help="show only these on the console")
    words = "copy lines with one of these words to filtered_std*.log; a comma in a word is ,,"
    add("--duplicate-stdout-filters", default="", metavar="W,W", help=words)
    add("--duplicate-stderr-filters", default="", metavar="W,W", help=words)
    add("--log-line-prefix-template", metavar="T", help="with ${role_name} ${local_rank} ${rank}")
    add("--monitor-interval", type=float, default=0.1, help="no effect: deaths are seen at once")
    timeout = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")
    seconds = "seconds for ranks that end by themselves when told (should_stop)"
    add("--shutdown-timeout", type=float, default=timeout, metavar="S", help=seconds)
    _add_the_rest(add)
    add("--rdzv-backend", default="static", help="static: --node-rank; c10d: places are given out")
    add("--rdzv-endpoint", default="", metavar="HOST[:PORT]", help="where nodes meet: the head")
    add("--rdzv-id", default=options.NO_RUN_ID, help="the run id; one node alone makes one up")
    add("--rdzv-conf", default="", metavar="K=V,...", help="times of the meeting, see the manual")
    add("--local-addr", default="", metavar="HOST", help="this node, as the others reach it")
    file = os.environ.get("DTRAIN_SECRET_FILE", "")
    add("--secret-file", default=file, metavar="PATH", help="of several nodes: see dtrun keygen")
    add("--data-plane", default="curve", metavar="MODE", help="plaintext: tensors unencrypted")
    parser.add_argument("training_script", nargs="?", help="script, module (-m) or program")
    parser.add_argument("training_script_args", nargs=argparse.REMAINDER)
    return parser


def _add_the_rest(add: Callable[..., None]) -> None:
    signals = "these end the run in order: each is passed on to the ranks"
    names = ",".join(signal.name for signal in STOP_SIGNALS)
    add("--signals-to-handle", default=names, metavar="S,S", help=signals)
    add("--virtual-local-rank", action="store_true", help="LOCAL_RANK is 0 for all ranks")
    add("--numa-binding", choices=numa.MODES, help="which cores a rank may use: see the manual")
    methods = ("spawn", "fork", "forkserver")
    add("--start-method", choices=methods, default="spawn", help="no effect: ranks are programs")
    add("--event-log-handler", default="null", help="no effect: dtrun keeps no log of events")
    add("--logs-specs", default="default", help="default; other entry points are not supported")


def parse(argv: Sequence[str]) -> Spec:
    """The checked launch; exits with code 2 and one line when something is wrong."""
    parser = make_parser()
    given, unknown = parser.parse_known_args(argv, placement.blank(os.environ))
    _refuse_unknown(parser, unknown)
    try:
        place = placement.settle(given, parser.get_default, os.environ)
        spec = options.spec_from(given)
    except ValueError as error:
        parser.error(str(error))
    if place is not None and place.node_rank == 0:
        told = placement.line(place, given.nnodes, spec.master_addr, spec.master_port)
        print(f"dtrun: {told}", file=sys.stderr)
    return spec


def main(argv: Sequence[str] | None = None) -> int:
    """Run dtrun and return its exit code; see `dtrun.agent` for what the code says."""
    output.open_standard_descriptors()
    argv = sys.argv[1:] if argv is None else argv
    if list(argv) == ["keygen"]:
        print(secret.fresh(), end="")
        return 0
    if list(argv[:1]) == ["debug"]:
        return debug.main(argv[1:])
    if list(argv[:1]) == ["doctor"]:
        from dtrun import doctor  # what it needs, a launch does not

        return doctor.main(argv[1:])
    if list(argv[:1]) in (["k8s"], ["slurm"]):
        return _print_manifest(argv[0], argv[1:])
    spec = parse(argv)
    try:
        run_dir = make_run_dir(os.environ)
        claim(run_dir)
        remove_leftovers(os.path.dirname(run_dir))
        debug.write_run_id(run_dir, spec.run_id)
    except OSError as error:
        print(f"dtrun: error: cannot make a run directory: {error}", file=sys.stderr)
        return CANNOT_START
    kind = Agent if spec.terms is None else ClusterAgent
    return keeper.keep(
        lambda signals: kind(spec, run_dir, os.environ, signals).run(),
        lambda: remove_run_dir(run_dir),
        lambda: PATIENCE_SECONDS + (spec.shutdown_timeout if any_heeds(run_dir) else 0.0),
        spec.stop_signals,
    )


def _print_manifest(kind: str, argv: Sequence[str]) -> int:
    from dtrun import manifests

    parser = make_parser()

    def flags(argv: Sequence[str]) -> argparse.Namespace:
        given, unknown = parser.parse_known_args(argv, placement.blank({}))
        _refuse_unknown(parser, unknown)
        return given

    try:
        print(manifests.main(kind, argv, parser, flags), end="")
    except ValueError as error:
        parser.error(str(error))
    return 0


def _refuse_unknown(parser: Parser, unknown: Sequence[str]) -> None:
    """Refuse what argparse left over, with the flag that was meant, perhaps."""
    if not unknown:
        return
    name = unknown[0].partition("=")[0].replace("_", "-")
    import difflib

    near = [flag for flag in parser.flags if flag.startswith(name)]
    near += difflib.get_close_matches(name, parser.flags, n=1)
    hint = f"; did you mean {near[0]}?" if near else "; see dtrun --help"
    parser.error(f"unknown flag {unknown[0]}{hint}")
