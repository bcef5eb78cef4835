"""erf against the standard library's, its coefficients against their derivation, blocks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.polynomial import chebyshev

import dtrain
from dtrain.ops import special


def interpolated(function, degree, low, high):
    """Coefficients in u of the polynomial through Chebyshev nodes; u in [-1, 1] is [low, high]."""

    def at(u):
        return np.array([function((v + 1) / 2 * (high - low) + low) for v in u])

    return chebyshev.cheb2poly(chebyshev.chebinterpolate(at, degree))


def by_square(square):
    x = math.sqrt(square)
    return math.erf(x) / x


def tail(t):
    x = 1 / t - 2
    return math.exp(x * x) * math.erfc(x)


@pytest.mark.parametrize(
    ("coefficients", "function", "low", "high"),
    [
        (special.SMALL, by_square, 0, 1),
        (special.TAIL, tail, 1 / 8, 1 / 3),
        (special.SINGLE, by_square, 0, special.SINGLE_END**2),
    ],
)
def test_coefficients_are_those_of_the_interpolation(coefficients, function, low, high):
    derived = interpolated(function, len(coefficients) - 1, low, high)
    np.testing.assert_allclose(coefficients, derived, rtol=0, atol=1e-11)


POINTS = np.concatenate([np.linspace(-7, 7, 20001), [1e-300, -1e-10, 1e-5, 40.0, -1e30]])
EXACT = np.array([math.erf(x) for x in POINTS])


def test_erf_in_float64():
    np.testing.assert_allclose(special.erf_array(POINTS), EXACT, rtol=3e-15, atol=0)


def test_erf_in_float32():
    x = POINTS.astype(np.float32)
    found = special.erf_array(x)
    assert found.dtype == np.float32
    exact = np.array([math.erf(v) for v in x.astype(np.float64)])
    np.testing.assert_allclose(found, exact, rtol=3e-7, atol=0)
    assert np.abs(found).max() == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_erf_at_the_ends_and_of_nothing(dtype):
    x = np.array([np.inf, -np.inf, np.nan, 0], dtype)
    np.testing.assert_array_equal(special.erf_array(x), [1, -1, np.nan, 0])
    assert special.erf_array(np.empty((0, 3), dtype)).shape == (0, 3)


def test_erf_of_integers_is_floating():
    assert special.erf(dtrain.tensor([0, 1])).dtype is dtrain.float32


def test_blocks_cover_everything_once():
    x = np.arange(2 * special.BLOCK + 5)
    out = np.zeros_like(x)
    for source, target in special.blocks(x, out):
        assert source.size <= special.BLOCK
        target += source
    np.testing.assert_array_equal(out, x)
