"""Where ranks are: which of them share a host.

Owns: the identity of a host as ranks tell it to each other when they meet. It is what they say and
not what environment variables say, so it holds for any sub-group.
"""

from __future__ import annotations

import functools
import socket
from pathlib import Path

__all__ = ["host_id"]

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@functools.cache
def host_id() -> str:
    """Equal for two processes exactly when they run on the same boot of the same host (or
    container).
    """
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else "?"
    return f"{socket.gethostname()}/{boot}"
