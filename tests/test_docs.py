"""The documentation tells the truth: what it shows runs, what it links to exists.

Markdown is read with a few regular expressions, enough for the plain form our pages keep.
"""

from __future__ import annotations

import ast
import logging
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrun.cli import make_parser
from dtrun.spec import Attempt, Spec, environment
from tests import doc_tables, pages
from tests.tree import ROOT, SHIPPED, sources

README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
DOCS = sorted((ROOT / "docs").glob("*.md"))
PROGRAMS = [page for page in DOCS if pages.programs(page.read_text(encoding="utf-8"))]
CONSOLES = [page for page in DOCS if pages.commands(page.read_text(encoding="utf-8"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
EXAMPLE_LINES = 150
LEVELS = logging.getLevelNamesMapping().keys() | {"DETAIL"}  # of logging, no variables
NUMBER = re.compile(r"\d+\.\d+")


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """The `#fragment` of every heading, as Git hosts make them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


def broken_links(page: Path) -> Iterator[str]:
    """Relative links of a page whose file or heading does not exist."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if "://" in link:
            continue
        name, _, fragment = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists():
            yield f"{page.name}: {link}: no such file"
        elif fragment and fragment not in anchors(target.read_text(encoding="utf-8")):
            yield f"{page.name}: {link}: no such heading"


def same_but_for_rounding(shown: str, printed: str, tolerance: float = 0.01) -> bool:
    """Whether two outputs are equal where decimal numbers may differ by a relative tolerance."""
    pairs = zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=False)
    close = all(math.isclose(float(a), float(b), rel_tol=tolerance) for a, b in pairs)
    return close and NUMBER.sub("N", shown) == NUMBER.sub("N", printed)


def of_the_ranks(output: str) -> str:
    """What the ranks printed, sorted: only the order within a rank is fixed.

    Lines of dtrun's own are left out: they tell of the machine, such as its number of cores.
    """
    return "\n".join(sorted(s for s in output.splitlines() if not s.startswith("dtrun:")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert not list(broken_links(page))


def unknown_tests(text: str) -> list[str]:
    """Tests, as in `tests/x.py::test_y`, that a text names and that do not exist."""
    named = re.findall(r"`(tests/[\w/.]+)::(\w+)`", text)
    return [
        f"{path}::{name}"
        for path, name in named
        if not (ROOT / path).is_file()
        or not re.search(rf"^def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.M)
    ]


def test_an_unknown_test_is_seen():
    good, bad = f"tests/{Path(__file__).name}::test_an_unknown_test_is_seen", "tests/no.py::test_x"
    assert unknown_tests(f"`{good}`, `{good}_not`, `{bad}`") == [f"{good}_not", bad]


def test_tests_that_pages_name_exist():
    named = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
    assert "::test_" in named["ddp.md"]
    assert not [unknown for text in named.values() for unknown in unknown_tests(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_are_ascii_and_have_no_gap(page):
    text = page.read_text(encoding="utf-8")
    assert text.isascii()
    assert "GAP " not in text


def test_the_code_of_the_readme_prints_what_the_readme_shows(tmp_path):
    text = README.read_text(encoding="utf-8")
    (program,), (session, *_) = blocks(text, "python"), blocks(text, "console")
    command, shown = session.split("\n", 1)
    assert command == "$ dtrun --standalone --nproc-per-node 2 train.py"
    (tmp_path / "train.py").write_text(program)
    launcher = Path(sys.executable).with_name("dtrun")
    run = subprocess.run(
        [launcher, *command.split()[2:]],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=50,
        check=False,
    )
    assert run.returncode == 0, run.stdout
    assert same_but_for_rounding(of_the_ranks(shown), of_the_ranks(run.stdout)), run.stdout


def test_the_readme_names_real_commands_and_every_example():
    text = README.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = set(re.findall(r"\bmake ([a-z]+)", "\n".join(blocks(text, "(?:bash|console)"))))
    assert {"train", "test"} <= commands
    assert all(re.search(rf"^{command}:", makefile, re.MULTILINE) for command in commands)
    assert EXAMPLES
    assert not [path.name for path in EXAMPLES if f"(examples/{path.name})" not in text]


def test_examples_are_short():
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in EXAMPLES}
    assert lines
    assert not {name: count for name, count in lines.items() if count >= EXAMPLE_LINES}


def test_the_index_lists_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = [path for path in (ROOT / "docs").rglob("*.md") if path.name != "README.md"]
    assert pages
    assert not [page.name for page in pages if f"({page.relative_to(ROOT / 'docs')})" not in index]


def test_the_architecture_names_what_is_there():
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    children = [
        path for path in SHIPPED["dtrain"].iterdir() if not path.name.startswith((".", "__"))
    ]
    names = [f"{path.name}/" if path.is_dir() else path.name for path in children]
    assert not [name for name in names if name != "py.typed" and name not in text]


@pytest.mark.parametrize("page", PROGRAMS, ids=lambda page: page.name)
def test_the_programs_of_a_page_print_what_it_shows(page, tmp_path):
    programs = pages.programs(page.read_text(encoding="utf-8"))
    printed = pages.run_page(page, tmp_path)
    for program, output in zip(programs, printed, strict=True):
        assert pages.matches(program.shown, output), f"{program.code}\nprints:\n{output}"


@pytest.mark.parametrize("page", CONSOLES, ids=lambda page: page.name)
def test_the_commands_of_a_page_print_what_it_shows(page, tmp_path):
    text = page.read_text(encoding="utf-8")
    for name, content in pages.files(text).items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    for command, shown in pages.commands(text):
        printed = pages.run_command(command, tmp_path)
        assert pages.matches(shown, printed), f"$ {command}\nprints:\n{printed}"


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_no_block_of_a_page_goes_unread(page):
    """Output stands behind the program that prints it; other languages are not run."""
    languages = {b.language for b in pages.blocks(page.read_text(encoding="utf-8"))}
    assert languages <= pages.LANGUAGES - {"text"}


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_generated_tables_are_current(page):
    text = page.read_text(encoding="utf-8")
    assert doc_tables.filled(text) == text, "run: python -m tests.doc_tables"


def constants(tree: ast.AST) -> list[str]:
    """The strings in a piece of source; of an f-string the parts between its fields."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return [node.value for node in nodes if isinstance(node.value, str)]


def variables_read() -> set[str]:
    """Every name that the shipped source looks up in an environment, or gives to a process."""
    found: set[str] = set()
    for path in sources().values():
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if "environ" in text else ():
            if isinstance(node, ast.expr) and "environ" in ast.unparse(node):
                found |= set(constants(node))
    return {name for name in found if re.fullmatch(r"[A-Z][A-Z_]{3,}", name)}


def test_environment_variables_are_documented_and_read():
    text = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    read = variables_read()
    assert {"RANK", "DTRAIN_LOG", "PYTHON_EXEC", "XDG_RUNTIME_DIR"} <= read
    assert not [name for name in read if f"`{name}`" not in text]
    by_us = text.partition("## Set for worker")[0]
    assert set(re.findall(r"`([A-Z][A-Z_]{3,})`", by_us)) - {*pages.THREADS, *LEVELS} <= read


def test_errors_that_are_only_told_are_in_the_source():
    """An entry shows the error by a program that raises it, or names a part of its sentence."""
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    entries = re.findall(r"^### ([^\n]*)\n(.*?)(?=^##)", text + "##", re.MULTILINE | re.DOTALL)
    told = [heading for heading, body in entries if "```text" not in body]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sources().values()]
    said = "\n".join(part for tree in trees for part in constants(tree))
    assert len(told) < len(entries) / 2
    assert [heading for heading in told if heading not in said] == ["No module named 'torch'"]


def test_dtruns_page_has_what_a_rank_is_given_and_every_flag():
    text = (ROOT / "docs" / "dtrun.md").read_text(encoding="utf-8")
    given = environment(Spec("x.py", nproc=2), Attempt(0, "", 0, "", ""), 0, {})
    assert not [name for name in given if f"`{name}`" not in text]
    assert not [flag for flag in make_parser().flags if f"`{flag}`" not in text]


def test_the_checkers_see(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One `two`, three\n[a](gone.md) [b](#four) [c](#one-two-three) [d](page.md)\n"
    )
    assert list(broken_links(page)) == [
        "page.md: gone.md: no such file",
        "page.md: #four: no such heading",
    ]
    assert blocks("```python\nx\n```\n```bash\ny\n```\n", "python") == ["x\n"]
    assert same_but_for_rounding("step 1 loss 0.5000", "step 1 loss 0.5001")
    assert not same_but_for_rounding("step 1 loss 0.5000", "step 1 loss 0.6000")
    assert not same_but_for_rounding("step 1 loss 0.5000", "step 2 loss 0.5000")
    assert not same_but_for_rounding("loss 0.5", "loss 0.5 0.5")
    assert of_the_ranks("dtrun: 2 cores\n[rank1]: b\n[rank0]: a\n") == "[rank0]: a\n[rank1]: b"


PAGE = """```python
print(1 / 3)
```

```text
0.33...
```

```python
# file: one.py
print("one")
```

```console
$ python one.py
two
```

```python
raise KeyError("x")
```
"""


def test_the_runner_of_pages_sees(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    third, raising = pages.programs(PAGE)
    assert third.shown == "0.33...\n"
    printed = pages.run_page(page, tmp_path)
    assert pages.matches(third.shown, printed[0])
    assert printed[1] == "KeyError: 'x'\n"
    assert not pages.matches(raising.shown, printed[1])
    assert pages.files(PAGE) == {"one.py": 'print("one")\n'}
    assert pages.commands(PAGE) == [("python one.py", "two\n")]
    (tmp_path / "one.py").write_text('print("one")\n')
    assert pages.run_command("python one.py", tmp_path) == "one\n"
    assert pages.matches("[rank0]: a\n[rank1]: b\n", "[rank1]: b\n[rank0]: a\n")
    assert not pages.matches("[rank0]: a\n", "[rank0]: b\n")
