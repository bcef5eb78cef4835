"""A worker process of a DataLoader: a fresh interpreter that fetches what it is asked for.

It speaks with its parent alone, over a socket pair that it inherits: a message is a pickle, its
arrays apart as raw bytes. Rule: it ends when the parent does, closes its end, or ends it. Functions
and classes of the main script travel by value, so that the script is not run again here.
"""

from __future__ import annotations

import functools
import io
import os
import pickle
import queue
import random
import signal
import struct
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import CodeType
from typing import Any

import numpy as np

from dtrain.random import manual_seed
from dtrain.utils.data.fetch import Fetcher, WorkerInfo, set_worker_info

PARENT_CHECK = 1.0  # seconds between looks at whether the parent lives, were its end inherited
LAST_BATCH = 1.0  # seconds that the batch in work has to end, once the parent is gone


@dataclass
class Job:
    """All that a worker is told at its start, apart from its id."""

    dataset: Any
    collate: Callable[[Any], Any]
    batched: bool
    drop_last: bool
    init: Callable[[int], None] | None
    base_seed: int
    count: int


# --- messages ------------------------------------------------------------------------------------


def encode(message: Any) -> list[Any]:
    """The frames of a message: sizes of the buffers and the pickle, then the buffers."""
    buffers: list[pickle.PickleBuffer] = []
    body = io.BytesIO()
    _pickler()(body, protocol=5, buffer_callback=buffers.append).dump(message)
    raw = [buffer.raw() for buffer in buffers]
    sizes = struct.pack(f"<{len(raw) + 1}Q", len(raw), *(part.nbytes for part in raw))
    return [sizes + body.getvalue(), *raw]


@functools.cache
def _pickler() -> type[pickle.Pickler]:
    """cloudpickle's, but code keeps the name of its file (3.1.3 drops it): tracebacks need it."""
    import cloudpickle

    base = cloudpickle.Pickler
    by_value = base.dispatch_table[CodeType]

    def reduce_code(code: CodeType) -> Any:
        return _code_of_file, (code.co_filename, *by_value(code))

    table = {CodeType: reduce_code}
    return type("Pickler", (base,), {"dispatch_table": base.dispatch_table.new_child(table)})


def _code_of_file(name: str, make: Callable[..., CodeType], parts: tuple[Any, ...]) -> CodeType:
    return make(*parts).replace(co_filename=name)


def send(pipe: Connection, frames: list[Any]) -> None:
    """Write encoded frames; blocks until the other side has read most of them."""
    for frame in frames:
        pipe.send_bytes(frame)


def receive(pipe: Connection) -> Any:
    """Read one message; arrays in it are writable. EOFError when the other side is gone."""
    head = pipe.recv_bytes()
    (count,) = struct.unpack_from("<Q", head)
    sizes = struct.unpack_from(f"<{count}Q", head, 8)
    buffers = [bytearray(size) for size in sizes]
    for buffer in buffers:
        if pipe.recv_bytes_into(buffer) != len(buffer):
            raise EOFError("a message ended early")
    return decode(head, buffers)


def decode(head: bytes, buffers: list[bytearray]) -> Any:
    """The message of the frames [head, *buffers], into whose memory its arrays point.

    Runs what the sender put into it: of this process's parent and children alone.
    """
    (count,) = struct.unpack_from("<Q", head)
    return pickle.loads(head[8 * (count + 1) :], buffers=buffers)


# --- the process ---------------------------------------------------------------------------------


def main(descriptor: int) -> None:
    """Be a worker until the parent closes the socket `descriptor`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    pipe = Connection(descriptor)
    number, job = receive(pipe), receive(pipe)
    tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, tasks), daemon=True).start()
    worker = _Worker(number, job)
    try:
        while (task := tasks.get()) is not None:
            send(pipe, worker.answer(*task))
    except BrokenPipeError:
        pass  # the parent does not want it any more


def _listen(pipe: Connection, tasks: queue.SimpleQueue[Any]) -> None:
    """Take tasks in while the main thread works, so that the parent never waits to send one."""
    parent = os.getppid()
    try:
        while True:
            while not pipe.poll(PARENT_CHECK):
                if os.getppid() != parent:
                    raise EOFError
            tasks.put(receive(pipe))
    except (EOFError, OSError):
        tasks.put(None)
        threading.Event().wait(LAST_BATCH)
        os._exit(1)


class _Worker:
    """Seeds, initialises and answers; what fails at the start is the answer to every task."""

    def __init__(self, number: int, job: Job) -> None:
        self.job = job
        self.failure: list[Any] | None = None
        _seed(job.base_seed, number)
        set_worker_info(WorkerInfo(number, job.count, job.base_seed + number, job.dataset))
        try:
            if job.init is not None:
                job.init(number)
            self._renew()
        except Exception as error:
            self.failure = _encode_error(error)

    def _renew(self) -> None:
        job = self.job
        self.fetch = Fetcher(job.dataset, job.collate, job.batched, job.drop_last)

    def answer(self, kind: str, index: Any) -> list[Any]:
        """The encoded reply to "fetch" or "restart"."""
        if self.failure is not None and kind == "fetch":
            return self.failure
        try:
            if kind == "restart":
                self._renew()
                return encode(("restarted", None))
            return encode(("data", self.fetch(index)))
        except StopIteration:
            return encode(("end", None))
        except Exception as error:
            return _encode_error(error)


def _seed(base_seed: int, number: int) -> None:
    """torch's seeds of a worker, for its own stream, Python's and NumPy's."""
    manual_seed(base_seed + number)
    random.seed(base_seed + number)
    words = [number, base_seed & 0xFFFFFFFF, base_seed >> 32, 0]
    np.random.seed(np.random.SeedSequence(words).generate_state(4))


def _encode_error(error: Exception) -> list[Any]:
    text = traceback.format_exc()
    try:
        return encode(("error", (type(error), text)))
    except Exception:  # a class that cannot be pickled; its name is in the text
        return encode(("error", (RuntimeError, text)))
