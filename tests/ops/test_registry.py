"""What every op of the registry must do, checked on the samples that it states itself.

An op that is added with `define(..., sample=...)` is tested here without a line being written:
gradients to second order, dtypes, no change of inputs, no memory given away, nothing kept alive.
"""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

import dtrain as torch
import dtrain.nn.functional  # the other families define their ops when they are imported
from dtrain.autograd import grad, gradcheck, gradgradcheck
from dtrain.autograd.op import OPS, Op, define
from dtrain.autograd.value import Value
from dtrain.testing import GradcheckError

# Ops whose gradient is not checked here, and why.
WITHOUT_SAMPLE = {
    "floor_divide": "its rule raises: torch has no derivative either",
    "max_pool_grad": "the gradient of max_pool, which is sampled; tests/ops/test_pool.py",
    "max_pool_pick": "the gradient of max_pool_grad; tests/ops/test_pool.py",
}
DIFFERENTIABLE = {name: op for name, op in OPS.items() if op.vjp is not None}
SAMPLES = [
    pytest.param(op, *sample, id=f"{name}-{i}")
    for name, op in DIFFERENTIABLE.items()
    if op.sample is not None
    for i, sample in enumerate(op.sample())
]
every_sample = pytest.mark.parametrize(("op", "arrays", "attrs"), SAMPLES)


def is_tensor(value):
    return isinstance(value, Value)


def is_floating(value):
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


def boxed(arrays, dtype=np.float64):
    """The floating arrays as leaves that require grad, the others as they are."""
    return [torch.tensor(a.astype(dtype)).requires_grad_() if is_floating(a) else a for a in arrays]


def applied(op, inputs, attrs):
    """The op's results that require grad."""
    out = op.apply(*inputs, **attrs)
    return [y for y in (out if isinstance(out, tuple) else (out,)) if y.requires_grad]


def random_like(y, seed=1):
    return torch.tensor(np.asarray(np.random.RandomState(seed).randn(*y.shape), y._data.dtype))


def test_every_differentiable_op_has_a_sample():
    missing = {name for name, op in DIFFERENTIABLE.items() if op.sample is None}
    assert missing == WITHOUT_SAMPLE.keys()


@every_sample
def test_gradients_to_second_order(op, arrays, attrs):
    inputs = boxed(arrays)
    if not any(is_tensor(x) and x.numel() for x in inputs):
        return  # nothing to move: the empty sample is for the other tests

    def function(*args):
        return tuple(applied(op, args, attrs))

    small = sum(x.numel() for x in inputs if is_tensor(x)) < 50
    assert gradcheck(function, inputs, fast_mode=not small)
    # the whole matrix of second derivatives would take too long: one random direction
    assert gradgradcheck(function, inputs, fast_mode=True)


@every_sample
def test_arrays_and_tensors_give_the_same_and_inputs_stay(op, arrays, attrs):
    before = [a.copy() if isinstance(a, np.ndarray) else a for a in arrays]
    plain = op.apply(*arrays, **attrs)
    inputs = boxed(arrays)
    out = op.apply(*inputs, **attrs)
    pairs = zip(*((v if isinstance(v, tuple) else (v,)) for v in (plain, out)), strict=True)
    for array, tensor in pairs:
        assert isinstance(tensor, torch.Tensor)
        assert np.asarray(array).dtype == tensor._data.dtype
        np.testing.assert_array_equal(array, tensor._data)
        own = not any(np.shares_memory(tensor._data, x._data) for x in inputs if is_tensor(x))
        assert own or tensor._base is not None or op.name == "alias", "a view must say so"
    for y in applied(op, inputs, attrs):
        y.backward(random_like(y))
    for a, b, x in zip(arrays, before, inputs, strict=True):
        np.testing.assert_array_equal(a, b)
        if is_tensor(x):
            np.testing.assert_array_equal(x._data, b)


@every_sample
def test_single_precision_stays_single(op, arrays, attrs):
    attrs = {
        k: torch.float32 if v is torch.float64 else v.astype(np.float32) if is_floating(v) else v
        for k, v in attrs.items()
    }
    inputs = boxed(arrays, np.float32)
    results = applied(op, inputs, attrs)
    assert [y.dtype for y in results] == [torch.float32] * len(results)
    for g in raw_gradients(op, results):
        assert g is None or np.asarray(g).dtype == np.float32, op.name


def raw_gradients(op, results):
    """What the rule itself returns for arrays, before the engine does anything to it."""
    node = results[0]._node
    starts = [random_like(y)._data for y in results]
    if node.op is not op:  # the node of one result among several
        return op.backward(node.edges[0], starts, False)
    return op.backward(node, starts[0], False)


@every_sample
def test_the_rule_gives_no_memory_away(op, arrays, attrs):
    """The engine puts new arrays into `.grad` as they are: nobody else may have them."""
    inputs = boxed(arrays)
    results = applied(op, inputs, attrs)
    node = results[0]._node
    whole = node if node.op is op else node.edges[0]
    start = random_like(results[0])._data
    given = start if node.op is op else [start] + [None] * (node.total - 1)
    grads = [g for g in op.backward(whole, given, False) if isinstance(g, np.ndarray)]
    kept = [v._data for v in inputs if is_tensor(v)] + [y._data for y in results]
    for i, g in enumerate(grads):
        if g is start:
            continue
        assert not any(np.shares_memory(g, k) for k in kept), f"{op.name}: a saved array"
        assert not any(g is other for other in grads[:i]), f"{op.name}: one array twice"


@every_sample
def test_nothing_outlives_backward(op, arrays, attrs):
    """Reference counting alone frees the graph: no cycles for the collector to find."""
    inputs = boxed(arrays)
    gc.disable()
    try:
        middle = [x * 1 if is_tensor(x) else x for x in inputs]  # saved, not leaves
        results = applied(op, middle, attrs)
        held = [weakref.ref(x._data) for x in middle if is_tensor(x)]
        held += [weakref.ref(y._node) for y in results]
        torch.autograd.backward(results, [random_like(y) for y in results])
        del middle, results
        assert [r() for r in held] == [None] * len(held)
    finally:
        gc.enable()


# --- the checkers, checked -----------------------------------------------------------------------


@pytest.fixture
def scratch_registry():
    """Ops defined in a test leave the registry with it."""
    before = set(OPS)
    yield
    for name in set(OPS) - before:
        del OPS[name]


@pytest.mark.usefixtures("scratch_registry")
def test_a_gradient_that_is_wrong_by_a_thousandth_is_found():
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    right = define("right_square", lambda x: x * x, saves="x", vjp=lambda n, g: (g * 2 * n.x,))
    wrong = define("wrong_square", lambda x: x * x, saves="x", vjp=lambda n, g: (g * 2.004 * n.x,))
    assert gradcheck(right, x)
    assert gradgradcheck(right, x)
    with pytest.raises(GradcheckError, match="Jacobian mismatch for output 0 with respect to inp"):
        gradcheck(wrong, x)
    assert not gradcheck(wrong, x, raise_exception=False)


@pytest.mark.usefixtures("scratch_registry")
def test_a_second_derivative_that_is_wrong_is_found():
    """First order is right; the rule hides its dependence on x from the second."""
    op = define(
        "half_right", lambda x: x**3, saves="x",
        vjp=lambda n, g: (g * (n.x.detach() if isinstance(n.x, Value) else n.x) ** 2 * 3,),
    )  # fmt: skip
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    assert gradcheck(op, x)
    with pytest.raises(GradcheckError):
        gradgradcheck(op, x)


@pytest.mark.usefixtures("scratch_registry")
def test_the_memory_check_sees_a_rule_that_returns_what_it_saved():
    op = define("leaky", lambda x: x + 1, saves="x", vjp=lambda n, g: (n.x,))
    with pytest.raises(AssertionError, match="leaky: a saved array"):
        test_the_rule_gives_no_memory_away(op.op, [np.ones(2)], {})


def test_ops_show_their_name():
    assert repr(OPS["exp"]) == "<op exp>"
    assert isinstance(OPS["exp"], Op)
    with pytest.raises(AssertionError, match="defined twice"):
        define("exp", np.exp)
    x = torch.ones(2, requires_grad=True)
    assert grad(x.exp().sum(), x)[0].shape == (2,)


# Of 16 bits their functions make 32, and round at the end: tests/ops/test_loss.py, test_norm.py.
WIDENED = {"cross_entropy", "rms_norm"}


@every_sample
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_half_and_so_do_gradients(op, arrays, attrs, dtype):
    if op.name in WIDENED:
        return
    kind = dtype.numpy
    attrs = {
        k: dtype if v is torch.float64 else v.astype(kind) if is_floating(v) else v
        for k, v in attrs.items()
    }
    inputs = [torch.tensor(a).to(dtype).requires_grad_() if is_floating(a) else a for a in arrays]
    for y in applied(op, inputs, attrs):
        assert y.dtype is dtype
        y.backward(torch.ones(y.shape).to(dtype))
    for x in inputs:
        if is_tensor(x) and x.grad is not None:
            assert x.grad.dtype is dtype
