"""Worlds of workers for tests: threads that serve while the first of them runs the test."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import suppress

import dtrain as torch
from dtrain.distributed import rpc
from dtrain.testing.distributed import run_distributed
from dtrain.wire import loads


def world(size, main, *args, over=None, threads=4, **options):
    """`main(*args)` on worker 0; the others, threads too, serve until all shut down."""

    def rank_main():
        return served(main, over, threads, options, *args)

    return run_distributed(size, rank_main)[0]


def served(main, over, threads, options, *args):
    rank = torch.distributed.get_rank()
    settings = rpc.TensorPipeRpcBackendOptions(
        num_worker_threads=threads, rpc_timeout=20, _transports=over and [over]
    )
    rpc.init_rpc(f"w{rank}", rpc_backend_options=settings, **options)
    result = main(*args) if rank == 0 else None
    rpc.shutdown(timeout=20)
    return result


def inbox_port(agent):
    """The TCP port at which a worker of an open world hears others."""
    return int(agent._line._transport._door.address.rpartition(":")[2])


def cut(port):
    """Break the TCP connections that this process has made to `port`; how many there were."""
    broken = 0
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        try:
            copy = os.dup(descriptor)
        except OSError:  # the one that listed the directory
            continue
        try:
            connection = socket.socket(fileno=copy)
        except OSError:  # not a socket
            os.close(copy)
            continue
        with connection, suppress(OSError):  # not connected
            if connection.family == socket.AF_INET and connection.getpeername()[1] == port:
                connection.shutdown(socket.SHUT_RDWR)
                broken += 1
    return broken


def messages(body):
    """The messages that came together."""
    found = loads(body)
    return found if isinstance(found[0], list) else [found]


def add(a, b):
    return a + b


def echo(value):
    return value


def until(condition):
    """Wait for what no message tells of; the books are swept every 50 ms."""
    pause = threading.Event()
    for _ in range(200):
        if condition():
            return
        pause.wait(0.02)
    raise AssertionError(f"not in time: {condition}")
