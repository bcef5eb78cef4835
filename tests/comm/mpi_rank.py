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
from dtrain.comm.parts import packed
from dtrain.comm.point_to_point import Recv
from dtrain.comm.reduce import ReduceOp, check_op
from dtrain.errors import CollectiveTimeout, DistBackendError, GroupAborted
from dtrain.testing.conformance import COLLECTIVES, DTYPES, OPS, make_calls
from tests.comm.properties import REDUCING, calls_of, expected, output_of, plans, submit_plan
from tests.distributed import test_dtypes
from tests.distributed.nn import test_functional

EXAMPLES = {2: 80, 4: 30}
EXACT = {"MIN", "MAX", "BAND", "BOR", "BXOR"}


def group():
    return dist.group.WORLD.arrays


def bound(everyone, wanted):
    """How far from `wanted` MPI's order of adding, or multiplying, may bring each element; None:
    the bits must be equal.
    """
    call = everyone[group().rank]
    if not hasattr(call, "op") or wanted.dtype.kind in "biu" or call.op.name in EXACT:
        return None
    wide = np.complex128 if wanted.dtype.kind == "c" else np.float64
    work = np.finfo(np.float32 if wanted.dtype.itemsize == 2 else wanted.dtype)
    mass = exact = np.abs(wanted.astype(wide))
    if call.op.name != "PRODUCT":
        inputs = [one.buf if hasattr(one, "buf") else one.inp for one in everyone]
        mass = np.sum([np.abs(values.reshape(-1).astype(wide)) for values in inputs], axis=0)
        if hasattr(call, "cuts"):
            mass = packed(mass, call.cuts[group().rank])
        start = group().rank * wanted.size if mass.size > wanted.size else 0
        mass = mass[start : start + wanted.size].reshape(wanted.shape)
    # Both are the sum of n roundings from the true value; then each is rounded to its dtype.
    last = float(ml_dtypes.finfo(wanted.dtype).eps) if wanted.dtype.itemsize == 2 else 0.0
    return 2 * len(everyone) * float(work.eps) * mass + last * exact + float(work.tiny)


def same(got, wanted, near):
    """The same bits, or as near as `bound` says."""
    if near is None:
        return got.tobytes() == wanted.tobytes()
    wide = np.complex128 if wanted.dtype.kind == "c" else np.float64
    with np.errstate(all="ignore"):
        left, right = got.astype(wide), wanted.astype(wide)
        equal = (left == right) | (np.isnan(left) & np.isnan(right))
        # With an infinity or nan in one part of a complex number, the other depends on the order.
        vague = ~np.isfinite(right) if wanted.dtype.kind == "c" else False
        return bool(((np.abs(left - right) <= near) | equal | vague).all())


def check_conformance():
    for kind, count, dtype, op in itertools.product(COLLECTIVES, (0, 1, 7, 20_003), DTYPES, OPS):
        if kind not in (*REDUCING, "reduce_shards") and op is not OPS[0]:
            continue
        try:
            check_op(op, dtype, kind)
        except (ValueError, RuntimeError):
            continue
        calls = make_calls(kind, group().size, count, dtype, op)
        wanted = type(calls[0]).reference(calls)[group().rank]
        mine, near = calls[group().rank], bound(calls, wanted)
        group().submit(mine)
        if wanted is not None:
            assert same(mine.output, wanted, near), (kind, count, dtype, op)
    assert group().statistics().calls["barrier"].count == 4 * len(DTYPES)


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
            near = [
                None if value is None else bound([calls[n] for calls in everything], value)
                for n, value in enumerate(wanted if plan.kind in REDUCING else [])
            ]
            made = submit_plan(group(), plan, everything[group().rank], async_op)
            for (call, work), value, limit in itertools.zip_longest(made, wanted, near):
                work.wait(20.0)
                good = value is None or same(output_of(call), value, limit)
                assert good, (group().rank, plan)

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
