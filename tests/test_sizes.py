"""Style that a linter does not see: sizes, module docstrings, ASCII, line length.

The ceilings are where reading starts to hurt, not targets: aim at files of 80-200 lines and
functions of 4-8. A formatter leaves long strings and comments alone, so columns count here too.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tree import ROOT, python_files, sources

FILE_LINES = 450
FUNCTION_LINES = 80
COLUMNS = 100
DOCSTRING_LINES = 3


def complaints(text: str) -> Iterator[str]:
    """What is wrong with the size or shape of one file's text, a sentence for each."""
    lines = text.splitlines()
    if len(lines) > FILE_LINES:
        yield f"{len(lines)} lines, the ceiling is {FILE_LINES}: split it by what it owns"
    for number, line in enumerate(lines, 1):
        if len(line) > COLUMNS:
            yield f"line {number} has {len(line)} columns, the limit is {COLUMNS}"
        if not line.isascii():
            yield f"line {number} is not ASCII: {line.strip()!a}"
    tree = ast.parse(text)
    docstring = ast.get_docstring(tree)
    if docstring is None:
        yield "no module docstring: say what the file owns"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if length > FUNCTION_LINES:
                yield f"{node.name} (line {node.lineno}) has {length} lines of {FUNCTION_LINES}"


def thin_docstring(text: str) -> Iterator[str]:
    """A complaint when the module docstring is too short to say what it owns and its rules."""
    if len((ast.get_docstring(ast.parse(text)) or "").splitlines()) < DOCSTRING_LINES:
        yield f"the module docstring has {DOCSTRING_LINES} lines or more: what it owns, its rules"


def findings(paths: list[Path], check: Callable[[str], Iterator[str]]) -> str:
    """A line `file: complaint` for everything `check` says about the text of each file."""
    return "\n".join(
        f"{path.relative_to(ROOT)}: {complaint}"
        for path in paths
        for complaint in check(path.read_text(encoding="utf-8"))
    )


def test_every_file_keeps_the_limits():
    assert python_files("dtrain")
    assert python_files("tests")
    assert findings(python_files(), complaints) == ""


def test_every_shipped_module_says_what_it_owns():
    assert findings(list(sources().values()), thin_docstring) == ""


LONG_FUNCTION = "def f():\n" + "    pass\n" * FUNCTION_LINES


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("x = 1\n" * FILE_LINES, "lines, the ceiling is"),
        (f"x = '{'a' * COLUMNS}'\n", "columns"),
        ("x = 'na\u00efve'\n", "not ASCII"),
        (LONG_FUNCTION, "f (line 2) has 81 lines"),
        (f"class C:\n    {LONG_FUNCTION.replace(chr(10), chr(10) + '    ')}", "f (line 3)"),
    ],
)
def test_the_checker_sees(body, complaint):
    assert [c for c in complaints(f'"""Doc."""\n{body}') if complaint in c]


def test_the_checker_sees_a_missing_docstring_and_accepts_a_good_file():
    assert list(complaints("x = 1\n")) == ["no module docstring: say what the file owns"]
    assert not list(complaints('"""What it owns.\n\nIts rules.\n"""\n\n\ndef f():\n    return 1\n'))
    assert list(thin_docstring('"""One line."""\n'))
    assert not list(thin_docstring('"""What it owns.\n\nIts rules.\n"""\n'))
