"""The self-test tells ranks that add rightly from ranks that do not."""

from __future__ import annotations

import socket

import pytest

from dtrain.distributed import selftest
from dtrain.testing.distributed import run_distributed


@pytest.mark.parametrize("size", [1, 3])
def test_ranks_that_work_are_counted_by_host(size):
    lines = set(run_distributed(size, lambda: selftest.check().partition(": ")[0]))
    verb = "ranks work together" if size > 1 else "rank works"
    assert lines == {f"{size} {verb} ({socket.gethostname()} {size})"}


def test_a_wrong_sum_is_an_error(monkeypatch):
    monkeypatch.setattr(selftest.dist, "all_reduce", lambda tensor: tensor.add_(1.0))
    with pytest.raises(RuntimeError, match=r"rank [01] of 2: the sum over the ranks is wrong"):
        run_distributed(2, selftest.check)
