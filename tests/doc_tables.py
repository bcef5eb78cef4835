"""The tables in docs/ that are made from the code: dtrun's flags, the names of every module.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. `python -m tests.doc_tables` puts
the current ones into the pages; `tests/test_docs.py` fails while a committed one is out of date.
What PyTorch has is read from a recording, so neither needs PyTorch.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable
from types import ModuleType

from dtrain import Tensor
from dtrun import cli
from tests.recorded import load_json
from tests.tree import ROOT

DOCS = ROOT / "docs"
TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

# What is missing there would only be a long list.
ONLY_PRESENT = {"torch", "torch.Tensor"}
NO_DEFAULT = {"None", "False", ""}


def flags() -> str:
    """The flags that dtrun honours, from its parser."""
    rows = ["| flag | default | meaning |", "| --- | --- | --- |"]
    for action in cli.make_parser()._actions:
        if action.option_strings and action.dest != "help":
            names = [n for n in action.option_strings if "_" not in n]
            default = f"`{action.default}`" if str(action.default) not in NO_DEFAULT else ""
            shown = ", ".join(f"`{n}`" for n in sorted(names, key=len, reverse=True))
            rows.append(f"| {shown} | {default} | {action.help} |")
    return "\n".join(rows)


def paragraph(words: list[str], lead: str = "") -> str:
    """Words joined by commas in lines of 100 columns."""
    text = lead + ", ".join(words)
    return textwrap.fill(text, 100, break_on_hyphens=False, break_long_words=False)


def defined(path: str) -> set[str]:
    """What a module or class of ours means to show: definitions and `import a as a`, or __all__."""
    if path == "dtrain.Tensor":
        return set(dir(Tensor))
    module = importlib.import_module(path)
    found = set(getattr(module, "__all__", ()))
    for node in () if found else ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname for alias in node.names if alias.asname}
    return {name for name in found if not isinstance(getattr(module, name), ModuleType)}


def has(ours: object, name: str) -> bool:
    """Whether the name is there and what it loads is, too."""
    try:
        return hasattr(ours, name)
    except ModuleNotFoundError:
        return False


def names() -> str:
    """A section for each module: what is here, and what PyTorch has besides."""
    parts = []
    for name, recorded in load_json("public_names").items():
        path, theirs = name.replace("torch", "dtrain", 1), set(recorded)
        ours = Tensor if path == "dtrain.Tensor" else importlib.import_module(path)
        here = {n for n in theirs if has(ours, n)}
        own = {n for n in defined(path) - theirs if not n.startswith("_")}
        parts += [f"### {name}", "", listed(here)]
        parts += ["", listed(own, "Not in PyTorch: ")] if own else []
        missing = set() if name in ONLY_PRESENT else theirs - here
        parts += ["", listed(missing, "Missing: ")] if missing else []
        parts.append("")
    return "\n".join(parts).rstrip()


def listed(found: set[str], lead: str = "") -> str:
    return paragraph([f"`{n}`" for n in sorted(found, key=lambda n: (n.lower(), n))], lead)


TABLES: dict[str, Callable[[], str]] = {
    "flags": flags, "names": names,
}  # fmt: skip


def filled(text: str) -> str:
    """A page with its tables as they should be."""
    return TABLE.sub(lambda m: f"{m[1]}\n{TABLES[m[2]]()}\n\n{m[3]}", text)


if __name__ == "__main__":
    for page in sorted(DOCS.glob("*.md")):
        before = page.read_text(encoding="utf-8")
        if filled(before) != before:
            page.write_text(filled(before), encoding="utf-8")
            print(f"{page.relative_to(ROOT)}: updated")
