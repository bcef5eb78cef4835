"""What every test gets without asking: a check that it leaves nothing behind.

The deadline of a test, and the dump of all threads' stacks when it passes, are set in
pyproject.toml.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from dtrain.testing.leaks import check_leaks


@pytest.fixture(scope="session", autouse=True)
def hears_interrupts() -> None:
    """A shell starts background jobs deaf to Ctrl-C, `nohup` to the end of the terminal, and what
    they start stays so: not here.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    """Threads, processes, descriptors, shared memory and sockets are as before the test."""
    with check_leaks():
        yield
