"""Fixtures: multiprocessing's own helper processes live as long as the tests of this folder."""

from __future__ import annotations

import multiprocessing
from multiprocessing import forkserver, resource_tracker

import pytest


@pytest.fixture(scope="session", autouse=True)
def helpers():
    """Its resource tracker and fork server: started once, no leak of whichever test is first."""
    resource_tracker.ensure_running()
    multiprocessing.set_forkserver_preload(["tests.multiprocessing.programs"])
    forkserver.ensure_running()
    yield
    forkserver._forkserver._stop()
    resource_tracker._resource_tracker._stop()


@pytest.fixture(autouse=True)
def no_child_stays():
    """Every process that was started has been waited for."""
    yield
    assert multiprocessing.active_children() == []
