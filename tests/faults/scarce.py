"""What ranks do in the tests of scarce resources; run in processes, which import only this."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import threading
import warnings

import numpy as np

from dtrain.comm import collectives as c
from dtrain.comm.group import ProcessGroup
from dtrain.comm.point_to_point import Recv, Send
from dtrain.comm.security import sockets
from dtrain.errors import ForkedProcessError


def add(group, value, count=1000):
    """Whether an all_reduce of `value` plus the rank is exact, element for element."""
    buf = np.full(count, value + group.rank, np.float64)
    group.submit(c.AllReduce(buf))
    return bool((buf == group.size * value + sum(range(group.size))).all())


def with_few_descriptors(store, rank, size, transport, limit):
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    with ProcessGroup(store, rank, size, transport=transport, timeout=10) as group:
        return [add(group, 3), group.transport.name]


def with_little_memory(store, rank, size):
    """The kernel refuses rank 1 every file larger than 64 KiB, nameless ones included."""
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with ProcessGroup(store, rank, size, transport="shm", timeout=10) as group:
            return [add(group, 3), group.transport.name, [str(w.message) for w in caught]]


def in_a_storm(group, calls):
    """[exact results, signals that came meanwhile]: a signal every millisecond."""
    came = []
    signal.signal(signal.SIGALRM, lambda *_: came.append(1))
    signal.setitimer(signal.ITIMER_REAL, 1e-3, 1e-3)
    exact = sum(add(group, value, 20_000) for value in range(calls))
    signal.setitimer(signal.ITIMER_REAL, 0)
    return [exact, len(came)]


def _resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def flood(store, rank, size, transport, count):
    """Rank 0 sends `count` numbers while rank 1 does not read; [what came in order, growth]."""
    with ProcessGroup(store, rank, size, transport=transport, timeout=40) as group:
        group.submit(c.Barrier())
        before, right = _resident(), 0
        if rank == 0:
            for number in range(count):
                group.submit(Send(np.array([number]), 1), async_op=True)
            store.set("all are sent", b"")
        else:
            store.wait(["all are sent"])
            got = np.empty(1, int)
            for number in range(count):
                group.submit(Recv(got, 0))
                right += int(got[0]) == number
        grown = _resident() - before
        group.submit(c.Barrier())
        return [right, grown]


def forks(group):
    """[whether each kind of child was refused, exact calls of the parent afterwards]."""
    refused = [_child_by_fork(group), _child_by_multiprocessing(group)]
    return [refused, sum(add(group, value) for value in range(100))]


def _try_everything(group):
    """Exit status 0 if every call is refused; a forked child must not get any further."""
    calls = (lambda: add(group, 1), lambda: group.store.get("x"), lambda: group.abort("why not"))
    refused = 0
    try:
        for call in calls:
            try:
                call()
            except ForkedProcessError:
                refused += 1
    finally:
        os._exit(refused != len(calls))


def _child_by_fork(group):
    child = os.fork()
    if child == 0:
        _try_everything(group)
    return os.waitpid(child, 0)[1] == 0


def _child_by_multiprocessing(group):
    child = multiprocessing.get_context("fork").Process(target=_try_everything, args=(group,))
    child.start()
    child.join(20)
    return child.exitcode == 0


def rank_of(group):
    return [group.rank, add(group, 1)]


def late(store, rank, size, transport, seconds):
    """The last rank computes for longer than a heartbeat may fail, while others send it 256 MiB."""
    store.check([])  # connects the store before: its own signs of life are not what is tried here
    sockets.HEARTBEAT = sockets.Heartbeat(every_ms=100, dead_ms=500)
    with ProcessGroup(store, rank, size, transport=transport, timeout=40) as group:
        exact = add(group, 1)
        if rank == size - 1:
            store.wait(["all have sent"])
            threading.Event().wait(seconds)
        else:
            works = [
                group.submit(Send(np.full(4 << 20, number), size - 1), async_op=True)
                for number in range(8)
            ]
            store.set("all have sent", b"")
        if rank == size - 1:
            got = np.empty(4 << 20, int)
            for number in range(8):
                group.submit(Recv(got, 0))
                exact = exact and bool((got == number).all())
        else:
            for work in works:
                work.wait()
        return exact and add(group, 2)
