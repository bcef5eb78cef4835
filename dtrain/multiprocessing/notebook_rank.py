"""A rank of `notebook_launcher`: `python -m dtrain.multiprocessing.notebook_rank TASK REPORT...`.

Owns: reading the function from the letter TASK and telling in the REPORT of its rank what it
returned (rank 0) or how it failed. dtrun starts it and shows its output and its traceback.
"""

from __future__ import annotations

import linecache
import os
import sys
import time
import traceback

from dtrain.env import LaunchEnv
from dtrain.errors import lost_peer
from dtrain.letters import clear_letter, read_letter, write_letter
from dtrain.utils.data.worker import decode, encode
from dtrain.wire import dumps, loads


def main() -> None:
    """Run the function. What it raises is told, and raised."""
    rank = LaunchEnv.from_environ().rank
    task, report = sys.argv[1], os.open(sys.argv[2 + rank], os.O_RDWR | os.O_CLOEXEC)
    clear_letter(report)  # of an attempt before this one
    try:
        value = _call(task)
        frames = _packed(value) if rank == 0 else []
        write_letter(report, dumps({"value": frames}))
    except Exception as error:
        message = traceback.format_exception_only(error)[0].strip()
        fields = {"message": message, "lost_peer": lost_peer(error)}
        write_letter(report, dumps(fields | {"time": time.monotonic(), "pid": os.getpid()}))
        raise


def _call(path: str) -> object:
    with open(path, "rb") as letter:
        head, *buffers = loads(read_letter(letter.fileno()))
    function, args, cells = decode(head, [bytearray(buffer) for buffer in buffers])
    for name, lines in cells.items():
        linecache.cache[name] = (sum(map(len, lines)), None, lines, name)
    value: object = function(*args)
    return value


def _packed(value: object) -> list[bytes]:
    try:
        return [bytes(frame) for frame in encode(value)]
    except Exception as error:
        raise TypeError(f"what rank 0 returned cannot be sent to the notebook: {error}") from error


if __name__ == "__main__":
    main()
