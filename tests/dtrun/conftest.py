"""Fixtures of the launcher's tests."""

from __future__ import annotations

import pytest

from tests.dtrun.launch import Launches


@pytest.fixture
def dtrun(tmp_path):
    """Starts dtrun in a folder of its own, and checks that it leaves nothing behind."""
    launches = Launches(tmp_path)
    yield launches
    launches.close()
