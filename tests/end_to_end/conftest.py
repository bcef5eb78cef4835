"""Fixtures of the tests from end to end: dtrun as the launcher's own tests start it."""

from tests.dtrun.conftest import dtrun as dtrun
