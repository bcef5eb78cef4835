"""`torch.cuda`'s questions, answered for a runtime that computes on the CPU: there is no device.

Scripts that choose a device by `cuda.is_available()` then choose the CPU.
"""

from __future__ import annotations


def is_available() -> bool:
    """False: dtrain computes on the CPU."""
    return False


def device_count() -> int:
    """0: dtrain computes on the CPU."""
    return 0


def is_initialized() -> bool:
    """False: there is nothing to initialize."""
    return False


def manual_seed(seed: int) -> None:
    """Accepted and ignored, as in torch without a device."""


def manual_seed_all(seed: int) -> None:
    """Accepted and ignored, as in torch without a device."""


def empty_cache() -> None:
    """Accepted and ignored: there is no device memory."""


def synchronize() -> None:
    """Accepted and ignored: operations on the CPU have finished when they return."""
