"""The error function, which NumPy lacks, and how long arrays are worked through in blocks.

erf is approximated by polynomials through Chebyshev nodes; tests/ops/test_special.py
derives the coefficients again from `math.erf` and `math.erfc`.
float64: within 3e-15 of erf; float32: within 3e-7 of it, relatively.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dtrain.autograd.op import define
from dtrain.autograd.promotion import FLOATING
from dtrain.ops.elementwise import exp

BLOCK = 32768  # elements: two or three blocks of float32 stay in the second-level cache

# erf(x) = x p(2 x^2 - 1) on [-1, 1]
SMALL = (
    0.9654687386698677, -0.14053608902271736, 0.01985249668895692, -0.0022854855611386484,
    0.00021751715630761537, -1.7537169491118238e-05, 1.2233818725467434e-06,
    -7.511554045436242e-08, 4.116895269135057e-09, -2.0370786539084893e-10,
    8.711253940418828e-12, -3.0316490059097606e-13,
)  # fmt: skip
# erfc(x) = exp(-x^2) p(u), u linear in 1 / (x + 2), on [1, 6]
TAIL = (
    0.22142954022993142, 0.161893568041028, 0.038560570425233205, 0.005588816281710682,
    0.00019713917655103988, -8.079220268573031e-05, -7.34050746607572e-06, 1.979553491205024e-06,
    1.6345408138691825e-07, -7.003102830274405e-08, -4.834484616272585e-10,
    2.5928952770688376e-09, -4.0261733009266336e-10, -5.1748420395704524e-11,
    1.1022094405536455e-10, -6.029680217758829e-12, -2.431641578970867e-11,
)  # fmt: skip
# erf(x) = x p(2 (x / 3.92)^2 - 1) on [-3.92, 3.92]: beyond, erf rounds to 1 in float32
SINGLE_END = 3.92
SINGLE = (
    0.36073680907714356, -0.18010859707861535, 0.1340847932415436, -0.10918054166511981,
    0.09059291529548741, -0.07400414836353719, 0.05842158900252015, -0.04351752466689529,
    0.029621368327321207, -0.019784858533363092, 0.014325615691408444, -0.007950687267154422,
    0.001833373407578165, -0.001192202954143795, 0.002124123178418813, -0.0009000014233606635,
)  # fmt: skip

# 0-d arrays: a Python float would be converted by every call, at the price of the addition itself
_SINGLE = [np.array(c, np.float32) for c in SINGLE]


def blocks(*arrays: np.ndarray) -> Iterator[list[np.ndarray]]:
    """Equal parts of arrays of one size, flattened: writing to them writes contiguous arrays.

    A long chain of pointwise steps runs about twice as fast when its temporaries stay in cache.
    """
    flat = [a.reshape(-1) for a in arrays]
    for start in range(0, flat[0].size, BLOCK):
        yield [a[start : start + BLOCK] for a in flat]


def _horner(coefficients: Sequence[Any], u: np.ndarray, out: np.ndarray) -> None:
    np.multiply(u, coefficients[-1], out=out)
    for c in coefficients[-2:0:-1]:
        out += c
        out *= u
    out += coefficients[0]


def erf_single(x: np.ndarray, out: np.ndarray, scratch: np.ndarray) -> None:
    """erf of a float32 block into `out`; `scratch` is overwritten, all three have one size."""
    np.square(x, out=scratch)
    scratch *= 2 / SINGLE_END**2
    scratch -= 1
    np.minimum(scratch, 1, out=scratch)
    _horner(_SINGLE, scratch, out)
    np.clip(x, -SINGLE_END, SINGLE_END, out=scratch)
    out *= scratch
    np.clip(out, -1, 1, out=out)


def _erf_double(x: np.ndarray) -> np.ndarray:
    out = np.empty_like(x)
    inner = np.clip(x, -1, 1)
    _horner(SMALL, 2 * inner * inner - 1, out)
    out *= inner
    outer = np.abs(x) > 1
    if outer.any():
        z = np.abs(x[outer])
        tail = np.minimum(z, 6)  # erfc(6) is 2e-17
        u = (2 / (tail + 2) - (1 / 3 + 1 / 8)) / (1 / 3 - 1 / 8)
        value = np.empty_like(u)
        _horner(TAIL, u, value)
        out[outer] = np.copysign(1 - np.exp(-tail * tail) * value, x[outer])
    return np.where(np.isnan(x), x, out)


def erf_array(x: np.ndarray) -> np.ndarray:
    """erf of a floating array, in its dtype."""
    if x.dtype == np.float64:
        return _erf_double(x)
    if x.dtype != np.float32:
        return erf_array(x.astype(np.float32)).astype(x.dtype)
    out = np.empty(x.shape, np.float32)
    scratch = np.empty(min(BLOCK, x.size), np.float32)
    for xi, yi in blocks(x, out):
        erf_single(xi, yi, scratch[: xi.size])
    return out


def _erf_vjp(n: Any, g: Any) -> Any:
    return (g * exp(-n.x * n.x) * (2 / math.sqrt(math.pi)),)


erf = define(
    "erf", erf_array, promote=FLOATING, saves="x", vjp=_erf_vjp,
    sample=lambda: [((np.linspace(-3, 3, 12).reshape(3, 4),), {})],
)  # fmt: skip
