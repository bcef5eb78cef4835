"""Frames: the header survives, everything that is not a frame of ours is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from dtrain.wire import HEAD, MAGIC, Header, WireError, dumps, loads, pack, unpack

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False)
    | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)  # fmt: skip


@given(
    st.builds(
        Header,
        st.integers(0, 255),
        st.integers(0, 2**16 - 1),
        st.integers(-(2**63), 2**63 - 1),
        st.integers(0, 2**64 - 1),
        st.integers(0, 2**64 - 1),
    ),
    st.binary(),
)
def test_header_and_body_survive(header, body):
    assert unpack(pack(header, body)) == (header, body)


@given(plain)
def test_values_survive(value):
    assert loads(dumps(value)) == value


def test_the_header_has_no_surprises():
    assert HEAD.size == 32
    assert pack(Header(1)).startswith(MAGIC)


@pytest.mark.parametrize("frame", [b"", MAGIC, b"x" * 32, pack(Header(1))[:-1]])
def test_strangers_are_refused(frame):
    with pytest.raises(WireError, match="not a dtrain frame"):
        unpack(frame)


@pytest.mark.parametrize("data", [b"", b"\xc1", dumps([1, 2])[:-1], b"\xdb\xff\xff\xff\xff"])
def test_malformed_values_are_refused(data):
    with pytest.raises(WireError, match="malformed msgpack"):
        loads(data)
