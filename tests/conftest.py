"""What every test gets without asking: a check that it leaves nothing behind.

The deadline of a test, and the dump of all threads' stacks when it passes, are set in
pyproject.toml.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dtrain.testing.leaks import check_leaks


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    """Threads, processes, descriptors, shared memory and sockets are as before the test."""
    with check_leaks():
        yield
