"""Pooling over 1 and 2 spatial dimensions: maxima, averages, and averages to a given size.

Rules: arrays are (N, C, H, W); a window is met tap by tap: the pixels at one place of all windows
are one strided view. A maximum belongs to the first place, in row-major order, that has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from dtrain.autograd.node import make
from dtrain.autograd.op import define
from dtrain.ops.linalg import matmul
from dtrain.ops.reduce import mean
from dtrain.ops.shape import reshape
from dtrain.ops.windows import Geometry, Pair


def _padded(x: np.ndarray, geometry: Geometry, value: Any) -> np.ndarray:
    if geometry.padding == ((0, 0), (0, 0)):
        return x
    out = np.full((*x.shape[:2], *geometry.padded), value, x.dtype)
    _inside(out, geometry)[...] = x
    return out


def _inside(canvas: np.ndarray, geometry: Geometry) -> np.ndarray:
    (top, _), (left, _) = geometry.padding
    _, height, width = geometry.image
    return canvas[:, :, top : top + height, left : left + width]


def _taps(canvas: np.ndarray, geometry: Geometry) -> Iterator[tuple[Pair, np.ndarray]]:
    """For each place in the window: where it is, and its pixels in all windows, as a view."""
    (rows, columns), (down, right) = geometry.out, geometry.stride
    for i in range(geometry.kernel[0]):
        for j in range(geometry.kernel[1]):
            y, x = i * geometry.dilation[0], j * geometry.dilation[1]
            yield (
                (y, x),
                canvas[:, :, y : y + down * rows : down, x : x + right * columns : right][
                    :, :, :rows, :columns
                ],
            )


# --- maxima --------------------------------------------------------------------------------------


def _lowest(dtype: np.dtype) -> Any:
    return np.iinfo(dtype).min if dtype.kind in "iu" else -np.inf  # bfloat16 is of no kind


def _max_forward(x: np.ndarray, *, geometry: Geometry) -> np.ndarray:
    taps = (tap for _, tap in _taps(_padded(x, geometry, _lowest(x.dtype)), geometry))
    out = next(taps).copy()
    for tap in taps:
        np.maximum(out, tap, out=out)
    return out


def _firsts(
    x: np.ndarray, top: np.ndarray, geometry: Geometry
) -> Iterator[tuple[Pair, np.ndarray]]:
    """For each place in the window: in which windows (bool) it is the maximum `top`."""
    free = np.ones(top.shape, bool)
    nan = top != top
    any_nan = nan.any()
    canvas = _padded(x, geometry, _lowest(x.dtype))
    for place, tap in _taps(canvas, geometry):
        hit = tap == top
        if any_nan:
            hit |= nan & (tap != tap)
        hit &= free
        free ^= hit
        yield place, hit


def _max_grad_forward(
    g: np.ndarray, x: np.ndarray, top: np.ndarray, *, geometry: Geometry
) -> np.ndarray:
    canvas = np.zeros((*x.shape[:2], *geometry.padded), g.dtype)
    apart = geometry.kernel == geometry.stride and geometry.dilation == (1, 1)
    for (_, tap), (_, hit) in zip(_taps(canvas, geometry), _firsts(x, top, geometry), strict=True):
        if apart:
            np.multiply(g, hit, out=tap)
        else:
            tap += g * hit
    return np.ascontiguousarray(_inside(canvas, geometry))


def _max_pick_forward(
    h: np.ndarray, x: np.ndarray, top: np.ndarray, *, geometry: Geometry
) -> np.ndarray:
    out = np.zeros(top.shape, h.dtype)
    taps = _taps(_padded(h, geometry, 0), geometry)
    for (_, tap), (_, hit) in zip(taps, _firsts(x, top, geometry), strict=True):
        out += tap * hit
    return out


_SAMPLE = Geometry((2, 5, 4), (3, 2), (2, 1), ((1, 1), (0, 1)), (1, 2), 1)


def _pool_sample(*shapes: str, **attrs: Any) -> Any:
    """Inputs of distinct values: "in" of the image's shape, "out" of the pooled one."""

    def sample() -> list[Any]:
        r = np.random.RandomState(0)
        sizes = {"in": (2, *_SAMPLE.image), "out": (2, 2, *_SAMPLE.out)}
        arrays = [r.permutation(int(np.prod(sizes[s]))).reshape(sizes[s]) / 7.0 for s in shapes]
        return [(tuple(arrays), {"geometry": _SAMPLE, **attrs})]

    return sample


_max_pool = define(
    "max_pool", _max_forward, inputs="x", saves="x y", sample=_pool_sample("in"),
    vjp=lambda n, g: (_max_grad(g, n.x, n.y, geometry=n.geometry),),
)  # fmt: skip
_max_grad = define(
    "max_pool_grad", _max_grad_forward, saves="x top",
    vjp=lambda n, h: (_max_pick(h, n.x, n.top, geometry=n.geometry), None, None),
)  # fmt: skip
_max_pick = define(
    "max_pool_pick", _max_pick_forward, saves="x top",
    vjp=lambda n, g: (_max_grad(g, n.x, n.top, geometry=n.geometry), None, None),
)  # fmt: skip


def _indices_forward(x: np.ndarray, y: np.ndarray, *, geometry: Geometry) -> np.ndarray:
    (top, _), (left, _) = geometry.padding
    rows, columns = np.ogrid[: geometry.out[0], : geometry.out[1]]
    out = np.zeros(y.shape, np.int64)
    for (i, j), hit in _firsts(x, y, geometry):
        row, column = rows * geometry.stride[0] + i - top, columns * geometry.stride[1] + j - left
        out += hit * (row * geometry.image[2] + column)
    return out


_max_indices = define("max_pool_indices", _indices_forward)


# --- averages ------------------------------------------------------------------------------------


def _average_forward(x: np.ndarray, *, geometry: Geometry, share: np.ndarray) -> np.ndarray:
    taps = (tap for _, tap in _taps(_padded(x, geometry, 0), geometry))
    out = next(taps).copy()
    for tap in taps:
        out += tap
    out *= share.astype(x.dtype)
    return out


def _average_grad_forward(g: np.ndarray, *, geometry: Geometry, share: np.ndarray) -> np.ndarray:
    canvas = np.zeros((*g.shape[:2], *geometry.padded), g.dtype)
    shared = g * share.astype(g.dtype)
    for _, tap in _taps(canvas, geometry):
        tap += shared
    return np.ascontiguousarray(_inside(canvas, geometry))


_SHARE = np.linspace(0.1, 0.5, _SAMPLE.out[0] * _SAMPLE.out[1]).reshape(_SAMPLE.out)
_average = define(
    "avg_pool", _average_forward, sample=_pool_sample("in", share=_SHARE),
    vjp=lambda n, g: (_average_grad(g, geometry=n.geometry, share=n.share),),
)  # fmt: skip
_average_grad = define(
    "avg_pool_grad", _average_grad_forward, sample=_pool_sample("out", share=_SHARE),
    vjp=lambda n, h: (_average(h, geometry=n.geometry, share=n.share),),
)  # fmt: skip


# --- arguments -----------------------------------------------------------------------------------


def _pair(value: Any, name: str, dims: int) -> Pair:
    values = (value,) * dims if isinstance(value, int) else tuple(int(v) for v in value)
    if len(values) == 1:
        values *= dims
    if len(values) != dims:
        raise RuntimeError(
            f"max_pool{dims}d: {name} must either be a single int, or a tuple of {dims} ints"
        )
    return (1, *values) if dims == 1 else values  # type: ignore[return-value]


def _end(size: int, pad: int, reach: int, step: int, ceil_mode: bool) -> int:
    """The padding after the image: `pad`, or what makes room for a last window (ceil_mode)."""
    spare = (size + 2 * pad - reach) % step
    if not ceil_mode or not spare:
        return pad
    begins = size + 2 * pad - reach - spare + step  # where one more window would begin
    return pad + step - spare if begins < size + pad else pad


def _geometry(
    x: Any, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool
) -> Geometry:
    if min(stride) <= 0:
        raise RuntimeError("stride should not be zero")
    _, height, width = image = tuple(x.shape[1:])
    for p, k, d in zip(padding, kernel, dilation, strict=True):
        if p < 0:
            raise RuntimeError(f"pad must be non-negative, but got pad: {p}")
        if p > (d * (k - 1) + 1) // 2:
            raise RuntimeError(
                "pad should be at most half of effective kernel size, but got "
                f"pad={p}, kernel_size={k} and dilation={d}"
            )
    edges = [
        (p, _end(size, p, d * (k - 1) + 1, s, ceil_mode))
        for size, p, k, d, s in zip((height, width), padding, kernel, dilation, stride, strict=True)
    ]
    geometry = Geometry(image, kernel, stride, (edges[0], edges[1]), dilation, 1)
    if min(geometry.out) < 1:
        given, made = ("x".join(map(str, size)) for size in (image, (image[0], *geometry.out)))
        raise RuntimeError(
            f"Given input size: ({given}). Calculated output size: ({made}). Output size is too "
            "small"
        )
    return geometry


def _as_images(input: Any, dims: int) -> Any:
    """([N,] C, *) as (N, C, H, W)."""
    if input.ndim not in (dims + 1, dims + 2):
        raise RuntimeError(
            f"non-empty {dims + 1}D or {dims + 2}D (batch mode) tensor expected for input, but got "
            f"{list(input.shape)}"
        )
    shape = tuple(input.shape) if input.ndim == dims + 2 else (1, *input.shape)
    return reshape(input, shape if dims == 2 else (*shape[:2], 1, shape[2]))


def _like_input(y: Any, input: Any, dims: int) -> Any:
    return reshape(y, (*input.shape[:-dims], *y.shape[4 - dims :]))


# --- the public functions ------------------------------------------------------------------------


def max_pool(
    dims: int, input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0,
    dilation: Any = 1, ceil_mode: bool = False, return_indices: bool = False,
) -> Any:  # fmt: skip
    """The maximum of every window of `dims` dimensions, and with `return_indices` also its place
    (int64) in the flattened image. `stride` is the kernel's size unless given.

    Source: torch.nn.functional.max_pool1d, max_pool2d.
    """
    kernel = _pair(kernel_size, "kernel_size", dims)
    step = kernel if stride is None or stride == [] else _pair(stride, "stride", dims)
    pad = _pair(padding, "padding", dims) if dims == 2 else (0, _pair(padding, "padding", 1)[1])
    x = _as_images(input, dims)
    geometry = _geometry(x, kernel, step, pad, _pair(dilation, "dilation", dims), ceil_mode)
    y = _max_pool(x, geometry=geometry)
    out = _like_input(y, input, dims)
    if not return_indices:
        return out
    return out, _like_input(_max_indices(x, y, geometry=geometry), input, dims)


def avg_pool(
    dims: int, input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0,
    ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None,
) -> Any:  # fmt: skip
    """The average of every window of `dims` dimensions; padding counts as zeros, unless
    `count_include_pad` is false. Source: torch.nn.functional.avg_pool1d, avg_pool2d.
    """
    if divisor_override == 0:
        raise RuntimeError("divisor must be not zero")
    kernel = _pair(kernel_size, "kernel_size", dims)
    step = kernel if stride is None or stride == [] else _pair(stride, "stride", dims)
    pad = _pair(padding, "padding", dims) if dims == 2 else (0, _pair(padding, "padding", 1)[1])
    x = _as_images(input, dims)
    geometry = _geometry(x, kernel, step, pad, (1, 1), ceil_mode)
    if divisor_override is not None:
        share = np.asarray(1 / divisor_override)
    else:
        rows, columns = (_counts(geometry, pad, axis, count_include_pad) for axis in (0, 1))
        share = 1 / (rows[:, None] * columns)
    return _like_input(_average(x, geometry=geometry, share=share), input, dims)


def _counts(geometry: Geometry, pad: Pair, axis: int, include_pad: bool) -> np.ndarray:
    """How many pixels each window counts along one axis; never those that ceil_mode added."""
    size = geometry.image[1 + axis]
    starts = np.arange(geometry.out[axis]) * geometry.stride[axis] - pad[axis]
    ends = np.minimum(starts + geometry.kernel[axis], size + pad[axis])
    if include_pad:
        return ends - starts
    return np.minimum(ends, size) - np.maximum(starts, 0)


def _adaptive_weights(size: int, parts: int, dtype: np.dtype) -> np.ndarray:
    """(parts, size): row i averages the pixels from floor(i size / parts) to ceil((i+1) ...)."""
    place, part = np.arange(size), np.arange(parts)[:, None]
    inside = (place >= part * size // parts) & (place < -(-(part + 1) * size // parts))
    return (inside / inside.sum(1, keepdims=True)).astype(dtype)


def adaptive_avg_pool(dims: int, input: Any, output_size: Any) -> Any:
    """Averages over as many windows per dimension as `output_size` says (None: the input's size).

    Source: torch.nn.functional.adaptive_avg_pool1d, adaptive_avg_pool2d.
    """
    if input.ndim not in (dims + 1, dims + 2):
        raise RuntimeError(
            f"adaptive_avg_pool{dims}d(): Expected {dims + 1}D or {dims + 2}D tensor, but got "
            f"{list(input.shape)}"
        )
    wanted = (output_size,) * dims if isinstance(output_size, int | None) else tuple(output_size)
    if len(wanted) != dims:
        raise RuntimeError(f"adaptive_avg_pool{dims}d: output_size must be {dims} integers")
    sizes = [n if w is None else w for w, n in zip(wanted, input.shape[-dims:], strict=True)]
    if all(size == 1 for size in sizes):
        return mean(input, tuple(range(-dims, 0)), True)
    dtype = input._data.dtype
    x = matmul(input, make(_adaptive_weights(input.shape[-1], sizes[-1], dtype).T))
    if dims == 1:
        return x
    return matmul(make(_adaptive_weights(input.shape[-2], sizes[0], dtype)), x)
