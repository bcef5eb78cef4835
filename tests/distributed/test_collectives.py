"""The tensor collectives: values from closed forms, torch's argument rules, staging and versions.

What a collective computes is tested in tests/comm against `reference`; here it is what the bridge
adds: tensors, lists, global ranks, non-contiguous memory, async handles, error sentences.
"""

from __future__ import annotations

import threading

import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.autograd.node import version_of
from dtrain.errors import CollectiveMismatch, CollectiveTimeout, PeerLost
from dtrain.testing.distributed import run_distributed

N = 3


def me() -> int:
    return dist.get_rank()


def check_all_reduce():
    """Rank r holds [r+1, 10(r+1)]; the sum of 1..3 is 6, the mean 2, the maximum 3."""
    for op, expected in (("SUM", 6.0), ("AVG", 2.0), ("MAX", 3.0), ("PRODUCT", 6.0)):
        t = torch.tensor([1.0, 10.0]) * (me() + 1)
        assert dist.all_reduce(t, getattr(dist.ReduceOp, op)) is None
        assert t[0].item() == expected


def check_rooted():
    t = torch.full((2,), float(me()))
    dist.broadcast(t, 2)
    assert t.tolist() == [2.0, 2.0]
    t = torch.full((2,), float(me()))
    dist.reduce(t, dst=1)
    assert t.tolist() == ([3.0, 3.0] if me() == 1 else [float(me())] * 2)
    got = [torch.zeros(2) for _ in range(N)] if me() == 0 else None
    dist.gather(torch.full((2,), float(me())), got, dst=0)
    assert me() != 0 or [g[0].item() for g in got] == [0.0, 1.0, 2.0]
    out = torch.zeros(2)
    parts = [torch.full((2,), 10.0 * i) for i in range(N)] if me() == 2 else None
    dist.scatter(out, parts, src=2)
    assert out.tolist() == [10.0 * me()] * 2


def check_gathers():
    every = [torch.zeros(2, dtype=torch.int64) for _ in range(N)]
    dist.all_gather(every, torch.tensor([me(), 7]))
    assert [t.tolist() for t in every] == [[0, 7], [1, 7], [2, 7]]
    whole = torch.zeros(N * 2)
    dist.all_gather_into_tensor(whole, torch.full((2,), float(me())))
    assert whole.tolist() == [0, 0, 1, 1, 2, 2]
    part = torch.zeros(2)
    dist.reduce_scatter_tensor(part, torch.arange(6, dtype=torch.float32))
    assert part.tolist() == [3.0 * (2 * me()), 3.0 * (2 * me() + 1)]
    dist.reduce_scatter(part, [torch.full((2,), float(i)) for i in range(N)], dist.ReduceOp.SUM)
    assert part.tolist() == [3.0 * me()] * 2


def check_all_to_all():
    """Rank r sends r + 1 copies of 10r + i to rank i: uneven parts, in a list and in one tensor."""
    sent = [torch.full((me() + 1,), 10 * me() + i) for i in range(N)]
    got = [torch.zeros(i + 1, dtype=torch.int64) for i in range(N)]
    dist.all_to_all(got, sent)
    assert [t.tolist() for t in got] == [[10 * i + me()] * (i + 1) for i in range(N)]
    flat = torch.zeros(1 + 2 + 3, dtype=torch.int64)
    dist.all_to_all_single(flat, torch.cat(sent), [1, 2, 3], [me() + 1] * N)
    assert flat.tolist() == torch.cat(got).tolist()


def check_uneven_all_gather():
    """Rank r has r rows: rank 0 none."""
    parts = [torch.zeros(r, 2) for r in range(N)]
    dist.all_gather(parts, torch.full((me(), 2), float(me())))
    assert [p.tolist() for p in parts] == [[[float(r)] * 2] * r for r in range(N)]


def check_gather_single():
    out = torch.zeros(N, 2) if me() == 1 else None
    dist.gather_single(out, torch.full((2,), float(me())), dst=1)
    assert out is None or out.tolist() == [[r, r] for r in range(N)]
    if me() == 0:
        with pytest.raises(ValueError, match="must be None on all ranks but the destination"):
            dist.gather_into_tensor(torch.zeros(N, 2), torch.ones(2), dst=1)


def check_non_contiguous():
    """A transposed tensor is staged and written back; its version counts the write."""
    base = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    t = base.t()
    before = version_of(t)
    dist.all_reduce(t)
    assert base.tolist() == [[0, 3, 6], [9, 12, 15]]
    assert version_of(t) == before + 1


def check_async():
    t = torch.ones(1000)
    work = dist.all_reduce(t, async_op=True)
    assert work.wait() is True
    assert work.is_completed()
    assert work.is_success()
    assert work.result()[0] is t
    assert work.get_future().then(lambda f: f.value()[0].sum().item()).wait(5) == N * 1000
    works = [dist.all_reduce(torch.ones(2), async_op=True) for _ in range(5)]
    assert all(w.get_future().wait(5)[0].tolist() == [N, N] for w in works)


@pytest.mark.parametrize(
    "check",
    [
        check_all_reduce,
        check_rooted,
        check_gathers,
        check_all_to_all,
        check_uneven_all_gather,
        check_gather_single,
        check_non_contiguous,
        check_async,
    ],
)
@pytest.mark.parametrize("transport", ["local", "shm", "zmq"])
def test_values(check, transport):
    run_distributed(N, check, transport=transport)


def check_arguments():
    with pytest.raises(TypeError, match=r"Expected parameter `tensor` of type torch\.Tensor"):
        dist.all_reduce([1, 2])
    with pytest.raises(TypeError, match=r"Expected parameter `tensor_list` of type List"):
        dist.all_gather(torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="one per rank"):
        dist.all_gather([torch.ones(2)], torch.ones(2))
    odd = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"tensor 1 of the list is float64\[2\]"):
        dist.all_gather([torch.ones(2), odd, torch.ones(2)], torch.ones(2))
    with pytest.raises(ValueError, match="differ in their first dimension alone"):
        dist.all_gather([torch.ones(2, k) for k in (1, 2, 1)], torch.ones(2, 1))
    with pytest.raises(ValueError, match="Can't specify both group_src and src"):
        dist.broadcast(torch.ones(1), src=0, group_src=0)
    with pytest.raises(ValueError, match="Global rank 9 is not part of group"):
        dist.broadcast(torch.ones(1), src=9)
    if me():
        with pytest.raises(ValueError, match="must NOT be specified on non-destination ranks"):
            dist.gather(torch.ones(1), [torch.ones(1)] * N, dst=0)
    dist.barrier()  # nothing above was sent: the group still works


def test_wrong_arguments_harm_nobody():
    run_distributed(N, check_arguments)


def check_operators():
    for op in ("sum", None, dist.ReduceOp.PREMUL_SUM):
        with pytest.raises(TypeError, match="all_reduce: op must be a ReduceOp, such as"):
            dist.all_reduce(torch.ones(1), op)


def test_what_is_no_operator_is_refused():
    run_distributed(1, check_operators)


def check_graph_warning():
    x = torch.ones(2, requires_grad=True)
    with pytest.warns(UserWarning, match="gradients do not flow through"):
        dist.all_reduce(x * 2)
    with torch.no_grad():
        dist.all_reduce(x)


def test_a_tensor_in_a_graph_is_warned_about():
    run_distributed(2, check_graph_warning)


def check_dropped_gradients():
    """Inputs whose results elsewhere would not lead back to them; not what is written in place."""
    x, out = torch.ones(2, requires_grad=True), torch.zeros(2)
    for call in (
        lambda: dist.all_gather([out], x),
        lambda: dist.all_gather_into_tensor(out, x),
        lambda: dist.reduce_scatter_tensor(out, x),
        lambda: dist.reduce_scatter(out, [x * 2]),
        lambda: dist.all_to_all([out], [x * 2]),
        lambda: dist.scatter(out, [x * 2]),
        lambda: dist.gather(x, [out]),
    ):
        with pytest.warns(UserWarning, match="gradients do not flow through") as caught:
            call()
        assert [w.filename for w in caught] == [__file__]
    dist.broadcast(x, 0)
    with torch.no_grad():
        dist.all_gather([out], x)


def test_a_gradient_that_would_be_dropped_is_warned_about():
    run_distributed(1, check_dropped_gradients)


@pytest.mark.parametrize("transport", ["local", "shm", "zmq"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda: dist.all_reduce(torch.ones(3)), lambda: dist.broadcast(torch.ones(3), 0)),
        (lambda: dist.all_reduce(torch.ones(3)), lambda: dist.broadcast(torch.ones(3), 1)),
        (lambda: dist.all_reduce(torch.ones(3)), lambda: dist.all_reduce(torch.ones(4))),
        (
            lambda: dist.all_reduce(torch.ones(3)),
            lambda: dist.all_reduce(torch.ones(3, dtype=torch.float64)),
        ),
    ],
    ids=["kind", "kind, root 1", "shape", "dtype"],
)
def test_mismatch_raises_the_same_error_on_all_ranks(first, second, transport):
    def rank():
        with pytest.raises(CollectiveMismatch) as caught:
            (second if me() else first)()
        return str(caught.value)

    sentences = run_distributed(2, rank, transport=transport)
    assert sentences[0] == sentences[1]
    assert sentences[0].count("test_collectives.py") >= 2  # both calls, with their lines
    assert "rank 0" in sentences[0]
    assert "rank 1" in sentences[0]


def check_monitored_barrier():
    """Ranks 1 and 3 of 4 do not come: both are named, on every rank that came."""
    for _ in range(2):
        dist.monitored_barrier(timeout=20)
    if me() in (0, 2):
        with pytest.raises(CollectiveTimeout) as caught:
            dist.monitored_barrier(timeout=0.1, wait_all_ranks=True)
        assert str(caught.value).startswith("[Rank 0]: Ranks 1, 3 failed to pass monitoredBarrier")
        assert caught.value.ranks == [1, 3]
        come.wait()
    else:
        come.wait()


come = threading.Barrier(4, timeout=20)


@pytest.mark.parametrize("transport", ["local", "shm", "zmq"])
def test_monitored_barrier_names_who_did_not_come(transport):
    run_distributed(4, check_monitored_barrier, transport=transport)


def check_monitored_barrier_and_deaths():
    """Rank 1 is gone: that ends the wait, or it is named with rank 2, which is late."""
    pair = dist.new_group([0, 1, 2])
    if me() == 1:
        dist.destroy_process_group(pair)
    elif me() == 0:
        with pytest.raises(PeerLost, match="rank 1 has closed"):
            dist.monitored_barrier(pair, timeout=20)
    every = dist.new_group([0, 1, 2])
    if me() == 1:
        dist.destroy_process_group(every)
    elif me() == 0:
        with pytest.raises(CollectiveTimeout, match="Ranks 1, 2 failed to pass"):
            dist.monitored_barrier(every, timeout=0.1, wait_all_ranks=True)
    dist.barrier()


def test_monitored_barrier_and_ranks_that_are_gone():
    run_distributed(3, check_monitored_barrier_and_deaths)


def _shared_memory():
    x = dist.empty(3, 50_000, dtype=torch.float64)
    assert (x.shape, x.dtype, x.requires_grad) == ((3, 50_000), torch.float64, False)
    assert dist.empty((2, 2)).dtype == torch.float32
    x.fill_(dist.get_rank() + 1)
    dist.all_reduce(x[1:])
    window = dist.group.WORLD.arrays.transport.window
    return [x[0, 0].item(), x[2, 9].item(), window.place_of(x._data) >= 0]


def test_empty_lives_in_memory_that_the_ranks_share():
    results = run_distributed(2, _shared_memory, transport="shm")
    assert results == [[1.0, 3.0, True], [2.0, 3.0, True]]
