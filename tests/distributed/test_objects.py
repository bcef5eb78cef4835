"""Object collectives and the codec behind them: plain data only, and never a pickle."""

from __future__ import annotations

import contextlib
import math
import sys
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import dtrain as torch
import dtrain.distributed as dist
from dtrain.comm.collectives import Broadcast
from dtrain.distributed import objects
from dtrain.distributed.codec import decode, encode
from dtrain.testing.distributed import run_distributed

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary(),
    st.complex_numbers(allow_nan=False),
)  # fmt: skip
keys = st.one_of(st.integers(-5, 5), st.text(max_size=3), st.tuples(st.integers(), st.text()))
plain = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner, inner),
        st.dictionaries(keys, inner, max_size=4),
        st.sets(st.integers(), max_size=4),
    ),
    max_leaves=12,
)


@given(plain)
@settings(max_examples=200, deadline=None)
def test_round_trip(value):
    assert decode(encode(value)) == value


@pytest.mark.parametrize("dtype", ["bool", "int8", "int64", "float16", "bfloat16", "complex64"])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_arrays_and_tensors_keep_dtype_and_shape(dtype, shape):
    tensor = torch.ones(*shape, dtype=getattr(torch, dtype))
    back = decode(encode({"t": tensor, "a": tensor.numpy()[..., None].swapaxes(0, -1)}))
    assert back["t"].dtype is tensor.dtype
    assert back["t"].shape == shape
    assert isinstance(back["a"], np.ndarray)
    assert back["t"].numpy().flags.writeable


def test_what_is_more_than_data_keeps_its_kind():
    value = {
        "size": torch.ones(2, 3).shape,
        "ordered": OrderedDict([((1, 2), [1]), ("b", (2,))]),
        "frozen": {frozenset({1, 2})},
        "kinds": [torch.bfloat16, torch.device("cpu"), np.float32(0.5), np.int8(-3)],
    }
    back = decode(encode(value))
    assert back == value
    assert [type(v) for v in back.values()] == [type(v) for v in value.values()]
    assert [type(v) for v in back["kinds"]] == [type(v) for v in value["kinds"]]
    assert back["kinds"][0] is torch.bfloat16
    assert type(next(iter(back["frozen"]))) is frozenset


class Foreign:
    def __eq__(self, other):
        return type(other) is Foreign

    __hash__ = None


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"model": [1, Foreign()]}, r"object\['model'\]\[1\]"),
        (lambda: 0, "object"),
        (np.array([object()]), "object"),
    ],
)
def test_what_cannot_be_sent_is_named(value, path):
    with pytest.raises(TypeError, match=rf"{path}: .*cannot be sent"):
        encode(value)


def test_a_cycle_ends_in_an_error():
    loop: list = []
    loop.append(loop)
    with pytest.raises(TypeError, match="nested deeper than"):
        encode(loop)


@given(st.binary(max_size=60))
@settings(max_examples=300, deadline=None)
def test_garbage_is_a_value_or_a_value_error(data):
    with contextlib.suppress(ValueError):
        decode(data)


def test_a_pickle_is_not_run():
    """The bytes of a pickle that would exit the interpreter are only bytes here."""
    payload = b"cposix\n_exit\n(I3\ntR."
    with pytest.raises(ValueError, match="malformed object"):
        decode(payload)
    assert "pickle" not in {m for m in sys.modules if m.startswith("dtrain")}


def check_objects():
    """Sizes differ between ranks, so that padding and lengths matter."""
    rank, n = dist.get_rank(), dist.get_world_size()
    mine = {"rank": rank, "text": "x" * (100 * rank), "t": torch.full((rank,), 1.5)}
    every = [None] * n
    dist.all_gather_object(every, mine)
    assert [e["rank"] for e in every] == list(range(n))
    assert [len(e["text"]) for e in every] == [100 * r for r in range(n)]
    assert [e["t"].numel() for e in every] == list(range(n))

    got = [None] * n if rank == 1 else None
    dist.gather_object(("r", rank), got, dst=1)
    assert rank != 1 or got == [("r", r) for r in range(n)]

    shared = [rank, {"from": rank}, math.pi]
    dist.broadcast_object_list(shared, src=2)
    assert shared == [2, {"from": 2}, math.pi]

    out = [None]
    dist.scatter_object_list(out, [f"for {i}" * i for i in range(n)] if rank == 0 else None, src=0)
    assert out == [f"for {rank}" * rank]

    if rank == 0:
        dist.send_object_list([1, "two"], dst=1)
    if rank == 1:
        received: list = [None, None]
        assert dist.recv_object_list(received, src=0) == 0
        assert received == [1, "two"]
    with pytest.raises(ValueError, match="one place per rank"):
        dist.all_gather_object([], mine)
    dist.barrier()


@pytest.mark.parametrize("transport", ["local", "zmq"])
def test_object_collectives(transport):
    run_distributed(3, check_objects, transport=transport)


def check_pickles():
    """Only after `allow_pickle`, on the sender and on the receiver, and not with `weights_only`."""
    n, every = dist.get_world_size(), [None] * dist.get_world_size()
    with pytest.raises(
        TypeError, match=r"Foreign cannot be sent .* call .*allow_pickle\(\) on all"
    ):
        dist.all_gather_object(every, Foreign())
    sender = dist.new_group()
    if dist.get_rank() == 0:
        dist.allow_pickle(sender)
        dist.broadcast_object_list([Foreign()], group=sender)
    else:
        sentence = r"rank 0 sent a pickle, which this rank does not load: it runs code\. Call"
        with pytest.raises(dist.DistBackendError, match=sentence):
            dist.broadcast_object_list([None], group=sender)
    dist.allow_pickle()
    dist.all_gather_object(every, Foreign())
    assert every == [Foreign()] * n
    shared = [dist.get_rank()]
    dist.broadcast_object_list(shared, 1)  # plain data is not pickled for that
    assert shared == [1]
    with pytest.raises(TypeError, match="cannot be sent"):
        dist.all_gather_object(every, Foreign(), weights_only=True)
    out = [None]
    if dist.get_rank() == 0:
        dist.scatter_object_list(out, [Foreign()] * n)
    else:
        with pytest.raises(dist.DistBackendError, match=r"it runs code \(weights_only=True\)"):
            dist.scatter_object_list(out, weights_only=True)
    dist.allow_pickle(allow=False)
    with pytest.raises(TypeError, match="cannot be sent"):
        dist.all_gather_object(every, Foreign())


def test_pickles_are_sent_and_loaded_only_where_that_was_allowed():
    run_distributed(3, check_pickles)


def check_nonsense():
    """Rank 1 speaks the protocol by hand, and wrongly: the others name it."""
    group, shared = dist.group.WORLD, [None]
    for size, data, sentence in (
        (-1, None, "rank 1 announced an object of -1 bytes"),
        (1 << 60, None, "rank 1 announced an object of 1152921504606846976 bytes"),
        (3, b"\xc1\xc1\xc1", "rank 1 sent no object: malformed"),
    ):
        if dist.get_rank() == 1:
            group.issue(Broadcast(np.array([size], np.int64), 1))
            if data is not None:
                group.issue(Broadcast(np.frombuffer(data, np.uint8), 1))
        else:
            with pytest.raises(dist.DistBackendError, match=sentence):
                dist.broadcast_object_list(shared, src=1)


def test_a_rank_that_sends_nonsense_is_named():
    run_distributed(3, check_nonsense)


def test_an_object_that_is_too_large_is_refused_where_it_is(monkeypatch):
    monkeypatch.setattr(objects, "MAX_BYTES", 100)

    def rank():
        with pytest.raises(ValueError, match="too large for an object collective"):
            dist.broadcast_object_list(["x" * 200])

    run_distributed(1, rank)
