"""Where parameters lie in a unit, and whose rows are whose."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from dtrain.distributed.fsdp.layout import Layout

SHAPES = st.lists(
    st.lists(st.integers(0, 7), min_size=1, max_size=3).map(tuple), min_size=1, max_size=5
)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(1, 5), st.sampled_from(["f4", "f8", "f2"]))
def test_shards_are_the_chunks_of_each_parameter(shapes, size, dtype):
    layout = Layout(shapes, dtype, size)
    flat = np.arange(layout.total).astype(dtype)
    for index, whole in enumerate(layout.views(flat)):
        assert whole.shape == shapes[index]
        step = -(-shapes[index][0] // size)
        chunks = [whole[r * step : (r + 1) * step] for r in range(size)]
        for rank, chunk in enumerate(chunks):
            own = layout.own_views(flat, rank)[index]
            assert own.shape == layout.shard_shape(index, rank) == chunk.shape
            assert (own == chunk).all()
            assert own.size == 0 or np.shares_memory(own, flat)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(1, 5))
def test_pieces_divide_the_flat_array_and_packed_are_the_shards(shapes, size):
    layout = Layout(shapes, "f4", size)
    flat = np.arange(layout.total).astype("f4")
    owners = np.zeros(layout.total, int)
    for rank, cuts in enumerate(layout.cuts):
        for cut in cuts:
            owners[cut] += 1
        packed = np.concatenate([flat[:0], *(flat[cut] for cut in cuts)])
        for own, shard in zip(
            layout.own_views(flat, rank), layout.shard_views(packed, rank), strict=True
        ):
            assert (own == shard).all()
    inside = np.zeros(layout.total, int)
    for view in layout.views(inside):
        view += 1
    assert (owners == inside).all()


@pytest.mark.parametrize("dtype", ["f4", "f8", "f2"])
def test_parameters_begin_at_cache_lines(dtype):
    layout = Layout([(3, 5), (1,), (7,)], dtype, 2)
    assert all(at * np.dtype(dtype).itemsize % 64 == 0 for at in layout.offsets)
