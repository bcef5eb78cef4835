"""What every rank of `test_mpi` does, started by mpiexec: the checks named on the command line."""

from __future__ import annotations

import itertools
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

import dtrain as torch
import dtrain.distributed as dist
from dtrain.comm.point_to_point import Recv
from dtrain.comm.reduce import ReduceOp, check_op
from dtrain.errors import CollectiveTimeout, DistBackendError, GroupAborted
from dtrain.testing.conformance import COLLECTIVES, DTYPES, OPS, make_calls
from tests.comm.properties import calls_of, expected, output_of, plans, submit_plan
from tests.distributed import test_dtypes
from tests.distributed.nn import test_functional

EXAMPLES = {2: 100, 4: 30}
EXACT = {"MIN", "MAX", "BAND", "BOR", "BXOR"}


def group():
    return dist.group.WORLD.arrays


def close(got, expected, op, dtype):
    """The same bits, but for floating sums and products: MPI adds in an order of its own."""
    if dtype.kind in "biu" or op.name in EXACT:
        return got.tobytes() == expected.tobytes()
    wide = np.complex128 if dtype.kind == "c" else np.float64
    rough = dtype.itemsize == 2
    return np.allclose(
        got.astype(wide), expected.astype(wide), rtol=2e-2 if rough else 1e-4, atol=1e-3,
        equal_nan=True,
    )  # fmt: skip


def check_conformance():
    reducing = ("all_reduce", "reduce", "reduce_scatter")
    for kind, count, dtype, op in itertools.product(COLLECTIVES, (0, 1, 7, 20_003), DTYPES, OPS):
        if kind not in reducing and op is not OPS[0]:
            continue
        try:
            check_op(op, dtype, kind)
        except (ValueError, RuntimeError):
            continue
        calls = make_calls(kind, group().size, count, dtype, op)
        expected = type(calls[0]).reference(calls)[group().rank]
        mine = calls[group().rank]
        group().submit(mine)
        if expected is not None:
            same = close if kind in reducing else lambda a, b, *rest: a.tobytes() == b.tobytes()
            assert same(mine.output, expected, op, dtype), (kind, count, dtype, op)
    assert group().statistics().calls["barrier"].count == 4 * len(DTYPES)


def bound(call, everyone, expected):
    """How far MPI's order of adding (or multiplying) may bring it from ours, element by element."""
    ranks, wide = len(everyone), np.complex128 if expected.dtype.kind == "c" else np.float64
    exact = expected.astype(wide)
    work = np.finfo(np.float32 if expected.dtype.itemsize == 2 else expected.dtype)
    if call.op.name == "PRODUCT":
        mass = np.abs(exact)
    else:
        inputs = [call.buf if hasattr(call, "buf") else call.inp for call in everyone]
        mass = np.sum([np.abs(values.reshape(-1).astype(wide)) for values in inputs], axis=0)
        part = group().rank * expected.size if mass.size > expected.size else 0
        mass = mass[part : part + expected.size].reshape(expected.shape)
    # Each of the two rounds n times; then both are rounded to the dtype of the result.
    rounding = 0.0 if expected.dtype.itemsize > 2 else float(ml_dtypes.finfo(expected.dtype).eps)
    return 2 * ranks * float(work.eps) * mass + rounding * np.abs(exact) + float(work.tiny)


def same(call, everyone, expected):
    """The same bits, but for floating sums and products, which may differ by as much as `bound`."""
    got = output_of(call)
    if not hasattr(call, "op") or expected.dtype.kind in "biu" or call.op.name in EXACT:
        return got.tobytes() == expected.tobytes()
    wide = np.complex128 if expected.dtype.kind == "c" else np.float64
    with np.errstate(all="ignore"):
        left, right = got.astype(wide), expected.astype(wide)
        near = np.abs(left - right) <= bound(call, everyone, expected)
        # What is not finite: the same infinity, and nan where ours has nan. A complex number with
        # an infinity or nan in it makes the other part depend on the order as well.
        vague = ~np.isfinite(right) & (not np.isrealobj(right))
        equal = (left == right) | (np.isnan(left) & np.isnan(right))
    return bool((near | equal | vague).all())


def check_properties():
    """The calls that `test_properties` makes on the other transports; MPI is a second oracle."""

    @settings(
        derandomize=True, database=None, deadline=None, max_examples=EXAMPLES[group().size],
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(plans, st.booleans())
    def holds(given_plans, async_op):
        for plan in given_plans:
            everything = calls_of(plan, group().size)
            wanted = expected(everything)[group().rank]
            made = submit_plan(group(), plan, everything[group().rank], async_op)
            for n, ((call, work), value) in enumerate(zip(made, wanted, strict=True)):
                work.wait(20.0)
                everyone = [calls[n] for calls in everything if n < len(calls)]
                assert value is None or same(call, everyone, value), (group().rank, plan)

    holds()


def check_nan():
    x = torch.tensor([float("nan") if group().rank == 0 else 1.0, float(group().rank)])
    dist.all_reduce(x, ReduceOp.MAX)
    assert np.isnan(x[0].item())
    assert x[1].item() == group().size - 1


def check_bridge():
    """The tests of all other transports: dtypes through every call, gradients to second order."""
    for name in ("bool", "int64", "bfloat16", "float32", "complex64"):
        test_dtypes.check_moves(name)
        test_dtypes.check_reductions(name)
    test_functional.check_closed_forms()
    test_functional.check_gradients("all_to_all_single, uneven")
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, {"rank": dist.get_rank()})
    assert values == [{"rank": r} for r in range(dist.get_world_size())]


def check_groups_and_messages():
    rank, size = dist.get_rank(), dist.get_world_size()
    assert dist.get_backend() == "mpi"
    assert dist.get_backend_config() == "cpu:mpi"
    if rank in (0, 2):  # the others do not take part
        pair = dist.new_group([2, 0], sort_ranks=False)
        tensors = [torch.tensor([float(rank * k)]) for k in range(3)]
        works = [dist.all_reduce(t, group=pair, async_op=True) for t in tensors]
        for work in reversed(works):
            work.wait()
        assert [t.item() for t in tensors] == [0.0, 2.0, 4.0]
        assert dist.get_rank(pair) == (rank == 0)
        dist.destroy_process_group(pair)
    got = torch.zeros(3)
    if rank:
        dist.send(torch.full((3,), float(rank)), 0)
    else:
        seen = {}
        for _ in range(size - 1):
            source = dist.recv(got)
            seen[source] = got[0].item()
        assert seen == {r: float(r) for r in range(1, size)}
    mesh = dist.init_device_mesh("cpu", (size,), mesh_dim_names=("dp",))
    assert mesh["dp"].get_group() is dist.group.WORLD


def check_failures():
    with pytest.raises(ValueError, match="mpiexec started this process with"):
        again(rank=17)
    with pytest.raises(ValueError, match="are on it, not 'zmq'"):
        dist.new_group(backend="zmq")
    with pytest.raises(DistBackendError, match="not available on the backend 'mpi'"):
        dist.monitored_barrier()
    part = dist.new_group()
    late = Recv(np.zeros(1), (dist.get_rank() + 1) % dist.get_world_size(), 5)
    with pytest.raises(CollectiveTimeout, match="MPI does not tell which"):
        part.arrays.submit(late, timeout=0.1)
    with pytest.raises(GroupAborted, match="the group has failed"):
        dist.barrier(part)
    dist.barrier()


def again(**arguments):
    dist.destroy_process_group()
    try:
        dist.init_process_group("mpi", **arguments)
    finally:
        if not dist.is_initialized():
            dist.init_process_group("mpi")


if __name__ == "__main__":
    dist.init_process_group("mpi", timeout=60)
    for name in sys.argv[1:]:
        globals()[name]()
        dist.barrier()
    print("done", flush=True)
