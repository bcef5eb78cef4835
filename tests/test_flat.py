"""FlatBuffer: layout, memory, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from dtrain.flat import FlatBuffer

shapes = st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=6)


@given(shapes, st.sampled_from(["f2", "f4", "f8"]), st.sampled_from([1, 8, 64]))
def test_views_lie_in_order_without_overlap_and_gaps_are_zero(shapes, dtype, align):
    buffer = FlatBuffer(shapes, dtype, align=align, allocate=lambda n, d: np.full(n, 7, d))
    assert [view.shape for view in buffer.views] == [tuple(shape) for shape in shapes]
    taken = np.zeros(buffer.array.size, int)
    for offset, view in zip(buffer.offsets, buffer.views, strict=True):
        assert view.flags.c_contiguous
        assert offset * buffer.array.itemsize % min(align, 64) == 0 or align < view.itemsize
        taken[offset : offset + view.size] += 1
        view[...] = 3
    assert taken.max(initial=0) <= 1
    np.testing.assert_array_equal(buffer.array, np.where(taken, 3, 0))
    assert list(buffer.offsets) == sorted(buffer.offsets)


def test_packed_views_are_the_concatenation():
    arrays = [np.arange(6.0).reshape(2, 3).T, np.float64([9]), np.zeros((0, 2)), np.array(4.0)]
    buffer = FlatBuffer.of(arrays, align=1)
    assert buffer.array.tolist() == [0, 3, 1, 4, 2, 5, 9, 4]
    assert repr(buffer) == "FlatBuffer(4 views, 8 of float64)"
    buffer.array[:] = 1
    assert all((view == 1).all() for view in buffer.views)


def test_memory_is_the_allocators():
    memory = np.full(100, 5.0, np.float32)
    buffer = FlatBuffer([(3,), (2, 2)], "f4", align=16, allocate=lambda n, d: memory[: n[0]])
    assert buffer.offsets == (0, 4)
    assert memory[:8].tolist() == [5, 5, 5, 0, 5, 5, 5, 5]
    buffer.copy_in([np.ones(3, np.float32), np.zeros((2, 2), np.float32)])
    assert memory[:9].tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 5]


def test_no_views_at_all():
    buffer = FlatBuffer([], "f4")
    assert len(buffer) == buffer.array.size == 0


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ([np.zeros(2)], "expected 2 arrays, got 1"),
        ([np.zeros(2), np.zeros(4)], r"array 1 is float64\[4\], its view is float64\[3\]"),
        ([np.zeros(2), np.zeros(3, "f4")], r"array 1 is float32\[3\], its view is float64\[3\]"),
    ],
)
def test_copy_in_refuses_what_does_not_fit_and_copies_nothing(arrays, sentence):
    buffer = FlatBuffer.of([np.ones(2), np.ones(3)])
    with pytest.raises(ValueError, match=sentence):
        buffer.copy_in(arrays)
    assert (buffer.views[0] == 1).all()


def test_other_refusals():
    with pytest.raises(ValueError, match="at least one array"):
        FlatBuffer.of([])
    with pytest.raises(ValueError, match=r"its view is float64"):
        FlatBuffer.of([np.zeros(1), np.zeros(1, "f4")])
    with pytest.raises(ValueError, match="cannot be aligned to 12"):
        FlatBuffer([(1,)], "f8", align=12)
    with pytest.raises(ValueError, match="gave an array of shape"):
        FlatBuffer([(3,)], "f8", align=1, allocate=lambda n, d: np.zeros(2))
