"""Every optimizer against PyTorch's recorded runs, and what holds for all of them."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

import dtrain as torch
from dtrain.optim import update
from tests.optim.cases import CASES, DTYPES, run
from tests.recorded import load, load_json, under

# Relative and absolute, of numbers near 1: the same formulas, rounded in another order (torch fuses
# multiply-adds). The centered RMSprop subtracts nearly equal squares and needs the absolute one.
TOLERANCE = {"float32": (3e-6, 4e-7), "float64": (1e-13, 1e-15)}


def close(ours, recorded, dtype):
    rtol, atol = TOLERANCE[dtype]
    np.testing.assert_allclose(ours, recorded, rtol=rtol, atol=atol)
    assert ours.dtype == recorded.dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_torch(case, dtype):
    recorded = under(load("optimizers"), f"{case}/{dtype}")
    optimizer, params = run(torch, case, dtype)
    ours = {str(i): p.detach().numpy() for i, p in enumerate(params)}
    for index, state in optimizer.state_dict()["state"].items():
        ours |= {f"{index}/{name}": value.numpy() for name, value in state.items()}
    assert ours.keys() == recorded.keys()
    for key, value in ours.items():
        close(value, recorded[key], dtype)


@pytest.mark.parametrize("case", CASES)
def test_group_options_are_those_of_torch(case):
    for named in (False, True):
        weight, bias = (torch.zeros(n, requires_grad=True) for n in (2, 1))
        params = [("weight", weight), ("bias", bias)] if named else [weight, bias]
        optimizer = eval(f"torch.optim.{case}", {"torch": torch, "params": params})
        (group,) = optimizer.state_dict()["param_groups"]
        (recorded,) = load_json("optimizer_groups")[f"{case}/{named}"]
        assert list(group) == list(recorded)
        assert group == {k: tuple(v) if k == "betas" else v for k, v in recorded.items()}


@pytest.mark.parametrize("case", CASES)
def test_state_recorded_by_torch_is_loaded_and_gone_on_from(case):
    """torch's state after 6 steps, put into a new optimizer, takes the same 7th step as ours."""
    ours, params = run(torch, case, "float64")
    recorded = under(load("optimizers"), f"{case}/float64")
    state = {}
    for key, value in recorded.items():
        index, _, name = key.partition("/")
        if name:
            state.setdefault(int(index), {})[name] = torch.tensor(value.copy())
    (group,) = load_json("optimizer_groups")[f"{case}/False"]
    copies = [torch.tensor(recorded[str(i)].copy(), requires_grad=True) for i in range(3)]
    theirs = eval(f"torch.optim.{case}", {"torch": torch, "params": copies})
    theirs.load_state_dict({"state": state, "param_groups": [{**group, "params": [0, 1, 2]}]})
    for param, other in zip(params, copies, strict=True):
        param.grad = torch.ones_like(param)
        other.grad = torch.ones_like(other)
    ours.step()
    theirs.step()
    for param, other in zip(params, copies, strict=True):
        close(other.detach().numpy(), param.detach().numpy(), "float64")


@pytest.mark.parametrize("case", CASES)
def test_saved_and_loaded_goes_on_bit_for_bit(case):
    ours, params = run(torch, case, "float32")
    copies = [p.detach().clone().requires_grad_() for p in params]
    loaded = eval(f"torch.optim.{case}", {"torch": torch, "params": copies})
    loaded.load_state_dict(ours.state_dict())
    pickled = pickle.loads(pickle.dumps((copy.deepcopy(ours).state_dict(), ours)))
    assert repr(pickled[1]) == repr(ours)
    for step in range(2):
        for param, other in zip(params, copies, strict=True):
            grad = torch.full_like(param, 0.3 + step)
            param.grad, other.grad = grad, grad.clone()
        ours.step()
        loaded.step()
    for param, other in zip(params, copies, strict=True):
        assert (param == other).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_one_flat_parameter_is_updated_as_its_parts(case, dtype, monkeypatch):
    """Bit for bit, wherever chunks end."""
    random = np.random.default_rng(0)
    sizes, (step, whole) = (3, 64, 1, 40), (3, 108)
    start, grads = random.normal(size=whole), random.normal(size=(step, whole))

    def final(cuts, chunk):
        monkeypatch.setattr(update, "CHUNK", chunk)
        params = [
            torch.tensor(part, dtype=getattr(torch, dtype), requires_grad=True)
            for part in np.split(start, cuts)
        ]
        optimizer = eval(f"torch.optim.{case}", {"torch": torch, "params": params})
        for grad in grads:
            for param, part in zip(params, np.split(grad, cuts), strict=True):
                param.grad = torch.tensor(part, dtype=param.dtype)
            optimizer.step()
        return np.concatenate([p.detach().numpy() for p in params])

    flat = final([], 1 << 16)
    assert not np.array_equal(flat, start)
    np.testing.assert_array_equal(final(np.cumsum(sizes)[:-1], 1 << 16), flat)
    np.testing.assert_array_equal(final([], 7), flat)


@pytest.mark.parametrize("case", CASES)
def test_strides_do_not_matter(case):
    """A transposed parameter with a strided gradient, against contiguous copies of both."""
    random = np.random.default_rng(0)
    values, grad = random.normal(size=(4, 3)), random.normal(size=(6, 8))
    strided = torch.from_numpy(values.copy().T).requires_grad_()
    plain = torch.from_numpy(values.T.copy()).requires_grad_()
    for param, g in ((strided, grad[::2, ::2]), (plain, grad[::2, ::2].copy())):
        optimizer = eval(f"torch.optim.{case}", {"torch": torch, "params": [param]})
        for _ in range(2):
            param.grad = torch.from_numpy(g)
            optimizer.step()
    assert not strided.is_contiguous()
    assert (strided == plain).all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_parameters_are_computed_in_float32(case, dtype):
    """One step equals the float32 step, rounded once."""
    kind = getattr(torch, dtype)
    half = torch.tensor([1.5, -0.25, 3.0], dtype=kind, requires_grad=True)
    full = torch.tensor([1.5, -0.25, 3.0], requires_grad=True)
    for param in (half, full):
        param.grad = torch.tensor([0.5, 1.0, -2.0], dtype=param.dtype)
        eval(f"torch.optim.{case}", {"torch": torch, "params": [param]}).step()
    assert half.dtype is kind
    assert (half == full.to(kind)).all()


@pytest.mark.parametrize("case", CASES)
def test_complex_parameters_are_pairs_of_reals(case):
    pairs = np.random.default_rng(0).normal(size=(2, 4, 2))
    boxed = [torch.from_numpy(pairs[0].copy()).requires_grad_()]
    boxed.append(torch.from_numpy(pairs[0].copy().view(complex)[:, 0]).requires_grad_())
    for param, grad in zip(boxed, (pairs[1], pairs[1].view(complex)[:, 0]), strict=True):
        param.grad = torch.from_numpy(grad.copy())
        eval(f"torch.optim.{case}", {"torch": torch, "params": [param]}).step()
    real, made = (param.detach().numpy() for param in boxed)
    np.testing.assert_array_equal(np.ascontiguousarray(made).view(float).reshape(4, 2), real)


@pytest.mark.parametrize("case", CASES)
def test_a_step_counts_as_a_change_in_place(case):
    param = torch.ones(2, requires_grad=True)
    loss = (param * param).sum()
    loss.backward(retain_graph=True)
    eval(f"torch.optim.{case}", {"torch": torch, "params": [param]}).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
