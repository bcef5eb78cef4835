"""`python -m dtrain`: the facts, their text, and that neither tells what it should not."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest

import dtrain as torch
from dtrain.utils import collect_env
from tests.tree import ROOT


def report(module, *arguments, **environment):
    run = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=environment, capture_output=True, text=True, timeout=40, check=False,
    )  # fmt: skip
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout


def test_both_commands_print_the_facts():
    facts = json.loads(report("dtrain", "--json", DTRAIN_LOG="INFO", PASSWORD="seven"))
    assert facts["dtrain"] == torch.__version__
    assert facts["packages"]["numpy"] == np.__version__
    assert facts["executable"] == sys.executable
    assert facts["variables"] == {"DTRAIN_LOG": "INFO"}
    text = report("dtrain.utils.collect_env", RANK="3")
    assert f"dtrain: {torch.__version__}\n" in text
    assert f"  numpy: {np.__version__}\n" in text
    assert text.endswith("\nvariables:\n  RANK=3\n")


def test_torchs_names_are_there():
    info = torch.utils.collect_env.get_env_info()
    assert info.keys() == json.loads(json.dumps(info)).keys()
    assert "products exact: True" in collect_env.get_pretty_env_info().splitlines()


def test_a_variable_that_nothing_reads_is_told_with_its_neighbour():
    environ = {"DTRAIN_TRCE": "x", "DTRAIN_TRACE": "y", "DTRAIN_QQQQQQ": "", "OMP_X": ""}
    found = collect_env.unknown_variables(environ)
    assert found == {"DTRAIN_QQQQQQ": "", "DTRAIN_TRCE": "DTRAIN_TRACE"}


def test_the_known_variables_are_those_of_the_page():
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`DTRAIN_([A-Z_]+)`", page)) == set(collect_env.KNOWN)


def test_a_package_that_is_not_there_is_said_to_be_so(monkeypatch):
    monkeypatch.setattr(collect_env, "PACKAGES", ("no-such-package",))
    assert "  no-such-package: not installed" in collect_env.get_pretty_env_info()


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_wrong_products_are_seen(kind):
    def wrong(a, b):
        out = a @ b
        if out.dtype == kind:
            out[-1, -1] += 1
        return out

    assert collect_env.products_are_exact(np.matmul)
    assert not collect_env.products_are_exact(wrong)
