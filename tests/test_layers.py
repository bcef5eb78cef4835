"""The layering of docs/ARCHITECTURE.md: who may import whom, and what an import may load.

The rules are read from the source; what really gets loaded is asked of a fresh interpreter.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.imports import CORE, layer_of, may_import, violations
from tests.tree import ROOT, python_files, sources

BINDS = {"bind", "bind_to_random_port", "listen", "create_server", "start_server"}
THE_BINDER = "dtrain/comm/security/listening.py"
NOT_SOCKETS = {"security", "inspect.signature"}
# The launcher holds MASTER_PORT for rank 0 with a bound socket that never listens: nobody can
# connect to it. A call of `listen` there would still be found.
HOLDS_A_PORT = ("launcher/dtrun/rendezvous.py", "bind")


def loaded_by(statement: str) -> set[str]:
    """Top-level modules a fresh interpreter gains by `statement`, the standard library apart."""
    code = (
        f"import json, sys; old = set(sys.modules); {statement}; new = set(sys.modules) - old; "
        "print(json.dumps([n for n in new if getattr(sys.modules[n], '__spec__', None)]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert run.returncode == 0, run.stderr
    return {name.partition(".")[0] for name in json.loads(run.stdout)} - sys.stdlib_module_names


def binders(text: str) -> Iterator[tuple[str, int]]:
    """Method name and line of each call that binds a socket or listens on it."""
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Call(func=ast.Attribute(value=owner, attr=name)) if name in BINDS:
                if ast.unparse(owner).partition("(")[0] not in NOT_SOCKETS:
                    yield name, node.lineno


def test_nobody_imports_upwards():
    modules = {name: path.read_text(encoding="utf-8") for name, path in sources().items()}
    assert "dtrain" in modules
    assert "dtrun" in modules
    assert "\n".join(violations(modules)) == ""


@pytest.mark.parametrize(
    ("module", "text", "reason"),
    [
        ("dtrain.comm.group", "from dtrain.tensor import Tensor", "comm.group (comm) is not above"),
        ("dtrain.nn.linear", "import dtrain.comm", "nn (compute) is not above comm (comm)"),
        ("dtrain.autograd.engine", "from dtrain.ops import linalg", "autograd (compute) is not"),
        ("dtrain.tensor", "from dtrain import nn", "tensor (compute) is not above nn"),
        ("dtrain.optim.sgd", "from dtrain.nn import Module", "optim (compute) is not above nn"),
        ("dtrain.nn.a", "from dtrain import distributed", "nn (compute) is not above distributed"),
        ("dtrain.ops.math", "import dtrain", "ops (compute) is not above dtrain"),
        ("dtrain.errors", "from dtrain.autograd import engine", "errors (base) is not above"),
        ("dtrain.comm.store.tcp", "from dtrain.comm.group import G", "comm.store (comm) is not"),
        ("dtrain.ops.math", "def f():\n    from dtrain.dtypes import dtype", "inside a function"),
        ("dtrain.ops.math", "import importlib\nx = importlib.import_module(y)", "computed name"),
        ("dtrain.ops.math", "import scipy", "not a core dependency"),
        ("dtrain.ops.math", "import psutil", "in the function that needs it"),
        ("dtrain.env", "import dtrun", "the launcher is above"),
        ("dtrain.newcomer", "", "has no layer"),
        ("dtrain.comm.newcomer", "", "has no layer"),
        (
            "dtrain.comm.group",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dtrain.tensor import T",
            "comm.group (comm) is not above tensor",
        ),
        ("dtrun.cli", "import numpy", "standard library and psutil"),
        ("dtrun.cli", "from dtrain.comm.store import base", "in the function that needs it"),
        ("dtrun.cli", "def f():\n    import dtrain", "standard library and psutil"),
    ],
)
def test_the_checker_sees(module, text, reason):
    modules = {module: text, "dtrain.nn": "", "dtrain.distributed": "", "dtrain.ops.linalg": ""}
    found = violations(modules)
    assert len(found) == 1
    assert reason in found[0]


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("dtrain.nn.parallel.distributed", "from dtrain.distributed import all_reduce"),
        ("dtrain.distributed", "from dtrain.comm.group import G\nfrom dtrain.tensor import Tensor"),
        ("dtrain.ops.linalg", "from dtrain.ops.reduce import total\nimport numpy as np"),
        ("dtrain.comm.transports.zmq", "from dtrain.comm.store.base import Store\nimport zmq"),
        ("dtrain.testing.world", "def f():\n    import psutil"),
        ("dtrain.autograd.op", "if TYPE_CHECKING:\n    from dtrain.tensor import Tensor"),
        ("dtrun.rendezvous", "def f():\n    from dtrain.comm.store.tcp import TCPStore"),
        ("dtrain", "import importlib\nfrom dtrain.nn import x\nimportlib.import_module(y)"),
    ],
)
def test_the_checker_accepts(module, text):
    assert not violations({module: text})


def test_the_towers_never_see_each_other():
    compute, comm = layer_of("dtrain.nn.functional"), layer_of("dtrain.comm.collectives")
    assert not may_import(compute, comm)
    assert not may_import(comm, compute)
    assert may_import(layer_of("dtrain.distributed"), comm)
    assert may_import(layer_of("dtrain.distributed"), compute)


@pytest.mark.parametrize("module", ["dtrun", "dtrun.cli"])
def test_importing_the_launcher_loads_only_itself(module):
    assert loaded_by(f"import {module}") <= {"dtrun", "psutil"}


def test_importing_the_library_loads_only_what_every_program_needs():
    assert loaded_by("import dtrain") <= CORE | {"dtrain"}


def test_what_is_loaded_is_really_asked():
    assert loaded_by("import numpy") == {"numpy"}


def test_one_function_binds_sockets():
    found = {
        f"{path.relative_to(ROOT)}:{line}"
        for path in python_files("dtrain", "launcher", "examples", "benchmarks")
        if str(path.relative_to(ROOT)) != THE_BINDER
        for name, line in binders(path.read_text(encoding="utf-8"))
        if (str(path.relative_to(ROOT)), name) != HOLDS_A_PORT
    }
    assert not found, f"only {THE_BINDER} opens listening sockets"


def test_the_bind_checker_sees():
    program = "sock.bind('tcp://*:1')\nsock.listen()\nasyncio.start_server(f)\n"
    assert list(binders(program)) == [("bind", 1), ("listen", 2), ("start_server", 3)]
    assert not list(binders("inspect.signature(f).bind(1)\nsecurity.listen(s)\nsock.connect(a)\n"))
