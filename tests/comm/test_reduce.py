"""Reduction operators: order, precision, dtypes.

NumPy and torch's error sentences are the oracle.
"""

from __future__ import annotations

import re
from functools import reduce as fold

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, strategies as st

from dtrain.comm import reduce as r
from dtrain.comm.reduce import ReduceOp, check_op, combine

PLAIN = {
    r.SUM: np.add,
    r.PRODUCT: np.multiply,
    r.MIN: np.minimum,
    r.MAX: np.maximum,
    r.BAND: np.bitwise_and,
    r.BOR: np.bitwise_or,
    r.BXOR: np.bitwise_xor,
}


def combined(op, arrays):
    out = np.empty_like(arrays[0])
    combine(op, [a.copy() for a in arrays], out)
    return out


@given(
    st.sampled_from(list(PLAIN)),
    st.sampled_from([np.bool_, np.uint8, np.int32, np.int64]),
    st.integers(1, 6),
    st.integers(0, 2**32 - 1),
)
def test_integers_are_a_fold_of_the_ufunc(op, dtype, size, seed):
    rng = np.random.default_rng(seed)
    arrays = [rng.integers(0, 200, 5).astype(dtype) for _ in range(size)]
    np.testing.assert_array_equal(combined(op, arrays), fold(PLAIN[op], arrays))


@given(st.lists(st.lists(st.floats(width=32), min_size=2, max_size=2), min_size=1, max_size=6))
def test_floats_are_added_in_rank_order(values):
    arrays = [np.array(v, np.float32) for v in values]
    with np.errstate(all="ignore"):
        expected = fold(np.add, arrays)
    assert combined(r.SUM, arrays).tobytes() == expected.tobytes()


def test_the_order_is_visible():
    """(1e8 + -1e8) + 1 = 1, but 1e8 + (-1e8 + 1) = 0 in float32."""
    values = [np.array([v], np.float32) for v in (1e8, -1e8, 1.0)]
    assert combined(r.SUM, values)[0] == 1.0
    assert combined(r.SUM, values[::-1])[0] == 0.0


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_added_in_float32_and_rounded_once(dtype):
    """2048 + 1 + 1 = 2050 when rounded once.

    Float16 and bfloat16 lose each 1 when rounded twice.
    """
    values = [np.array([v], dtype) for v in (2048, *[1] * 16)]
    expected = np.array([2048 + 16], np.float32).astype(dtype)
    assert combined(r.SUM, values)[0] == expected[0]
    assert fold(np.add, values)[0] != expected[0]
    assert combined(r.AVG, [np.array([60000], dtype)] * 3)[0] == np.array([60000], dtype)[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64])
def test_avg_is_sum_divided_by_the_ranks(dtype):
    arrays = [np.array([1, 2.5], dtype) * k for k in (1, 2, 4)]
    np.testing.assert_array_equal(combined(r.AVG, arrays), fold(np.add, arrays) / dtype(3))


def test_premul_sum_scales_every_contribution():
    arrays = [np.array([1.5], np.float32), np.array([2.5], np.float32)]
    factor = np.float32(0.1)
    expected = arrays[0] * factor + arrays[1] * factor
    assert combined(ReduceOp.PREMUL_SUM(0.1), arrays).tobytes() == expected.tobytes()


def test_nan_wins_in_min_and_max():
    arrays = [np.array([1.0, np.nan]), np.array([np.nan, 2.0])]
    for op in (r.MIN, r.MAX):
        assert np.isnan(combined(op, arrays)).all()


def test_overflow_is_silent_and_ieee():
    big = np.array([3e38], np.float32)
    assert combined(r.SUM, [big, big])[0] == np.inf


@pytest.mark.parametrize("own", range(5))
@pytest.mark.parametrize("op", [r.SUM, r.AVG, ReduceOp.PREMUL_SUM(2)])
def test_the_result_may_lie_on_any_contribution(op, own):
    arrays = [np.random.default_rng(k).normal(size=9).astype(np.float32) for k in range(5)]
    expected = combined(op, arrays)
    scratch = [a.copy() for a in arrays]
    combine(op, scratch, scratch[own])
    assert scratch[own].tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("op", "dtype", "error", "words"),
    [
        (r.MAX, np.complex64, ValueError, "all_reduce does not support ReduceOp.MAX on complex"),
        (r.PRODUCT, np.complex128, ValueError, "does not support ReduceOp.PRODUCT on complex"),
        (r.BAND, np.float32, RuntimeError, "Cannot use ReduceOp.BAND with non-integral dtype"),
        (r.BXOR, np.float16, RuntimeError, "Cannot use ReduceOp.BXOR with non-integral dtype"),
        (
            r.AVG,
            np.int64,
            RuntimeError,
            "result type Float can't be cast to the desired output type",
        ),
        (r.AVG, np.bool_, RuntimeError, "result type Float can't be cast"),
        (ReduceOp.PREMUL_SUM(2), np.int32, RuntimeError, "result type Float can't be cast"),
    ],
)
def test_what_is_not_defined_is_refused_as_torch_does(op, dtype, error, words):
    with pytest.raises(error, match=re.escape(words)):
        check_op(op, np.dtype(dtype), "all_reduce")


def test_operators_are_values():
    assert ReduceOp("SUM") == ReduceOp.SUM is r.SUM
    assert ReduceOp.PREMUL_SUM(2) == ReduceOp.PREMUL_SUM(2.0) != ReduceOp.PREMUL_SUM(3)
    assert (str(ReduceOp.SUM), str(ReduceOp.PREMUL_SUM(0.5))) == ("SUM", "PREMUL_SUM(0.5)")
    with pytest.raises(ValueError, match="unknown ReduceOp 'MEAN'"):
        ReduceOp("MEAN")
    for wrong in (("SUM", 2.0), ("PREMUL_SUM", None)):
        with pytest.raises(ValueError, match="a factor belongs to PREMUL_SUM"):
            ReduceOp(*wrong)


@pytest.mark.parametrize("shape", [(-1,), (-1, 2)])
def test_widening_has_the_bits_of_numpys(shape):
    """Every float16, more than one block of them, in order and not; and what it leaves to NumPy."""
    halves = np.tile(np.arange(1 << 16, dtype=np.uint16).view(np.float16), 3).reshape(shape)
    for values in (halves, halves[::-1], halves[:7], halves[0], halves.astype(np.float32)):
        got = r.wide(values, np.dtype(np.float32))
        assert got.shape == values.shape
        assert got.tobytes() == values.astype(np.float32).tobytes()


def test_rounding_to_float16_has_the_bits_of_numpys():
    """Every float16, the middle of each two neighbours, and their neighbours in float32."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = np.sort(halves[np.isfinite(halves)]).astype(np.float32)
    middles = (halves[1:] + halves[:-1]) / 2
    exact = np.concatenate([halves, middles, np.float32([65519, 65520, 1e30, np.inf, -np.inf, 0])])
    around = [np.nextafter(exact, np.float32(to)) for to in (-np.inf, np.inf)]
    values = np.concatenate([exact, -exact, *around])
    finite = values[np.abs(values) < 65520]
    assert finite.size > 6 * r._BLOCK
    mixed = np.random.default_rng(0).permutation(values)
    with np.errstate(all="ignore"):
        for some in (values, finite, finite[::-1], finite[: 2 * r._SMALL].reshape(2, -1), mixed):
            got = r.rounded(some, np.dtype(np.float16))
            assert got.shape == some.shape
            assert got.tobytes() == some.astype(np.float16).tobytes()
        strange = np.float32([np.nan, -np.nan, 1.0] * r._SMALL)
        got = r.rounded(strange, np.dtype(np.float16))
    assert got.tobytes() == strange.astype(np.float16).tobytes()
    with pytest.warns(RuntimeWarning, match="overflow"):
        r.rounded(np.full(r._SMALL, 1e6, np.float32), np.dtype(np.float16))


@pytest.mark.parametrize("shape", [(), (0,), (3,)])
def test_half_precision_of_every_shape(shape):
    out = np.empty(shape, np.float16)
    r.combine(r.SUM, [np.full(shape, 1.5, np.float16), np.full(shape, 2.5, np.float16)], out)
    assert (out == 4.0).all()
