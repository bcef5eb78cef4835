"""Backward passes through several workers: the gradients are those of one process.

Workers are threads over `local`, or over sockets where it says so.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest

import dtrain as torch
from dtrain.distributed import autograd as dist_autograd, rpc
from dtrain.distributed.autograd.contexts import contexts
from dtrain.distributed.autograd.edges import Key, send_node
from tests.distributed.rpc.worlds import until, world


def values(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def multiply(a, b):
    return a @ b


def test_gradients_through_one_worker_and_back():
    def main():
        a, b = values(3, 4).requires_grad_(), values(4, 2, seed=1).requires_grad_()
        (torch.relu(a @ b) * a.sum()).sum().backward()
        with dist_autograd.context() as context:
            product = rpc.rpc_sync("w1", multiply, (a, b))
            assert product.requires_grad
            dist_autograd.backward(context, [(torch.relu(product) * a.sum()).sum()])
            found = dist_autograd.get_gradients(context)
        assert set(found) == {a, b}
        np.testing.assert_allclose(found[a].numpy(), a.grad.numpy(), rtol=1e-12)
        np.testing.assert_allclose(found[b].numpy(), b.grad.numpy(), rtol=1e-12)

    world(2, main)


def test_outside_of_a_context_nothing_is_recorded():
    def main():
        a = values(3, 3).requires_grad_()
        assert not rpc.rpc_sync("w1", multiply, (a, a)).requires_grad
        with dist_autograd.context(), torch.no_grad():
            assert not rpc.rpc_sync("w1", multiply, (a, a)).requires_grad

    world(2, main)


class Layer:
    """A weight on a worker, and what it does to inputs, by way of other workers if told so."""

    def __init__(self, seed):
        self.weight = values(3, 3, seed=seed).requires_grad_()

    def forward(self, x):
        return torch.tanh(x @ self.weight)

    def through(self, x, others):
        """This layer, then the others, each called by the one before; and back."""
        y = self.forward(x)
        for other in others[:1]:
            y = other.rpc_sync().through(y, others[1:])
        return torch.sigmoid(y * self.weight.sum())

    def gradient(self, context):
        return dist_autograd.get_gradients(context)[self.weight]


def serial_through(x, weights):
    y = torch.tanh(x @ weights[0])
    if weights[1:]:
        y = serial_through(y, weights[1:])
    return torch.sigmoid(y * weights[0].sum())


def layers_of(workers):
    """References to layers, and the same weights here."""
    handles = [rpc.remote(to, Layer, (seed,)) for seed, to in enumerate(workers)]
    weights = [values(3, 3, seed=seed).requires_grad_() for seed in range(len(workers))]
    return handles, weights


def same(context, handles, weights):
    for handle, weight in zip(handles, weights, strict=True):
        found = handle.rpc_sync().gradient(context)
        np.testing.assert_allclose(found.numpy(), weight.grad.numpy(), rtol=1e-12)


@pytest.mark.parametrize(("threads", "over"), [(1, None), (4, None), (4, "zmq"), (2, "unix")])
def test_a_chain_of_calls_that_comes_back_to_the_same_workers(threads, over):
    def main():
        handles, weights = layers_of(["w1", "w2", "w0", "w1", "w2"])
        x = values(2, 3, seed=9)
        serial_through(x, weights).sum().backward()
        with dist_autograd.context() as context:
            y = handles[0].rpc_sync().through(x, handles[1:])
            dist_autograd.backward(context, [y.sum()])
            same(context, handles, weights)

    world(3, main, threads=threads, over=over)


def test_many_calls_at_once_add_up_in_the_same_order_every_time():
    def step(handles, x):
        with dist_autograd.context() as context:
            answers = [h.rpc_async().forward(x) for h in handles for _ in range(5)]
            total = sum(answer.wait().sum() * i for i, answer in enumerate(answers))
            dist_autograd.backward(context, [total])
            return dist_autograd.get_gradients(context)[x].numpy()

    def main():
        handles, weights = layers_of(["w1", "w2", "w1"])
        x = values(2, 3, seed=9).requires_grad_()
        outputs = [torch.tanh(x @ w) for w in weights for _ in range(5)]
        sum(y.sum() * i for i, y in enumerate(outputs)).backward()
        first = step(handles, x)
        np.testing.assert_allclose(first, x.grad.numpy(), rtol=1e-12)
        for _ in range(3):
            assert step(handles, x).tobytes() == first.tobytes()

    world(3, main)


def test_what_is_not_used_holds_nobody_up():
    """A result nobody needs, a call without a result, one that fails, one that is given up."""

    def main():
        handles, weights = layers_of(["w1", "w2"])
        x = values(2, 3, seed=9).requires_grad_()
        (torch.tanh(x @ weights[0]) * 2).sum().backward()
        with dist_autograd.context() as context:
            rpc.rpc_sync("w2", number_of, (x,))
            rpc.remote("w2", number_of, (x,)).to_here()
            handles[1].rpc_sync().through(x, handles[:1])
            with pytest.raises(ValueError, match="no"):
                rpc.rpc_sync("w2", refuse, (x,))
            with pytest.raises(rpc.RpcTimeout, match=r"held on worker 'w2' has not answered"):
                rpc.rpc_sync("w2", held, (x,), timeout=0.05)
            gate.set()
            y = handles[0].rpc_sync().forward(x)
            dist_autograd.backward(context, [(y * 2).sum()])
            same(context, handles[:1], weights[:1])
            found = dist_autograd.get_gradients(context)[x]
            np.testing.assert_allclose(found.numpy(), x.grad.numpy(), rtol=1e-12)

    gate.clear()
    world(3, main)


gate = threading.Event()


def number_of(x):
    return x.sum().item()


def refuse(x):
    raise ValueError("no")


def held(x):
    gate.wait(20)
    return x * 2


def test_references_and_async_execution():
    def main():
        a = values(3, 3).requires_grad_()
        ((a @ a) * 3 + (a @ a) * 10).sum().backward()
        with dist_autograd.context() as context:
            product = rpc.remote("w1", multiply, (a, a))
            here = product.to_here() * 3
            twice = rpc.rpc_async("w2", relayed, ("w1", a)).wait()
            dist_autograd.backward(context, [(here + twice).sum()])
            found = dist_autograd.get_gradients(context)[a]
        np.testing.assert_allclose(found.numpy(), a.grad.numpy(), rtol=1e-12)
        with dist_autograd.context() as context:
            loss = rpc.remote("w1", torch.sum, (rpc.remote("w1", multiply, (a, a)).to_here(),))
            loss.backward(context)
            found = dist_autograd.get_gradients(context)[a]
            with pytest.raises(RuntimeError, match="User RRefs require 'dist_autograd_ctx_id'"):
                loss.backward()
        np.testing.assert_allclose(found.numpy() * 13, a.grad.numpy(), rtol=1e-12)

    world(3, main)


@rpc.functions.async_execution
def relayed(to, a):
    return rpc.rpc_async(to, multiply, (a, a)).then(lambda done: done.wait() * 10)


def test_a_graph_that_is_retained_runs_again_and_adds_up():
    def main():
        a = values(3, 3).requires_grad_()
        with dist_autograd.context() as context:
            loss = rpc.rpc_sync("w1", multiply, (a, a)).sum()
            dist_autograd.backward(context, [loss], retain_graph=True)
            first = dist_autograd.get_gradients(context)[a].clone()
            dist_autograd.backward(context, [loss])
            assert torch.equal(dist_autograd.get_gradients(context)[a], first * 2)
            with pytest.raises(RuntimeError, match="second time"):
                dist_autograd.backward(context, [loss])

    world(2, main)


def contexts_here():
    return dist_autograd._get_debug_info()


def test_a_context_ends_on_all_workers():
    def main():
        handles, _ = layers_of(["w1", "w2"])
        with dist_autograd.context() as context:
            y = handles[0].rpc_sync().through(values(2, 3), handles[1:])
            dist_autograd.backward(context, [y.sum()])
            for worker in ("w1", "w2"):
                found = rpc.rpc_sync(worker, contexts_here)
                assert found == {"num_autograd_contexts": 1, "num_current_backward_passes": 0}
        nothing = {"num_autograd_contexts": 0, "num_current_backward_passes": 0}
        for worker in ("w0", "w1", "w2"):
            until(lambda worker=worker: rpc.rpc_sync(worker, contexts_here) == nothing)
        with pytest.raises(RuntimeError, match="Could not find autograd context with id: 0"):
            dist_autograd.get_gradients(context)

    world(3, main)


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        raise ArithmeticError("no gradient today")


def broken(x):
    return Broken.apply(x)


def test_errors():
    def main():
        a = values(2, 2).requires_grad_()
        with dist_autograd.context() as context:
            y = rpc.rpc_sync("w1", multiply, (a, a))
            with pytest.raises(RuntimeError, match="No tensors provided for gradient"):
                dist_autograd.backward(context, [])
            with pytest.raises(RuntimeError, match="requires_grad not set on root"):
                dist_autograd.backward(context, [values(1)])
            with pytest.raises(RuntimeError, match="all roots need to be scalar"):
                dist_autograd.backward(context, [y])
            with pytest.raises(RuntimeError, match=r"came from worker 'w1'.*use distributed.auto"):
                y.sum().backward()
            with (
                pytest.raises(RuntimeError, match="Already have an autograd context id"),
                dist_autograd.context(),
            ):
                pass
            with pytest.raises(ArithmeticError, match="no gradient today"):
                dist_autograd.backward(context, [rpc.rpc_sync("w1", broken, (a,)).sum()])
        with dist_autograd.context() as context:
            contexts().find(context).note_send(Key(0, 99, 0), send_node([a])[0])  # and never sent
            y = rpc.rpc_sync("w1", multiply, (a, a))
            with pytest.raises(RuntimeError, match=r"did not get through on \['w0'\].*number=99"):
                dist_autograd.backward(context, [y.sum()])

    world(2, main)


def weight_of(layer):
    return rpc.RRef(layer.local_value().weight)


def weight_here(weight):
    return weight.local_value().detach()


@pytest.mark.parametrize(
    ("kind", "options"), [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {})]
)
def test_a_distributed_optimizer_takes_the_steps_of_one_process(kind, options):
    def main():
        handles, weights = layers_of(["w1", "w2", "w0"])
        parameters = [rpc.rpc_sync(h.owner(), weight_of, (h,)) for h in handles]
        optimizer = torch.distributed.optim.DistributedOptimizer(
            kind, parameters, lr=0.05, **options
        )
        serial = kind(weights, lr=0.05, **options)
        for step in range(4):
            x = values(2, 3, seed=step)
            serial.zero_grad()
            serial_through(x, weights).sum().backward()
            serial.step()
            with dist_autograd.context() as context:
                y = handles[0].rpc_sync().through(x, handles[1:])
                dist_autograd.backward(context, [y.sum()])
                optimizer.step(context)
        for parameter, weight in zip(parameters, weights, strict=True):
            found = rpc.rpc_sync(parameter.owner(), weight_here, (parameter,))
            np.testing.assert_allclose(found.numpy(), weight.detach().numpy(), rtol=1e-10)
        with pytest.raises(ValueError, match="Invalid learning rate"):
            torch.distributed.optim.DistributedOptimizer(torch.optim.SGD, parameters, lr=-1.0)

    world(3, main)
