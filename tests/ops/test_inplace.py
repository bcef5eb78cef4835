"""Changes in place: memory, versions, what is refused. Gradients are in tests/autograd/programs.py.

Every in-place method must do to the memory what its namesake returns.
"""

from __future__ import annotations

import numpy as np
import pytest

import dtrain as torch
from dtrain import methods

ARGUMENTS = {
    "add": (2,), "sub": (2,), "mul": (2,), "div": (2,), "pow": (2,), "clamp": (0.5, 1.5),
    "clamp_min": (0.5,), "clamp_max": (0.5,), "clip": (0.5, 1.5), "remainder": (2,), "fmod": (2,),
    "floor_divide": (2,), "lerp": (torch.ones(2, 2), 0.5), "cumsum": (0,),
    "masked_fill": (torch.tensor([True, False]), 9.0), "addcmul": (torch.ones(2), torch.ones(2)),
    "addcdiv": (torch.ones(2), torch.ones(2)), "scatter": (0, torch.tensor([[1, 0]]), 9.0),
    "scatter_add": (0, torch.tensor([[1, 0]]), torch.ones(1, 2)),
    "index_add": (0, torch.tensor([1]), torch.ones(1, 2)),
    "index_copy": (0, torch.tensor([1]), torch.ones(1, 2)),
    "index_fill": (0, torch.tensor([1]), 9.0), "addmm": (torch.ones(2, 3), torch.ones(3, 2)),
    "eq": (1,), "ne": (1,), "lt": (1,), "le": (1,), "gt": (1,), "ge": (1,),
}  # fmt: skip


def sample():
    return torch.tensor([[0.25, 1.0], [2.0, 0.75]])


@pytest.mark.parametrize("name", [n for n in methods.IN_PLACE.split() if n != "baddbmm"])
def test_the_memory_gets_what_the_function_returns(name):
    arguments = ARGUMENTS.get(name, ())
    x = sample()
    expected = getattr(x, name)(*arguments).float()
    view, memory = x.t(), x.data_ptr()
    assert getattr(x, f"{name}_")(*arguments) is x
    assert x.data_ptr() == memory
    np.testing.assert_array_equal(x.numpy(), expected.numpy())
    np.testing.assert_array_equal(view.numpy(), expected.numpy().T)


@pytest.mark.parametrize("operator", ["+=", "-=", "*=", "/=", "**=", "//=", "%="])
def test_operators(operator):
    names = {"x": sample(), "y": sample()}
    memory = names["x"].data_ptr()
    exec(f"y = y {operator[:-1]} 2; x {operator} 2", names)
    assert names["x"].data_ptr() == memory
    assert names["x"].tolist() == names["y"].tolist()


def test_integer_and_bool_operators():
    x = torch.tensor([6, 3])
    x &= 2
    x |= 8
    x ^= 1
    x <<= 1
    assert x.tolist() == [22, 22]
    t = torch.tensor([True, False])
    t &= torch.tensor([True, True])
    assert t.tolist() == [True, False]


def test_batched_product_in_place():
    x = torch.zeros(2, 1, 1)
    x.baddbmm_(torch.ones(2, 1, 3), torch.ones(2, 3, 1), beta=0.5, alpha=2)
    assert x.tolist() == [[[6]], [[6]]]


def test_other_dtypes_are_cast_or_refused():
    x = torch.ones(2, dtype=torch.float64)
    x += torch.ones(2)
    assert (x.tolist(), x.dtype) == ([2, 2], torch.float64)
    with pytest.raises(RuntimeError, match="result type Float can't be cast to the desired output"):
        torch.ones(2, dtype=torch.int64).mul_(0.5)
    y = torch.zeros(2, dtype=torch.int64)
    y.copy_(torch.tensor([1.9, -1.9]))
    assert y.tolist() == [1, -1]


def test_read_only_memory_is_not_written():
    array = np.ones(2)
    array.setflags(write=False)
    for change in (lambda x: x.add_(1), lambda x: x.zero_(), lambda x: x.__setitem__(0, 5)):
        with pytest.raises(RuntimeError, match="unsupported operation"):
            change(torch.from_numpy(array))
    assert array.tolist() == [1, 1]


def test_an_error_changes_nothing():
    x = torch.ones(3)
    with pytest.raises(RuntimeError):
        x.add_(torch.ones(2))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        x[:] = torch.ones(2)
    with pytest.raises(IndexError):
        x[torch.tensor([0, 7])] = 5
    assert x.tolist() == [1, 1, 1]
