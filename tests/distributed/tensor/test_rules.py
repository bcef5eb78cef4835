"""Every op with sample inputs, at every placement of its inputs: the result and the gradients are
those of whole tensors, or the op refuses by name. No op computes on parts as if they were wholes.

The oracle is the op itself on whole tensors, which has its own tests.
"""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest

import dtrain as torch
import dtrain.distributed as dist
import dtrain.nn.functional as F
from dtrain.autograd.node import make
from dtrain.autograd.op import OPS
from dtrain.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from dtrain.distributed.tensor._dispatch import RULES
from dtrain.testing.distributed import run_distributed


def placements_of(array, axes=1):
    """All placements of an input on a mesh."""
    if not isinstance(array, np.ndarray) or not array.ndim:
        return [None]
    cuts = [Shard(d) for d in range(array.ndim)]
    partial = [Partial(), Partial("avg")] if array.dtype.kind == "f" else []
    return list(itertools.product([Replicate(), *cuts, *partial], repeat=axes))


def placed(array, cut, mesh, grad):
    """(an input at placements, the tensor whose gradient is asked for)."""
    if cut is None:
        return (array if array is None or not isinstance(array, np.ndarray) else make(array)), None
    grad = grad and array.dtype.kind == "f"
    share, place = array, mesh.get_coordinate()
    for axis, placement in enumerate(cut):
        if placement.is_partial():
            share = share * ((0.25, 0.75)[place[axis]] * (2 if placement == Partial("avg") else 1))
    held = [Replicate() if p.is_partial() else p for p in cut]
    leaf = distribute_tensor(make(share), mesh, held, src_data_rank=None).requires_grad_(grad)
    if held == list(cut):
        return leaf, leaf
    part = leaf.to_local().detach().requires_grad_(grad)
    return DTensor.from_local(part, mesh, cut, shape=array.shape), part


def outputs(result):
    return list(result) if isinstance(result, tuple) else [result]


def scalar(results):
    """A number that depends on every element of every result."""
    total = 0
    for result in results:
        weights = np.linspace(0.5, 1.5, result._data.size).reshape(result._data.shape)
        total = total + (result * make(weights.astype(result._data.dtype))).sum()
    return total


def compare(name, function, arrays, combination, mesh, grad):
    """Whether `function` took these placements; asserts that it was right if so."""
    pairs = [placed(a, p, mesh, grad) for a, p in zip(arrays, combination, strict=True)]
    try:
        found = outputs(function(*[value for value, _ in pairs]))
    except NotImplementedError as refused:
        if name.partition(" ")[0] not in str(refused):
            raise
        return False
    wholes = [make(a.copy()).requires_grad_(grad and a.dtype.kind == "f")
              if isinstance(a, np.ndarray) else a for a in arrays]  # fmt: skip
    expected = outputs(function(*wholes))
    where = f"{name} {combination}"
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape, where
        assert tuple(mine.to_local().shape) == mine._spec.box[1], where
        assert np.allclose(mine.full_tensor().detach()._data, theirs._data, equal_nan=True), where
    if not any(t._wants_grad() for t in expected):
        return True
    scalar([t for t in expected if t._wants_grad()]).backward()
    scalar([t.full_tensor() for t in found if t._wants_grad()]).backward()
    for whole, (value, leaf), cut in zip(wholes, pairs, combination, strict=True):
        if leaf is None or whole.grad is None:
            continue
        if isinstance(leaf, DTensor):
            mine, share = leaf.grad.full_tensor(), 1.0
        else:  # contributions, and perhaps cut along the other axis
            mine, share = leaf.grad, 0.5 ** sum(p == Partial("avg") for p in cut)
        expected = whole.grad._data if isinstance(leaf, DTensor) else of_part(whole.grad, value)
        assert np.allclose(mine._data, expected * share), f"gradient of {where}"
    return True


def of_part(whole, value):
    offsets, sizes = value._spec.box
    return whole._data[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]


def samples(op):
    """The op's own samples, and smooth pairs for those that have none."""
    if op.sample is not None:
        return op.sample()
    flags = op.name.startswith(("bitwise", "logical"))
    x = np.arange(1.0, 25.0).reshape(4, 6) % 5
    x = x > 2 if flags else x
    attrs = {"argmax": {"dim": 1, "keepdim": False}, "argmin": {"dim": 0, "keepdim": True},
             "any": {"dim": (1,), "keepdim": False}, "all": {"dim": (0, 1), "keepdim": False},
             "argsort": {"dim": 1, "descending": False}}  # fmt: skip
    return [((x, x.T.copy().T)[: len(op.inputs)], attrs.get(op.name, {}))]


def check_ops(names):
    mesh = dist.init_device_mesh("cpu", (2,))
    taken = []
    for name in names:
        op, some = OPS[name], False
        for arrays, attrs in samples(op):
            for combination in itertools.product(*[placements_of(a) for a in arrays]):
                cut = [p for p in combination if p is not None and not p[0].is_replicate()]
                if cut or any(p is not None for p in combination):
                    function = partial(op.apply, **attrs)
                    grad = op.vjp is not None and name != "floor_divide"
                    took = compare(name, function, arrays, combination, mesh, grad)
                    some |= took and bool(cut)
        taken += [name] if some else []
    return taken


# Taken as wholes by functions below, or in need of inputs of their own.
LATER = ("cat", "layer_norm", "rms_norm", "cross_entropy", "scaled_dot_product_attention")
NAMES = [n for n in OPS if n not in LATER and not n.startswith("bitwise_")]
NAMES = [n for n in NAMES if OPS[n].sample is not None or n in RULES]


@pytest.mark.parametrize("part", range(4))
def test_every_op_is_right_or_refuses(part):
    names = NAMES[part::4]
    taken = run_distributed(2, check_ops, names, timeout=60)[0]
    expected = [n for n in names if n in RULES]
    assert sorted(taken) == sorted(expected)


def drawn(*shape):
    return np.random.RandomState(sum(shape)).randn(*shape)


def seeded(function):
    def call(*inputs):
        torch.manual_seed(11)
        return function(*inputs)

    return call


X, ROWS = drawn(4, 5, 6), drawn(6)
SCORES, CLASSES = drawn(4, 3), np.array([2, 0, 1, 2])
QUERY, MASK = drawn(2, 4, 3, 2), drawn(3, 3)
FUNCTIONS = {
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (6,), w, b), X, ROWS, ROWS),
    "layer_norm of two": (lambda x: F.layer_norm(x, (5, 6)), X),
    "rms_norm": (lambda x, w: F.rms_norm(x, (6,), w), X, ROWS),
    "attention": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
                  QUERY, QUERY + 1, QUERY - 1),
    "attention mask": (lambda q, m: F.scaled_dot_product_attention(q, q, q, m), QUERY, MASK),
    "cross_entropy": (F.cross_entropy, SCORES, CLASSES),
    "cross_entropy weighted": (lambda x, t, w: F.cross_entropy(x, t, w, ignore_index=1), SCORES,
                               CLASSES, np.array([0.5, 1.0, 2.0])),
    "cross_entropy of each": (lambda x, t: F.cross_entropy(x, t, reduction="none"), SCORES,
                              CLASSES),
    "cross_entropy sum": (lambda x, t: F.cross_entropy(x, t, reduction="sum"), SCORES, CLASSES),
    "cross_entropy smooth": (lambda x, t: F.cross_entropy(x, t, label_smoothing=0.1), SCORES,
                             CLASSES),
    "cross_entropy of images": (F.cross_entropy, drawn(2, 3, 4), np.array([[0, 1, 2, 0]] * 2)),
    "cat": (lambda a, b: torch.cat([a, b], 1), X, X * 2),
    "stack": (lambda a, b: torch.stack([a, b], 1), X, X * 2),
    "chunk": (lambda x: x.chunk(2, 1), X),
    "dropout": (seeded(lambda x: F.dropout(x, 0.5)), X),
    "dropout2d": (seeded(lambda x: F.dropout2d(x, 0.5)), drawn(2, 4, 3, 3)),
    "var": (lambda x: torch.var(x, 1), X),
    "std": (lambda x: torch.std(x), X),
    "mean": (lambda x: x.mean(), X),
    "view": (lambda x: x.view(-1, 6), X),
    "heads": (lambda x: x.view(4, 5, 2, 3).transpose(1, 2).reshape(4, 2, 15), X),
    "indexing": (lambda x: x[1:, :, None][..., [0, 2, 2]], X),
    "masked": (lambda x: x.masked_fill(x > 0, 2.0) * torch.where(x < 0, x, 0.0), X),
    "addmm": (torch.addmm, drawn(4, 6), drawn(4, 3), drawn(3, 6)),
    "einsum": (lambda a, b: torch.einsum("bij,bkj->bik", a, b), X, X + 1),
    "max": (lambda x: x.max(2).values, X),
    "embedding": (lambda w, i: F.embedding(i, w, padding_idx=1), drawn(7, 4),
                  np.array([[1, 6, 3], [0, 5, 1]])),
    "relu6": (F.relu6, X), "normalize": (F.normalize, X),
    "softmax": (lambda x: F.softmax(x, -1), X),
    "mse": (F.mse_loss, X, X + 0.5), "losses": (F.smooth_l1_loss, X, X * 0.5),
    "flatten": (lambda x: x.flatten(1), X), "clamp": (lambda x: x.clamp(-1, 1).abs(), X),
}  # fmt: skip


def check_functions(names):
    mesh = dist.init_device_mesh("cpu", (2,))
    taken = {}
    for name in names:
        function, *arrays = FUNCTIONS[name]
        for combination in itertools.product(*[placements_of(a) for a in arrays]):
            took = compare(name, function, arrays, combination, mesh, True)
            taken[name] = taken.get(name, 0) + took
    return taken


@pytest.mark.parametrize("part", range(2))
def test_functions(part):
    names = list(FUNCTIONS)[part::2]
    taken = run_distributed(2, check_functions, names, timeout=60)[0]
    for name in names:  # nothing of this needs to be refused
        wanted = 1
        for array in FUNCTIONS[name][1:]:
            wanted *= len(placements_of(array))
        assert taken[name] == wanted, name


def check_on_a_grid(count):
    """A sample of the placements on a mesh of two axes; as many refusals as there may be: none."""
    mesh, draw = dist.init_device_mesh("cpu", (2, 2)), np.random.RandomState(count)
    for name, (function, *arrays) in FUNCTIONS.items():
        choices = [placements_of(array, 2) for array in arrays]
        for _ in range(count):
            combination = [some[draw.randint(len(some))] for some in choices]
            assert compare(name, function, arrays, combination, mesh, True), (name, combination)


def test_functions_on_a_grid():
    run_distributed(4, check_on_a_grid, 4, timeout=60)
