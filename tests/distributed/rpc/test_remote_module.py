"""Modules on other workers: called, trained, passed on, inside modules that are here."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

import dtrain as torch
from dtrain.distributed import autograd as dist_autograd, rpc
from dtrain.distributed.nn import RemoteModule
from dtrain.distributed.nn.api import remote_module
from tests.distributed.rpc.worlds import world

nn = torch.nn


class Net(nn.Module):
    def __init__(self, width, depth=1):
        super().__init__()
        torch.manual_seed(width)
        self.layers = nn.Sequential(*[nn.Linear(width, width) for _ in range(depth)])
        self.drop = nn.Dropout(0.5)

    def forward(self, x, scale=1.0):
        return self.drop(torch.tanh(self.layers(x))) * scale


class Hybrid(nn.Module):
    def __init__(self, remote):
        super().__init__()
        self.remote = remote
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.remote(x))


def apply_module(module, x):
    return module(x)


def is_training(module_rref):
    return module_rref.local_value().training


def kind_of(module_rref):
    return type(module_rref.local_value()).__name__


def not_a_module():
    return 5


def test_it_is_called_like_a_module_that_is_here():
    def main():
        module, here = RemoteModule("w1/cpu", Net, (4,), {"depth": 2}), Net(4, 2)
        module.eval(), here.eval()
        x = torch.arange(8.0).reshape(2, 4)
        assert torch.equal(module(x), here(x))
        assert torch.equal(module.forward_async(x, scale=3.0).wait(), here(x, 3.0))
        assert not rpc.rpc_sync("w1", is_training, (module.module_rref,))
        assert module.train() is module
        assert rpc.rpc_sync("w1", is_training, (module.get_module_rref(),))
        assert (module.on, module.device) == ("w1", "cpu")
        assert repr(module) == "RemoteModule(w1/cpu)"

    world(2, main)


def test_it_may_be_an_argument_or_made_from_a_reference():
    def main():
        module = RemoteModule("rank:1", nn.Linear, (4, 2))
        x = torch.ones(3, 4)
        expected = module(x)
        assert torch.equal(rpc.rpc_sync("w2", apply_module, (module, x)), expected)
        again = RemoteModule.init_from_module_rref("w1/cpu", module.get_module_rref())
        assert torch.equal(again(x), expected)
        with pytest.raises(RuntimeError, match="can only be pickled when using RPC"):
            pickle.dumps(module)

    world(3, main)


def test_it_trains_inside_of_a_module_that_is_here():
    def main():
        hybrid, serial = Hybrid(RemoteModule("w1", Net, (4,))), Hybrid(Net(4))
        serial.head.load_state_dict(hybrid.head.state_dict())
        hybrid.eval(), serial.eval()
        assert len(list(hybrid.parameters())) == 2
        parameters = [*map(rpc.RRef, hybrid.parameters()), *hybrid.remote.remote_parameters()]
        optimizer = torch.distributed.optim.DistributedOptimizer(
            torch.optim.Adam, parameters, lr=0.05
        )
        here = torch.optim.Adam(serial.parameters(), lr=0.05)
        x, losses = torch.arange(8.0).reshape(2, 4), []
        for _ in range(5):
            with dist_autograd.context() as context:
                loss = (hybrid(x) - 1).square().sum()
                dist_autograd.backward(context, [loss])
                optimizer.step(context)
            expected = (serial(x) - 1).square().sum()
            here.zero_grad()
            expected.backward()
            here.step()
            np.testing.assert_allclose(loss.item(), expected.item(), rtol=1e-5)
            losses.append(loss.item())
        assert losses[-1] < losses[0] / 2

    world(2, main)


def test_what_it_refuses():
    def main():
        with pytest.raises(ValueError, match=r"Expect `module_cls.*<class 'int'>"):
            RemoteModule("w1/cpu", not_a_module)
        with pytest.raises(TypeError, match="unexpected keyword"):
            RemoteModule("w1/cpu", Net, (4,), {"wide": 1})
        with pytest.raises(ValueError, match="Unknown destination worker w9"):
            RemoteModule("w9", Net, (4,))
        with pytest.raises(RuntimeError, match="cuda"):
            RemoteModule("w1/cuda:0", Net, (4,))
        for place in ("/cpu", "a/b/c", "rank:x"):
            with pytest.raises(ValueError, match="Could not parse remote_device"):
                RemoteModule(place, Net, (4,))
        module = RemoteModule("w1", nn.Linear, (2, 2))
        with pytest.raises(ValueError, match=r"Method ``to`` not supported.*on worker 'w1'"):
            module.to("cpu")
        with pytest.raises(ValueError, match="``state_dict`` not supported"):
            Hybrid(module).state_dict()
        assert rpc.rpc_sync("w1", kind_of, (module.module_rref,)) == "Linear"

    world(2, main)
    assert remote_module.RemoteModule is RemoteModule
