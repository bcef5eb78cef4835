"""Every dtype through every public collective: 0-d, empty, contiguous and transposed tensors.

Rank r holds small whole numbers, so that every dtype has the exact result, which NumPy computes in
int64 (complex128 for complex) from all ranks' inputs.
"""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.testing.distributed import run_distributed

N = 3
NAMES = [
    *("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
]
INTEGRAL, COMPLEX = NAMES[:9], NAMES[-2:]
SHAPES = [(), (0,), (5,), (2, 3), (3, 0, 2)]


def me():
    return dist.get_rank()


def numbers(rank, shape):
    """What `rank` holds, as int64: 0..3, different on every rank."""
    return np.add(2 * np.arange(np.prod(shape, dtype=int)).reshape(shape), rank) % 4


def held(name, shape, rank=None, *, turned=True):
    """A tensor of that; with two dimensions or more not contiguous."""
    values = numbers(me() if rank is None else rank, shape)
    tensor = torch.tensor(values.T.copy() if turned else values, dtype=getattr(torch, name))
    return tensor.permute(*range(tensor.ndim)[::-1]) if turned and tensor.ndim > 1 else tensor


def same(tensor, expected, name):
    assert tensor.dtype is getattr(torch, name)
    assert tuple(tensor.shape) == np.shape(expected)
    kind = np.complex128 if name in COMPLEX else bool if name == "bool" else np.float64
    np.testing.assert_array_equal(tensor.numpy().astype(kind), np.asarray(expected).astype(kind))


def every(shape):
    return [numbers(rank, shape) for rank in range(N)]


def check_moves(name):
    for shape in SHAPES:
        values = every(shape)
        t = held(name, shape)
        dist.broadcast(t, 2)
        same(t, values[2], name)
        parts = [torch.zeros_like(held(name, shape)) for _ in range(N)]
        dist.all_gather(parts, held(name, shape))
        for part, value in zip(parts, values, strict=True):
            same(part, value, name)
        whole = torch.zeros(N, *shape, dtype=getattr(torch, name))
        dist.all_gather_single(whole, held(name, shape))
        same(whole, np.stack(values), name)
        parts = [torch.zeros_like(whole[0]) for _ in range(N)] if me() == 1 else None
        dist.gather(held(name, shape), parts, dst=1)
        for part, value in zip(parts or [], values if parts else [], strict=True):
            same(part, value, name)
        out = torch.zeros_like(held(name, shape))
        given = [held(name, shape, r) for r in range(N)] if me() == 0 else None
        dist.scatter(out, given, src=0)
        same(out, values[me()], name)
        outs = [torch.zeros_like(out) for _ in range(N)]
        dist.all_to_all(outs, [held(name, shape, me() * r % 5) for r in range(N)])
        for rank, part in enumerate(outs):
            same(part, numbers(rank * me() % 5, shape), name)
        if shape:
            out = torch.zeros(N * shape[0], *shape[1:], dtype=getattr(torch, name))
            dist.all_to_all_single(out, torch.cat([held(name, shape)] * N))
            same(out, np.concatenate(values), name)
        got = torch.zeros_like(held(name, shape))
        sending = dist.isend(held(name, shape), (me() + 1) % N)
        dist.recv(got, (me() - 1) % N)
        sending.wait()
        same(got, values[me() - 1], name)


def results(name, values):
    """{operator: the exact result} for the operators that the dtype has."""
    total = np.sum(values, axis=0)
    if name in COMPLEX:
        return {dist.ReduceOp.SUM: total}
    kind = [v.astype(bool) for v in values] if name == "bool" else values
    found = {
        dist.ReduceOp.SUM: total,
        dist.ReduceOp.PRODUCT: np.prod(values, axis=0),
        dist.ReduceOp.MIN: np.min(kind, axis=0),
        dist.ReduceOp.MAX: np.max(kind, axis=0),
    }
    if name in INTEGRAL:
        ufuncs = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)
        ops = (dist.ReduceOp.BAND, dist.ReduceOp.BOR, dist.ReduceOp.BXOR)
        found |= {op: reduce(ufunc, kind) for op, ufunc in zip(ops, ufuncs, strict=True)}
    return found


def scaled(name, values):
    """The same for the operators that divide or multiply: values times 6, so that all is exact."""
    if name in INTEGRAL:
        return {}
    total = np.sum(values, axis=0)
    return {dist.ReduceOp.AVG: total * 2, dist.ReduceOp.PREMUL_SUM(0.5): total * 3}


def check_reductions(name):
    for shape in SHAPES:
        values = every(shape)
        cases = [(1, op, r) for op, r in results(name, values).items()]
        cases += [(6, op, r) for op, r in scaled(name, values).items()]
        for factor, op, expected in cases:
            given = held(name, shape) * factor if factor > 1 else held(name, shape)
            t = given.clone()
            dist.all_reduce(t, op)
            same(t, expected, name)
            t = given.clone()
            dist.reduce(t, 1, op)
            same(t, expected if me() == 1 else values[me()] * factor, name)
            out = torch.zeros_like(given)
            dist.reduce_scatter(out, [given] * N, op)
            same(out, expected, name)
            dist.reduce_scatter_single(out, torch.stack([given] * N), op)
            same(out, expected, name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("check", [check_moves, check_reductions])
def test_every_dtype(check, name):
    run_distributed(N, check, name)


@pytest.mark.parametrize("name", ["bool", "bfloat16", "complex64"])
@pytest.mark.parametrize("check", [check_moves, check_reductions])
def test_over_sockets(check, name):
    run_distributed(N, check, name, transport="zmq")


def check_refusals():
    op = dist.ReduceOp
    whole, broken, twofold = (
        torch.ones(2, dtype=t) for t in (torch.int64, torch.float32, torch.complex64)
    )
    for tensor, operator, error, sentence in (
        (whole, op.AVG, RuntimeError, "can't be cast to the desired output type int64"),
        (whole, op.PREMUL_SUM(2.0), RuntimeError, "needs a floating dtype"),
        (broken, op.BAND, RuntimeError, r"Cannot use ReduceOp.BAND with non-integral dtype"),
        (twofold, op.MAX, ValueError, "does not support ReduceOp.MAX on complex tensors"),
    ):
        with pytest.raises(error, match=sentence):
            dist.all_reduce(tensor, operator)
    dist.barrier()


def test_operators_that_a_dtype_does_not_have():
    run_distributed(2, check_refusals)
