"""Runs the code that our pages show and compares what it prints with what they show.

A `python` block runs by itself in an empty directory; the `text` block right behind it is what it
prints, or the error that ends it. A block that begins with `# file: NAME` is that file, for the
`console` blocks of the page: each `$ command` there runs, and prints what follows it. `...` stands
for anything. The python blocks of a page run in one process: `python -m tests.pages PAGE`.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import json
import os
import re
import subprocess
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

from tests.tree import ROOT

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# file: (\S+)\n")
LANGUAGES = {"", "python", "text", "console", "bash", "diff"}
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Block(NamedTuple):
    """One fenced block: its language, its text, and the `text` block right behind it."""

    language: str
    code: str
    shown: str = ""


def blocks(text: str) -> list[Block]:
    """The blocks of a page in order, each `text` block joined to the code that prints it."""
    found: list[Block] = []
    end = 0
    for match in BLOCK.finditer(text):
        language, code = match.groups()
        between = text[end : match.start()].strip()
        if language == "text" and found and not between and found[-1].language == "python":
            found[-1] = found[-1]._replace(shown=code)
        else:
            found.append(Block(language, code))
        end = match.end()
    return found


def programs(text: str) -> list[Block]:
    """The python blocks that run by themselves."""
    return [b for b in blocks(text) if b.language == "python" and not FILE.match(b.code)]


def files(text: str) -> dict[str, str]:
    """The python blocks that are files: {name: content}."""
    python = [b.code for b in blocks(text) if b.language == "python"]
    return {found[1]: code[found.end() :] for code in python if (found := FILE.match(code))}


def commands(text: str) -> list[tuple[str, str]]:
    """(command, what it prints) of every `$ command` in the console blocks."""
    consoles = [b.code for b in blocks(text) if b.language == "console"]
    parts = [part for code in consoles for part in re.split(r"^\$ ", code, flags=re.M)[1:]]
    return [(command, shown) for command, _, shown in (p.partition("\n") for p in parts)]


def run(code: str, name: str) -> str:
    """What a program prints; the error that ends it is its last lines."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            exec(compile(code, name, "exec"), {"__name__": "__main__"})
        except Exception as error:
            print("".join(traceback.format_exception_only(error)), end="")
    return out.getvalue()


def run_page(page: Path, folder: Path) -> list[str]:
    """What each program of a page prints; they share a process, an empty folder and no names."""
    command = [sys.executable, "-W", "error", "-m", "tests.pages", str(page)]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=50, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def run_command(command: str, folder: Path) -> str:
    """What a shell command prints, with this interpreter's programs first in the path."""
    environ = {name: value for name, value in os.environ.items() if name not in THREADS}
    environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environ, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=50, check=False,
    )  # fmt: skip
    return done.stdout


def matches(shown: str, printed: str) -> bool:
    """Whether a program printed what a page shows, blanks and the order among ranks aside."""
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    return doctest.OutputChecker().check_output(ordered(shown), ordered(printed), flags)


def ordered(output: str) -> str:
    """The lines with neighbours from several ranks sorted: only the order within one is fixed."""
    lines = re.split(r"^((?:\[rank\d+\].*\n)+)", output, flags=re.MULTILINE)
    return "".join(
        "".join(sorted(part.splitlines(keepends=True))) if part.startswith("[rank") else part
        for part in lines
    )


if __name__ == "__main__":
    page = Path(sys.argv[1])
    shown = programs(page.read_text(encoding="utf-8"))
    results = [run(b.code, f"{page.name}, block {i}") for i, b in enumerate(shown, 1)]
    print(json.dumps(results))
