"""Runs that are killed and started again end with the bits of one that was not: parameters,
optimizer, schedule, order of the data, random state.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.end_to_end.launch import ENVIRONMENT, ROOT, Ended, dtrun

PROGRAM = ROOT / "tests" / "faults" / "resuming.py"
STEPS = 11  # of 5 in an epoch


def started(folder: Path, kind: str, *plan: str, ranks: int = 2) -> Ended:
    return dtrun(ranks, PROGRAM, folder, STEPS, kind, *plan)


def found(ended: Ended) -> dict:
    assert ended.code == 0, ended.err
    line = next(line for line in ended.out.splitlines() if "digest" in line)
    return json.loads(line[line.index("{") :])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """What a run without faults ends with, for each kind, made when it is first asked for."""
    kept: dict[str, dict] = {}

    def of(kind: str) -> dict:
        if kind not in kept:
            kept[kind] = found(started(tmp_path_factory.mktemp("whole"), kind))
        return kept[kind]

    return of


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("plan", "first"),
    [
        ("opt.step:8:1", (3, 6)),  # the second checkpoint may be on its way still
        ("ckpt.mid_write:1:0", (0,)),
        ("ckpt.before_rename:2:0", (3,)),
    ],
)
def test_killed_and_started_again_it_ends_with_the_same_bits(kind, plan, first, unbroken, tmp_path):
    struck = started(tmp_path, kind, plan)
    assert struck.code != 0
    assert "SIGKILL" in struck.err, struck.err
    again = found(started(tmp_path, kind))
    assert again["began"] in first
    assert again | {"began": 0} == unbroken(kind)


@pytest.mark.parametrize(("kind", "then"), [("fsdp", "ddp"), ("ddp", "fsdp")])
def test_goes_on_with_another_number_of_ranks_and_another_wrapper(
    kind, then, tmp_path, monkeypatch
):
    """Up to rounding: sums over ranks are made of other parts."""
    monkeypatch.setitem(ENVIRONMENT, "DROPOUT", "0")
    (tmp_path / "whole").mkdir()
    whole = found(started(tmp_path / "whole", kind))
    assert started(tmp_path, kind, "ckpt.before_rename:2:0").code != 0
    again = found(started(tmp_path, then, ranks=1))
    assert again["began"] == 3
    np.testing.assert_allclose(again["losses"], whole["losses"], rtol=1e-5)
