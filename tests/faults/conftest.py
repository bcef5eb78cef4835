"""Collects the verdicts of all trials of faults and prints them as a table after the tests."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from dtrain.testing.trials import run_trial, table

_VERDICTS = pytest.StashKey()


@pytest.fixture
def carry_out(request):
    """Runs trials, some at once, notes the verdicts, and fails or skips the test as they say."""

    def run(trials, at_once=3):
        with ThreadPoolExecutor(at_once) as pool:
            verdicts = list(pool.map(run_trial, trials))
        request.config.stash.setdefault(_VERDICTS, []).extend(verdicts)
        for result, say in (("failed", pytest.fail), ("not run", pytest.skip)):
            if found := [str(verdict) for verdict in verdicts if verdict.result == result]:
                say("\n".join(found))

    return run


def pytest_terminal_summary(terminalreporter, config):
    """The table, if there is anything to show."""
    verdicts = config.stash.get(_VERDICTS, [])
    if verdicts:
        terminalreporter.section("trials of faults")
        terminalreporter.line(table(verdicts))
