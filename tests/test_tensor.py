"""class Tensor: numbers, NumPy, copies, pickles, dtypes, attributes.

Arithmetic is tested in tests/ops, gradients in tests/autograd.
"""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

import dtrain as torch
from dtrain.autograd import Variable


def test_shape_and_layout():
    x = torch.zeros(2, 3, 4)
    assert (x.shape, x.size(), x.size(-1), x.dim(), x.ndim) == ((2, 3, 4), (2, 3, 4), 4, 3, 3)
    assert repr(x.shape) == "dtrain.Size([2, 3, 4])"
    assert x.shape.numel() == x.numel() == x.nelement() == 24
    assert (x.stride(), x.stride(1), x.element_size(), x.nbytes) == ((12, 4, 1), 4, 4, 96)
    assert x.is_contiguous()
    assert not x.transpose(0, 1).is_contiguous()
    assert x[1].data_ptr() - x.data_ptr() == 48
    assert (x.dtype, x.device.type, x.is_leaf) == (torch.float32, "cpu", True)
    assert x.is_floating_point()
    assert not torch.arange(3).is_floating_point()


def test_numbers():
    x = torch.tensor(2.5)
    assert (x.item(), float(x), int(x), bool(x), complex(x)) == (2.5, 2.5, 2, True, 2.5 + 0j)
    assert [10, 20, 30][torch.tensor(1)] == 20
    assert range(torch.tensor([3])) == range(3)
    with pytest.raises(TypeError, match="only integer tensors of a single element"):
        range(torch.tensor(1.5))
    assert torch.tensor([[1, 2], [3, 4]]).tolist() == [[1, 2], [3, 4]]
    assert f"{x:.2f} {x} {torch.tensor(3)}" == "2.50 2.5 3"


def test_containment_and_iteration():
    x = torch.arange(6).reshape(2, 3)
    assert 4 in x
    assert torch.tensor(9) not in x
    with pytest.raises(RuntimeError, match="only supports Tensor or scalar"):
        "a" in x  # noqa: B015
    assert [row.tolist() for row in x] == [[0, 1, 2], [3, 4, 5]]
    assert len(x) == 2
    assert {x: 1}[x] == 1, "tensors are compared by identity as keys"


def test_numpy_both_ways():
    x = torch.arange(3.0)
    array = x.numpy()
    array[0] = 9
    assert x[0].item() == 9
    assert np.shares_memory(np.asarray(x), array)
    assert np.array(x, dtype=np.float64).dtype == np.float64
    assert not np.shares_memory(np.array(x, copy=True), array)
    for found in (np.exp(x), np.add(x, 1), np.add(1, x)):
        assert isinstance(found, torch.Tensor)
    assert np.from_dlpack(x).tolist() == x.tolist()
    grown = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="requires grad"):
        np.exp(grown)
    assert grown.numpy(force=True).tolist() == [1, 1]
    with torch.no_grad():
        assert grown.numpy().tolist() == [1, 1]
    assert (np.ones(2, np.float32) @ torch.ones(2)).item() == 2
    assert (np.array([1.0, 2.0]) == torch.tensor([1.0, 3.0])).tolist() == [True, False]


def test_copies_are_deep_and_keep_what_is_tied():
    x = torch.ones(2, requires_grad=True)
    x.sum().backward()
    x.tag = ["mine"]
    y = copy.deepcopy(x)
    assert (y.requires_grad, y.grad.tolist(), y.tag) == (True, [1, 1], ["mine"])
    assert y.data_ptr() != x.data_ptr()
    assert y.grad is not x.grad
    assert y.tag is not x.tag
    a, b = copy.deepcopy([x, x])
    assert a is b
    assert copy.copy(x).tolist() == [1, 1]


def test_hooks_stay_behind():
    x, seen = torch.ones(2, requires_grad=True), []
    x.register_hook(seen.append)
    copy.deepcopy(x).sum().backward()
    assert seen == []


def test_pickles():
    x = torch.arange(6.0).reshape(2, 3).t().requires_grad_()
    y = pickle.loads(pickle.dumps(x))
    assert (y.tolist(), y.requires_grad, y.is_leaf) == (x.tolist(), True, True)
    z = pickle.loads(pickle.dumps(x * 2))
    assert z.is_leaf
    assert pickle.loads(pickle.dumps(torch.ones(2, dtype=torch.bfloat16))).dtype is torch.bfloat16


def test_to():
    x = torch.ones(2)
    assert x.to("cpu") is x
    assert x.to(torch.float32) is x
    assert x.to(torch.float32, copy=True) is not x
    assert x.to("cpu", torch.int64).dtype is torch.int64
    assert x.to(device="cpu", dtype=torch.float64, non_blocking=True).dtype is torch.float64
    assert x.to(torch.ones(1, dtype=torch.int8)).dtype is torch.int8
    assert x.to(torch.device("cpu")).cpu().pin_memory() is x
    with pytest.raises(RuntimeError, match="CPU"):
        x.to("cuda")
    with pytest.raises(AssertionError, match="not compiled with CUDA"):
        x.cuda()


def test_type_names():
    x = torch.ones(2)
    assert (x.type(), x.long().type(), x.bool().type()) == (
        "dtrain.FloatTensor", "dtrain.LongTensor", "dtrain.BoolTensor",
    )  # fmt: skip
    assert x.type("torch.DoubleTensor").dtype is torch.float64
    assert x.type("dtrain.IntTensor").dtype is torch.int32


def test_variables_are_tensors():
    x = Variable(torch.ones(2), requires_grad=True)
    assert isinstance(x, Variable)
    assert isinstance(torch.ones(2), Variable)
    (x * 2).sum().backward()
    assert x.grad.tolist() == [2, 2]
    with pytest.warns(UserWarning, match="volatile was removed"):
        Variable(torch.ones(2), volatile=True)


def test_the_gradient_can_be_set():
    x = torch.ones(2, requires_grad=True)
    x.grad = torch.tensor([5.0, 6.0])
    x.sum().backward()
    assert x.grad.tolist() == [6, 7]
    x.grad = None
    assert x.grad is None


def test_data_is_outside_the_graph():
    x = torch.ones(2, requires_grad=True)
    x.data += 1
    assert (x.tolist(), x.requires_grad, x.data.requires_grad) == ([2, 2], True, False)
    x.data = torch.zeros(3)
    assert x.shape == (3,)
    x.sum().backward()
    assert x.grad.shape == (3,)


def test_in_place_arithmetic_works_in_the_memory_itself():
    x = torch.arange(4.0)
    memory = x.data_ptr()
    x.add_(1).mul_(torch.tensor(2.0)).sub_(torch.ones(4)).div_(4)
    x += torch.ones(1)
    x *= 2
    assert x.data_ptr() == memory
    assert x.tolist() == [2.5, 3.5, 4.5, 5.5]
    y = torch.arange(3)
    y += True
    y //= 2
    assert (y.tolist(), y.dtype) == ([0, 1, 1], torch.int64)
    x[1:] += x[:-1]  # overlapping memory: as if the right side had been copied first
    assert x.tolist() == [2.5, 6, 8, 10]


def test_legacy_new_and_random_fillers():
    x = torch.ones(2, dtype=torch.float64)
    assert x.new(3).shape == (3,)
    assert x.new([1, 2]).dtype is torch.float64
    torch.manual_seed(0)
    y = torch.zeros(2, 3).normal_(mean=5, std=0.0)
    assert y.tolist() == [[5, 5, 5], [5, 5, 5]]
    assert (torch.zeros(100).uniform_(2, 3) >= 2).all()


def test_the_random_state_is_a_tensor_as_torch_has_it():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert (state.dtype, tuple(state.shape)) == (torch.uint8, (5056,))
    first = torch.rand(4)
    torch.set_rng_state(state.cpu())
    assert torch.equal(torch.rand(4), first)
    with pytest.raises(TypeError):
        torch.set_rng_state(state.float())
    with pytest.raises(RuntimeError):
        torch.set_rng_state(state[:-1])
