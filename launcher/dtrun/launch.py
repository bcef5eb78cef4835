"""`python -m dtrun.launch`: torch.distributed.launch's idiom: scripts that parse `--local-rank`.

Owns: the one flag more, `--use-env`, without which each worker is given `--local-rank=N` in front
of the script's own arguments. All else is dtrun.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dtrun import cli

FLAG = "--local-rank=${local_rank}"


def arguments(argv: Sequence[str]) -> list[str]:
    """What dtrun is given for these; ValueError for a program that must have --use-env."""
    parser = cli.make_parser()
    parser.add_argument("--use-env", "--use_env", action="store_true")
    given, _ = parser.parse_known_args(argv)
    script = len(argv) - len(given.training_script_args)
    head = [word for word in argv[:script] if word not in ("--use-env", "--use_env")]
    if given.use_env or given.training_script is None:
        return [*head, *argv[script:]]
    if given.no_python:
        raise ValueError(
            "When using the '--no-python' flag, you must also set the '--use-env' flag."
        )
    return [*head, FLAG, *argv[script:]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run dtrun and return its exit code."""
    print(
        "dtrun: torch.distributed.launch's idiom is deprecated: use dtrun, and read "
        "os.environ['LOCAL_RANK'] instead of --local-rank",
        file=sys.stderr,
    )
    try:
        return cli.main(arguments(sys.argv[1:] if argv is None else argv))
    except ValueError as error:
        cli.make_parser().error(str(error))


if __name__ == "__main__":
    sys.exit(main())
