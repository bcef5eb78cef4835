"""Functions that answer later: futures of other calls, calls gathered into one batch."""

from __future__ import annotations

import threading

import pytest

import dtrain as torch
from dtrain.distributed import rpc
from tests.distributed.rpc.worlds import add, world


@rpc.functions.async_execution
def later(to, a, b):
    return rpc.rpc_async(to, add, (a, b)).then(lambda done: done.wait() * 10)


def test_async_execution_answers_with_the_value_of_the_future():
    def main():
        assert rpc.rpc_sync("w1", later, ("w2", 1, 2)) == 30
        assert rpc.remote("w1", later, ("w2", 3, 4)).to_here() == 70

    world(3, main, threads=1)


class Batch:
    """Adds up what `size` callers bring; all of them get the sum, when the last one is there."""

    def __init__(self, size):
        self.size, self.lock = size, threading.Lock()
        self.parts, self.total = [], torch.futures.Future()

    @rpc.functions.async_execution
    def bring(self, part):
        with self.lock:
            self.parts.append(part)
            total = self.total
            if len(self.parts) == self.size:
                self.total.set_result(sum(self.parts))
                self.parts, self.total = [], torch.futures.Future()
            return total

    @rpc.functions.async_execution
    def forgetful(self):
        return 5


def test_async_execution_of_a_method_batches_calls_in_one_thread():
    def main():
        batch = rpc.remote("w1", Batch, (20,))
        for _ in range(2):
            futures = [batch.rpc_async().bring(i) for i in range(20)]
            assert [future.wait() for future in futures] == [190] * 20
        kept = [batch.remote().bring(1) for _ in range(20)]
        assert kept[3].to_here() == 20
        with pytest.raises(TypeError, match=r"forgetful is an async_execution function.*got int"):
            batch.rpc_sync().forgetful()

    world(2, main, threads=1)
