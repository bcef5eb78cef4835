"""The default generator and torch.random's functions on it.

Owns: which generator a draw uses that names none. A thread (a rank of a threaded world) may
install its own with `use_generator`; all others share the process's.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar

from dtrain.draws import Array
from dtrain.generator import Generator

_installed: ContextVar[Generator] = ContextVar("dtrain_default_generator")
_process_lock = threading.Lock()
_process_generator: Generator | None = None


def default_generator() -> Generator:
    """The generator of draws that name none: this thread's own, or else the process's.

    The process's is made at its first use (importing numpy.random takes 20 ms) and is seeded
    from the operating system.
    """
    installed = _installed.get(None)
    if installed is not None:
        return installed
    global _process_generator
    with _process_lock:
        if _process_generator is None:
            _process_generator = Generator()
            _process_generator.seed()
        return _process_generator


@contextlib.contextmanager
def use_generator(generator: Generator) -> Iterator[Generator]:
    """Make `generator` the default one of this thread (context) inside the block."""
    token = _installed.set(generator)
    try:
        yield generator
    finally:
        _installed.reset(token)


def manual_seed(seed: int) -> Generator:
    """Seed the default generator and return it; `int(seed)` is taken, as in torch."""
    return default_generator().manual_seed(int(seed))


def seed() -> int:
    """Seed the default generator from the operating system's entropy; returns the seed."""
    return default_generator().seed()


def initial_seed() -> int:
    """The seed of the default generator."""
    return default_generator().initial_seed()


def get_rng_state() -> Array:
    """The state of the default generator, uint8[5056]."""
    return default_generator().get_state()


def set_rng_state(new_state: Array | bytes) -> None:
    """Set the state of the default generator."""
    default_generator().set_state(new_state)


@contextlib.contextmanager
def fork_rng(
    devices: object = None, enabled: bool = True, device_type: str = "cpu"
) -> Iterator[None]:
    """Restore the default generator's state after the block.

    `devices` and `device_type` are accepted for torch's signature and ignored: there is one
    device. With enabled=False the block changes nothing.
    """
    if not enabled:
        yield
        return
    generator = default_generator()
    state = generator.get_state()
    try:
        yield
    finally:
        generator.set_state(state)
