"""The helper that starts dtrun for tests: a leak fails the test that made it, and no other."""

from __future__ import annotations

import pytest

from tests.dtrun.launch import Launches


def test_a_run_directory_that_stays_is_an_error_once(tmp_path):
    launches = Launches(tmp_path)
    (launches.run_dirs / "dtrun-left").mkdir()
    with pytest.raises(TimeoutError):
        launches.close(seconds=0.0)
    assert not launches.run_dirs.exists()
    after = Launches(tmp_path)
    assert after.run_dirs.is_dir()
    after.close()
