"""The leak check catches what it is there to catch."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from dtrain.testing.leaks import LeakError, check_leaks


def leak(what):
    """Leave something behind; returns how it is named and how to remove it."""
    if what == "thread":
        release = threading.Event()
        thread = threading.Thread(target=release.wait, args=(20,), name="forgotten")
        thread.start()
        return r"thread forgotten[\s\S]*release\.wait|thread forgotten", lambda: (
            release.set(),
            thread.join(),
        )
    if what == "process":
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        return f"process {child.pid}", lambda: child.communicate(b"\n", timeout=20)
    if what == "descriptor":
        fd = os.open("/dev/null", os.O_RDONLY)
        return f"descriptor {fd}: /dev/null", lambda: os.close(fd)
    path = Path(tempfile.mkdtemp(prefix=f"dtrain-{os.getpid()}-"))
    return f"path {path}", path.rmdir


@pytest.mark.parametrize("what", ["thread", "process", "descriptor", "socket directory"])
def test_leaks_are_named(what):
    with pytest.raises(LeakError) as caught, check_leaks(grace=0.05):
        named, remove = leak(what)
    remove()
    caught.match(named)


def test_a_clean_block_passes_and_gets_a_moment():
    with check_leaks():
        threading.Timer(0.05, lambda: None).start()


def test_an_error_of_the_block_itself_comes_through():
    with pytest.raises(KeyError), check_leaks():
        raise KeyError
