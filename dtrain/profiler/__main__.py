"""`python -m dtrain.profiler merge DIR`: all ranks' traces in one file, also after a crash.

Prints the path of the file. Nothing is recorded here: see `dtrain.tape`.
"""

from __future__ import annotations

import argparse

from dtrain.tape import merge


def main() -> None:
    """Parse the command line and merge."""
    parser = argparse.ArgumentParser(prog="python -m dtrain.profiler")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("merge", help="write DIR/trace.json from DIR/rank-*.json")
    command.add_argument("folder", metavar="DIR")
    print(merge(parser.parse_args().folder))


if __name__ == "__main__":
    main()
