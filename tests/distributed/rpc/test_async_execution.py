"""Functions that answer later: futures of other calls, calls gathered into one batch."""

from __future__ import annotations

import threading

import pytest

import dtrain as torch
from dtrain.distributed import rpc
from dtrain.errors import DistError, PeerLost
from dtrain.testing.distributed import run_distributed
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


class Forms:
    """Every way to write a function that answers later, as PyTorch's documentation lists them."""

    @staticmethod
    @rpc.functions.async_execution
    def static(to, a, b):
        return rpc.rpc_async(to, add, (a, b))

    @classmethod
    @rpc.functions.async_execution
    def of_class(cls, to, a, b):
        return rpc.rpc_async(to, add, (a, b))

    @rpc.functions.async_execution
    def bound(self, to, a, b):
        return rpc.rpc_async(to, add, (a, b))


def test_every_form_of_function_may_answer_later():
    def main():
        for function in (Forms.static, Forms.of_class):
            assert rpc.rpc_sync("w1", function, ("w2", 1, 2)) == 3
            assert rpc.rpc_async("w1", function, ("w2", 1, 2)).wait() == 3
            assert rpc.remote("w1", function, ("w2", 1, 2)).to_here() == 3
        there = rpc.remote("w1", Forms)
        for name in ("static", "of_class", "bound"):
            assert getattr(there.rpc_sync(), name)("w2", 1, 2) == 3
            assert getattr(there.rpc_async(), name)("w2", 1, 2).wait() == 3
            assert getattr(there.remote(), name)("w2", 1, 2).to_here() == 3

    world(3, main, threads=1)


class Fragile(Batch):
    """A batch of which nothing good comes."""

    @rpc.functions.async_execution
    def bring(self, part):
        with self.lock:
            self.parts.append(part)
            total = self.total
            if len(self.parts) == self.size:
                total.set_exception(LookupError(f"no sum of {self.parts}"))
                self.parts, self.total = [], torch.futures.Future()
            return total


def test_the_error_of_a_batch_reaches_all_its_callers():
    def main():
        batch = rpc.remote("w1", Fragile, (3,))
        futures = [batch.rpc_async().bring(i) for i in range(3)]
        for future in futures:
            with pytest.raises(LookupError, match=r"no sum of \[0, 1, 2\]"):
                future.wait()

    world(2, main, threads=1)


def test_a_batch_that_does_not_fill_times_out_and_the_latecomer_still_completes_it():
    def main():
        batch = rpc.remote("w1", Batch, (2,))
        with pytest.raises(rpc.RpcTimeout, match="bring of a reference on worker 'w1'"):
            batch.rpc_sync(timeout=0.05).bring(1)
        assert batch.rpc_sync().bring(2) == 3

    world(2, main, threads=1)


def test_an_unfilled_batch_is_what_shutdown_waits_for_and_says_so():
    def main():
        rank = torch.distributed.get_rank()
        rpc.init_rpc(f"w{rank}")
        if rank == 0:
            batch = rpc.remote("w1", Batch, (2,))
            future = batch.rpc_async().bring(1)
            with pytest.raises(DistError, match=r"waits for bring of a reference on 'w1'"):
                rpc.shutdown(timeout=0.2)
            with pytest.raises(PeerLost):
                future.wait(5)
            torch.distributed.barrier()
        else:
            torch.distributed.barrier()  # until then the batch lives, and worker 0 waits for it
            rpc.shutdown(timeout=20)  # nobody waits for it any more

    run_distributed(2, main)


def test_a_batch_that_is_never_full_does_not_hold_up_the_end():
    """Its caller has waited long enough."""

    def main():
        rank = torch.distributed.get_rank()
        rpc.init_rpc(f"w{rank}")
        if rank == 0:
            batch = rpc.remote("w1", Batch, (2,))
            with pytest.raises(rpc.RpcTimeout):
                batch.rpc_sync(timeout=0.05).bring(1)
        rpc.shutdown(timeout=20)

    run_distributed(2, main)
