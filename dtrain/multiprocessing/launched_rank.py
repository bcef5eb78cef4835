"""A rank whose program is a function: `python -m ...launched_rank TASK REPORT...`.

Owns: reading the function from the letter TASK and telling in the REPORT of its local rank what it
returned, or how it failed. dtrun starts it and shows its output and its traceback.
"""

from __future__ import annotations

import linecache
import os
import sys
import time

from dtrain.env import LaunchEnv
from dtrain.errors import lost_peer, sentence
from dtrain.letters import clear_letter, read_letter, write_letter
from dtrain.utils.data.worker import decode, encode
from dtrain.wire import dumps, loads


def main() -> None:
    """Run the function. What it raises is told, and raised."""
    own = LaunchEnv.from_environ()
    task, *reports = sys.argv[1:]
    report = os.open(reports[own.local_rank or 0], os.O_RDWR | os.O_CLOEXEC)
    clear_letter(report)  # of an attempt before this one
    try:
        value, is_wanted = _call(task, own.rank)
        frames = _packed(value) if is_wanted else []
        write_letter(report, dumps({"rank": own.rank, "value": frames}))
    except Exception as error:
        fields = {"rank": own.rank, "message": sentence(error), "lost_peer": lost_peer(error)}
        write_letter(report, dumps(fields | {"time": time.time(), "pid": os.getpid()}))
        raise


def _call(path: str, rank: int) -> tuple[object, bool]:
    """What the function returned, and whether the caller is to have it."""
    with open(path, "rb") as letter:
        head, *buffers = loads(read_letter(letter.fileno()))
    function, args, cells, everyone = decode(head, [bytearray(buffer) for buffer in buffers])
    for name, lines in cells.items():
        linecache.cache[name] = (sum(map(len, lines)), None, lines, name)
    return function(*args), everyone or rank == 0


def _packed(value: object) -> list[bytes]:
    try:
        return [bytes(frame) for frame in encode(value)]
    except Exception as error:
        raise TypeError(f"what this rank returned cannot be sent to the caller: {error}") from error


if __name__ == "__main__":
    main()
