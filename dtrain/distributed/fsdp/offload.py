"""Arrays in files: memory that the system may write out when others need it.

A file has no name any more when its array is there, and no descriptor stays open: nothing is left
behind however the process ends. It is in `TMPDIR` (else /tmp): on a disk, or nothing is won. Space
is taken at once: a full disk is an OSError here and not a death by SIGBUS later.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import numpy as np

from dtrain.comm.transports.window import map_file
from dtrain.flat import Array


def mapped(count: int, dtype: Any) -> Array:
    """An array of zeros in a file of its own, which goes with it. OSError when the disk is full."""
    kind = np.dtype(dtype)
    nbytes = count * kind.itemsize
    if not nbytes:
        return np.zeros(count, kind)
    with tempfile.TemporaryFile() as file:
        try:
            os.posix_fallocate(file.fileno(), 0, nbytes)
        except OSError as error:
            error.add_note(
                f"while {nbytes:,} bytes were taken in {tempfile.gettempdir()} for parameters or "
                "optimizer state of a fully sharded model (TMPDIR says where)"
            )
            raise
        return np.frombuffer(map_file(file.fileno()), kind, count)
