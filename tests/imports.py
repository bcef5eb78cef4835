"""Imports read from source text by `ast`, and the layers they must respect.

`imports_of` turns one module's text into `Import` edges; `violations` judges the edges of a set of
modules against the table below. Nothing is executed. `tests/test_layers.py` applies it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

# The longest name that matches decides. An import goes to a lower row, or sideways inside a package
# (`dtrain.comm`, `dtrain.nn` ...); the two towers never see each other. A module without a row is
# an error: give it one.
BASE = (
    *(
        "errors",
        "env",
        "flight",
        "letters",
        "logs",
        "machine",
        "processes",
        "stacks",
        "tape",
        "version",
    ),
    "wire",
    *("cuda", "device", "draws", "dtypes", "generator", "heap", "missing", "random", "ranks"),
    "threads",
)
COMPUTE = (
    ("flat",),
    ("autograd",),
    ("ops",),
    ("printing",),
    ("interop",),
    ("tensor",),
    ("legacy", "meta"),
    ("methods",),
    ("flat",),
    ("nn", "optim", "utils"),
    ("serialization",),
)
COMM = (
    ("comm.store", "comm.transports", "comm.security", "comm.topology", "comm.work", "comm.record"),
    ("comm.vigil", "comm.witness"),
    ("comm.channel", "comm.arrays", "comm.parts", "comm.reduce"),
    ("comm.chain",),
    ("comm.window_algorithms", "comm.island_algorithms"),
    ("comm.collectives", "comm.algorithms", "comm.shards"),
    ("comm.agreement", "comm.blame", "comm.monitored", "comm.point_to_point", "comm.sharing"),
    ("comm.fake", "comm.group", "comm.mpi", "comm.mpi_calls"),
    ("comm",),
)
ABOVE = (
    ("futures", "multiprocessing"),
    ("distributed", "distributed.fsdp.wrap"),
    ("nn.parallel", "inductor", "profiler"),
    ("distributed.fsdp", "distributed.checkpoint"),
    ("distributed.elastic",),
    ("distributed.launcher",),
    ("elastic",),
    ("testing",),
    ("__main__",),
    ("",),  # dtrain itself: the public names
)

CORE = {"numpy", "zmq", "msgpack", "ml_dtypes"}
# Heavy and seldom needed: imported inside the function that needs them (`dtrain.testing` is itself
# loaded by tests only).
LAUNCHER_READS = ("dtrain.comm.store", "dtrain.comm.security.addresses", "dtrain.errors")
LAUNCHER_READS += ("dtrain.flight", "dtrain.stacks")
LAZY = {"cloudpickle", "mpi4py", "psutil", "safetensors", "threadpoolctl"}
# A package's face may load sub-packages when they are first asked for, a registry what it lists.
DYNAMIC = {"dtrain", "dtrain.autograd", "dtrain.nn", "dtrain.utils", "dtrain.distributed"}
DYNAMIC |= {"dtrain.comm.transports.base", "dtrain.testing.rank", "dtrain.distributed.rpc.names"}
DYNAMIC |= {"dtrain.distributed.nn"}
DYNAMIC |= {"dtrain.distributed.fsdp"}


@dataclass(frozen=True)
class Layer:
    """Where a module stands: its tower, its row in it, and the table entry that put it there."""

    tower: str
    row: int
    name: str


@dataclass(frozen=True)
class Import:
    """`source` imports `target` at `line`; `place` is "module", "function" or "typing"."""

    source: str
    target: str
    line: int
    place: str

    def __str__(self) -> str:
        return f"{self.source} line {self.line} imports {self.target}"


def layers() -> dict[str, Layer]:
    """Every row of the table above, by full name."""
    rows = [("base", (BASE,)), ("compute", COMPUTE), ("comm", COMM), ("above", ABOVE)]
    return {
        f"dtrain.{name}".rstrip("."): Layer(tower, row, name)
        for tower, table in rows
        for row, names in enumerate(table)
        for name in names
    }


def layer_of(module: str) -> Layer | None:
    """The layer of the longest table entry that is `module` or one of its parents."""
    table, parent = layers(), module
    while parent not in table and "." in parent:
        parent = parent.rpartition(".")[0]
    # Everything is below these two: only the package itself stands on its row.
    return None if parent in ("dtrain", "dtrain.comm") and parent != module else table.get(parent)


def may_import(source: Layer, target: Layer) -> bool:
    """Whether a module of `source` may import one of `target`."""
    if source == target or target.tower == "base":
        return True
    if source.tower == target.tower:
        together = source.name.partition(".")[0] == target.name.partition(".")[0]
        return target.row < source.row or (target.row == source.row and together)
    return source.tower == "above"


def imports_of(module: str, text: str, known: Mapping[str, str]) -> Iterator[Import]:
    """Each import in `text`; `from package import name` names the sub-module when there is one."""

    def visit(node: ast.AST, place: str) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, node.lineno, place)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                target = inner if inner in known else str(node.module)
                yield Import(module, target, node.lineno, place)
        elif isinstance(node, ast.Call) and _is_dynamic(node.func):
            yield Import(module, "<dynamic>", node.lineno, place)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            place = "function"
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            place = "typing"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, place)

    yield from visit(ast.parse(text), "module")


def _is_dynamic(function: ast.expr) -> bool:
    return ast.unparse(function) in {"importlib.import_module", "import_module", "__import__"}


def violations(modules: Mapping[str, str]) -> list[str]:
    """Every broken rule in `modules` (name -> source text), as sentences."""
    found = [
        f"{name} has no layer: give it a row in tests/imports.py"
        for name in modules
        if name.startswith("dtrain.") and layer_of(name) is None
    ]
    for name, text in modules.items():
        judge = _judge_launcher if name.partition(".")[0] == "dtrun" else _judge_library
        for edge in imports_of(name, text, modules):
            reason = judge(edge)
            if reason:
                found.append(f"{edge}: {reason}")
    return found


def _judge_library(edge: Import) -> str | None:
    top = edge.target.partition(".")[0]
    if top == "<dynamic>":
        return None if edge.source in DYNAMIC else "importing by computed name hides the layering"
    if top == "dtrain":
        return _judge_own(edge)
    if top in sys.stdlib_module_names or top == "dtrun":
        return "the launcher is above the library" if top == "dtrun" else None
    if top in LAZY:
        early = edge.place == "module" and not edge.source.startswith("dtrain.testing")
        return "import it in the function that needs it" if early else None
    return None if top in CORE else "it is not a core dependency"


def _judge_own(edge: Import) -> str | None:
    if edge.place == "function":
        return "an import inside a function dodges the layering"
    source, target = layer_of(edge.source), layer_of(edge.target)
    if source is None or target is None or may_import(source, target):
        return None
    # Types may be named upwards in one's own tower; they are gone at run time.
    if edge.place == "typing" and source.tower == target.tower:
        return None
    return f"{source.name} ({source.tower}) is not above {target.name or 'dtrain'} ({target.tower})"


def _judge_launcher(edge: Import) -> str | None:
    top = edge.target.partition(".")[0]
    if top == "dtrun" or top in sys.stdlib_module_names:
        return None
    if top == "psutil" or edge.target.startswith(LAUNCHER_READS):
        return (
            None
            if edge.place in ("function", "typing")
            else "import it in the function that needs it"
        )
    return "the launcher stands on the standard library and psutil alone"
