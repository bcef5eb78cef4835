"""Worlds of workers for tests: threads that serve while the first of them runs the test."""

from __future__ import annotations

import threading

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
