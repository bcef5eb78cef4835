"""The meta device: tensors that have a shape and a dtype and no values.

What torch 2.13 says and does is the oracle: sentences, shapes and which calls are made there. That
nothing is held is counted in bytes that NumPy hands out.
"""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import threading
import tracemalloc

import numpy as np
import pytest

import dtrain as torch
from dtrain import nn
from dtrain.nn.utils import skip_init
from dtrain.testing.distributed import run_distributed

NO_DATA = "Cannot copy out of meta tensor; no data!"


def meta(*size, **options):
    return torch.empty(*size, device="meta", **options)


class Net(nn.Module):
    """What models do while they are made: shared weights, buffers that are computed, own draws."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, width, padding_idx=1)
        self.norm = nn.BatchNorm1d(width)
        self.conv = nn.Conv2d(1, 2, 3)
        self.own = nn.Parameter(torch.randn(width, width) * 0.02)
        self.head = nn.Linear(width, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.tril(torch.ones(width, width)).view(1, width, width))
        places, waves = torch.arange(0, 6).unsqueeze(1), torch.zeros(6, width)
        waves[:, 0::2] = torch.sin(places * torch.exp(torch.arange(0, width, 2).float() * -0.1))
        self.register_buffer("waves", waves, persistent=False)
        nn.init.trunc_normal_(self.own, std=0.02)
        nn.init.orthogonal_(self.own)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(2, 3), lambda: torch.zeros(2, 3), lambda: torch.ones((2, 3)),
        lambda: torch.full((2, 3), 7.0), lambda: torch.rand(2, 3), lambda: torch.randn(2, 3),
        lambda: torch.tensor([[1.0, 2, 3], [4, 5, 6]]), lambda: torch.eye(2, 3),
        lambda: torch.randint(9, (2, 3), dtype=torch.float32),
        lambda: torch.as_tensor([[1.0, 2, 3], [4, 5, 6]]),
        lambda: torch.arange(6.0).view(2, 3), lambda: torch.linspace(0, 1, 6).reshape(2, 3),
    ],
)  # fmt: skip
def test_every_factory_makes_them_inside_the_device(make):
    state = torch.random.get_rng_state()
    with torch.device("meta") as place:
        assert torch.get_default_device() == place
        made = make()
    assert made.is_meta
    assert made.device == torch.device("meta")
    assert tuple(made.shape) == (2, 3)
    assert made.dtype is torch.float32
    assert made.stride() == (3, 1)
    assert made.is_contiguous()
    assert made.nbytes == 24
    assert torch.random.get_rng_state().tolist() == state.tolist()  # nothing was drawn
    assert not make().is_meta


def test_the_innermost_device_counts_and_each_thread_has_its_own():
    found = []
    with torch.device("meta"):
        with torch.device("cpu"):
            found.append(torch.ones(1).is_meta)
        found.append(torch.ones(1, device="cpu").is_meta)
        found.append(torch.zeros_like(torch.ones(1, device="cpu")).is_meta)
        found.append(torch.ones(1, device="cpu").new_zeros(2).is_meta)
        thread = threading.Thread(target=lambda: found.append(torch.ones(1).is_meta))
        thread.start()
        thread.join(timeout=10)
    assert found == [False] * 5
    torch.set_default_device("meta")
    try:
        assert torch.ones(1).is_meta
    finally:
        torch.set_default_device(None)
    assert not torch.ones(1).is_meta
    beside = meta(2)
    assert torch.zeros_like(beside).is_meta
    assert beside.new_ones(3).is_meta
    assert not torch.zeros_like(beside, device="cpu").is_meta


@pytest.mark.parametrize(
    ("ask", "error", "sentence"),
    [
        (lambda t: t.numpy(), TypeError, "can't convert meta device type tensor to numpy."),
        (lambda t: np.asarray(t), TypeError, "can't convert meta device type tensor to numpy."),
        (lambda t: np.exp(t), TypeError, "can't convert meta device type tensor to numpy."),
        (lambda t: t.sum().item(), RuntimeError, "Tensor.item() cannot be called on meta tensors"),
        (lambda t: float(t.sum()), RuntimeError, "Tensor.item() cannot be called on meta tensors"),
        (lambda t: bool(t.sum()), RuntimeError, "Tensor.item() cannot be called on meta tensors"),
        (lambda t: 1 in t, RuntimeError, "Tensor.item() cannot be called on meta tensors"),
        (lambda t: t.item(), RuntimeError, "a Tensor with 6 elements cannot be converted to Scal"),
        (lambda t: t.tolist(), NotImplementedError, NO_DATA),
        (lambda t: t.to("cpu"), NotImplementedError, NO_DATA),
        (lambda t: t.cpu(), NotImplementedError, NO_DATA),
        (lambda t: torch.zeros(2, 3).copy_(t), NotImplementedError, NO_DATA),
        (lambda t: torch.zeros(2, 3).add_(t), NotImplementedError, NO_DATA),
        (lambda t: torch.nonzero(t), NotImplementedError, NO_DATA),
        (lambda t: torch.equal(t, t), NotImplementedError, NO_DATA),
        (lambda t: torch.save(t, io.BytesIO()), NotImplementedError, NO_DATA),
        (lambda t: t + torch.ones(2, 3), RuntimeError, "at least two devices, meta and cpu!"),
        (lambda t: t + meta(2), RuntimeError, "must match the size of tensor b (2)"),
        (lambda t: setattr(t, "data", torch.ones(3)), RuntimeError, "given data of shape [3]"),
        (lambda t: torch.Generator(device="meta"), RuntimeError, "a Generator on the meta device"),
    ],
)
def test_what_needs_values_says_so(ask, error, sentence):
    with pytest.raises(error) as raised:
        ask(meta(2, 3))
    assert sentence in str(raised.value)


@pytest.mark.parametrize(
    "compute",
    [
        lambda t, u: t + u[0] * 2, lambda t, u: t @ u.t(), lambda t, u: t.exp().to(torch.float16),
        lambda t, u: torch.cat([t, u], 1), lambda t, u: t.reshape(3, 2)[1:], lambda t, u: t > 1,
        lambda t, u: nn.functional.layer_norm(t, (3,)), lambda t, u: t.max(1).indices,
        lambda t, u: torch.where(t > 0, t, u), lambda t, u: 3 // (1 + t.long()),
        lambda t, u: t.chunk(3, 1)[2], lambda t, u: torch.softmax(t, -1), lambda t, u: t.mean(),
    ],
)  # fmt: skip
def test_results_have_the_shape_and_dtype_of_real_ones(compute):
    real = compute(torch.ones(2, 3), torch.ones(2, 3))
    without = compute(meta(2, 3), meta(2, 3))
    assert without.is_meta
    assert not without.requires_grad
    assert (without.shape, without.dtype) == (real.shape, real.dtype)


ARGUMENTS = [(), (0,), (2.0,), (0, 1), ("float",), (0, "int"), ("int",), ("bool", 1.0), ([1, 0],)]


def _called(function, first, rest):
    """What a call gives, flat; nothing where it is refused."""
    kinds = {"float": torch.float32, "int": torch.int64, "bool": torch.bool}
    rest = [meta(3, 3, dtype=kinds[a]) if isinstance(a, str) else a for a in rest]
    try:
        found = function(meta(3, 3, dtype=kinds[first]), *rest)
    except Exception:
        return []
    return list(found) if isinstance(found, (tuple, list)) else [found]


@pytest.mark.filterwarnings("ignore")
def test_no_operation_takes_what_is_not_there_for_values():
    seen, shown = 0, []
    for module in (torch, nn.functional):
        for name in dir(module):
            function = getattr(module, name)
            if not inspect.isfunction(function) or not function.__module__.startswith("dtrain.op"):
                continue
            for first, rest in itertools.product(("float", "int", "bool"), ARGUMENTS):
                for found in _called(function, first, rest):
                    seen += isinstance(found, torch.Tensor)
                    if isinstance(found, np.ndarray) or not getattr(found, "is_meta", True):
                        shown.append(name)
    assert seen > 500
    assert shown == []


def test_a_model_is_described_without_memory():
    kept = Net()
    tracemalloc.start()
    try:
        with torch.device("meta"):
            layers = nn.Sequential(nn.Linear(4096, 4096), nn.LayerNorm(4096), nn.Linear(4096, 4096))
            halves = layers.half()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20 < sum(p.nbytes for p in halves.parameters())
    with torch.device("meta"):
        net = Net()
    assert list(net.state_dict()) == list(kept.state_dict())
    assert all(t.is_meta for t in (*net.parameters(), *net.buffers(), *net.state_dict().values()))
    for mine, other in zip(net.parameters(), kept.parameters(), strict=True):
        assert isinstance(mine, nn.Parameter)
        assert mine.requires_grad
        assert mine.is_leaf
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
    assert repr(net.own).endswith("tensor(..., device='meta', size=(8, 8), requires_grad=True)")


def test_to_empty_and_reset_parameters_give_what_making_it_whole_gives():
    torch.manual_seed(3)
    whole = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Embedding(4, 2))
    with torch.device("meta"):
        later = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Embedding(4, 2))
    parameters = list(later.parameters())
    later.to_empty(device="cpu")
    torch.manual_seed(3)
    for module in later:
        module.reset_parameters()
    assert all(a is b for a, b in zip(parameters, later.parameters(), strict=True))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, later.state_dict()[name])
    later[0](torch.ones(2, 3)).sum().backward()
    assert later[0].weight.grad.tolist() == [[2.0] * 3] * 4


def test_what_is_shared_stays_shared():
    with torch.device("meta"):
        net = Net()
    twin = copy.deepcopy(net)
    assert twin.head.weight is twin.embed.weight
    assert twin.own is not net.own
    net.to_empty(device="cpu")
    assert net.head.weight is net.embed.weight
    assert not net.head.weight.is_meta
    assert type(net.own) is nn.Parameter
    assert type(net.mask) is torch.Tensor
    assert twin.own.is_meta
    net.to("meta")
    assert net.head.weight is net.embed.weight
    assert net.mask.is_meta


def test_loading_without_assign_warns_and_with_it_takes_the_tensors():
    state = nn.Linear(2, 2).state_dict()
    empty = nn.Linear(2, 2, device="meta")
    with pytest.warns(UserWarning, match="which is a no-op") as warned:
        empty.load_state_dict(state)
    for name, warning in zip(("weight", "bias"), warned, strict=True):
        begins = f"for {name}: copying from a non-meta parameter in the checkpoint to a meta param"
        assert str(warning.message).startswith(begins)
    assert empty.weight.is_meta
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty.weight, state["weight"])
    assert empty.weight.requires_grad
    with pytest.raises(RuntimeError, match=NO_DATA):
        empty.load_state_dict(nn.Linear(2, 2, device="meta").state_dict())


@pytest.mark.parametrize("move", [lambda m: m.to("cpu"), lambda m: m.cpu()])
def test_a_module_cannot_leave_with_values_it_has_not(move):
    with pytest.raises(NotImplementedError) as raised:
        move(nn.Sequential(nn.Linear(2, 2, device="meta")))
    assert "Please use torch.nn.Module.to_empty() instead of torch.nn.Module.to()" in str(
        raised.value
    )
    assert "'0.weight' of Sequential" in str(raised.value)


def test_skip_init_draws_nothing():
    state = torch.random.get_rng_state()
    made = skip_init(nn.Linear, 3, 2, bias=False)
    assert torch.random.get_rng_state().tolist() == state.tolist()
    assert made.weight.shape == (2, 3)
    assert not made.weight.is_meta
    with pytest.raises(RuntimeError, match="Module must support a 'device' arg to skip init"):
        skip_init(nn.ReLU)
    with pytest.raises(RuntimeError, match="Expected a Module; got"):
        skip_init(torch.ones)


def test_ddp_refuses_a_model_without_values():
    def main():
        model = nn.Linear(2, 2, device="meta")
        with pytest.raises(RuntimeError, match="parameter 'weight' is on the meta device"):
            nn.parallel.DistributedDataParallel(model)

    run_distributed(1, main)
