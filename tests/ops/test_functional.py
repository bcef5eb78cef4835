"""Functions of nn.functional against results, gradients and signatures recorded from PyTorch."""

from __future__ import annotations

import inspect
import warnings

import numpy as np
import pytest

import dtrain
from dtrain.nn import functional as F
from tests.ops.functional_cases import CASES, evaluate
from tests.recorded import load, load_json

# In float32 the worst cases are sums of some hundred terms and reciprocals of small numbers.
TOLERANCES = {"float64": 1e-12, "float32": 2e-5}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_result_and_gradients_are_pytorchs(case, dtype):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "reduction: 'mean'")
        found = evaluate(dtrain, case, dtype)
    expected = load("functional")[case[0]]
    assert found.shape == expected.shape
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCES[dtype] * scale)


def test_every_recorded_case_is_compared():
    assert {case[0] for case in CASES} == set(load("functional"))


SIGNATURES = load_json("functional_signatures")
SHARED = sorted(name for name in SIGNATURES if hasattr(F, name))


@pytest.mark.parametrize("name", SHARED)
def test_signature_is_pytorchs(name):
    parameters = inspect.signature(getattr(F, name)).parameters.values()
    ours = [[p.name, None if p.default is p.empty else repr(p.default)] for p in parameters]
    theirs = SIGNATURES[name]
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    for (parameter, default), (_, expected) in zip(ours, theirs, strict=True):
        assert eval(str(default)) == eval(str(expected)), parameter


def test_the_signatures_compared_are_many():
    assert len(SHARED) > 35


@pytest.mark.parametrize(
    ("function", "arguments"),
    [("relu", ()), ("relu6", ()), ("leaky_relu", (0.1,)), ("elu", (2.0,)), ("selu", ()),
     ("hardtanh", (-0.5, 0.5)), ("silu", ()), ("mish", ()), ("hardswish", ()),
     ("threshold", (0.1, 5.0)), ("dropout", (0.5, True))],
)  # fmt: skip
def test_inplace_writes_the_same_and_keeps_the_gradient(function, arguments):
    data = np.linspace(-2.1, 2, 8)
    outcomes = []
    for inplace in (False, True):
        dtrain.manual_seed(3)
        leaf = dtrain.tensor(data, requires_grad=True)
        x = leaf * 1
        y = getattr(F, function)(x, *arguments, inplace=inplace)
        assert (y is x) == inplace
        y.sum().backward()
        outcomes.append((y.detach().numpy(), leaf.grad.numpy()))
    np.testing.assert_array_equal(outcomes[0][0], outcomes[1][0])
    np.testing.assert_array_equal(outcomes[0][1], outcomes[1][1])


def test_normalize_writes_to_out():
    x, out = dtrain.tensor([[3.0, 4.0]]), dtrain.zeros(1, 2)
    assert F.normalize(x, out=out) is out
    np.testing.assert_allclose(out.numpy(), [[0.6, 0.8]], rtol=1e-6)


def test_embedding_refuses_what_it_does_not_do():
    weight = dtrain.zeros(3, 2)
    index = dtrain.tensor([0])
    with pytest.raises(NotImplementedError, match="max_norm and scale_grad_by_freq"):
        F.embedding(index, weight, max_norm=1.0)
    with pytest.raises(NotImplementedError, match="max_norm and scale_grad_by_freq"):
        F.embedding(index, weight, scale_grad_by_freq=True)
    with pytest.raises(IndexError, match="index out of range in self"):
        F.embedding(dtrain.tensor([7]), weight)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "softmin"])
def test_softmax_wants_a_dimension(name):
    with pytest.raises(ValueError, match=f"Implicit dimension choice for {name}"):
        getattr(F, name)(dtrain.zeros(2))
