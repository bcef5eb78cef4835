"""Padding, resizing and unfolding of images and signals: (N, C, *) arrays.

Rules: resizing and the paddings that repeat pixels pick them by index or weigh them by a matrix
for each dimension, so that gradients are those of indexing and of matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dtrain.autograd.node import make
from dtrain.autograd.op import define
from dtrain.ops.conv import several
from dtrain.ops.gather import index_select
from dtrain.ops.linalg import matmul
from dtrain.ops.pool import adaptive_avg_pool
from dtrain.ops.shape import reshape, transpose
from dtrain.ops.windows import Geometry, Windows

# --- padding -------------------------------------------------------------------------------------


def _pad_forward(x: np.ndarray, *, widths: tuple[Any, ...], value: float) -> np.ndarray:
    kept = x[
        tuple(slice(max(0, -b), n - max(0, -a)) for n, (b, a) in zip(x.shape, widths, strict=True))
    ]
    out = np.full([n + b + a for n, (b, a) in zip(x.shape, widths, strict=True)], value, x.dtype)
    out[
        tuple(slice(max(0, b), max(0, b) + n) for n, (b, _) in zip(kept.shape, widths, strict=True))
    ] = kept
    return out


_pad = define(
    "constant_pad", _pad_forward,
    vjp=lambda n, g: (_pad(g, widths=tuple((-b, -a) for b, a in n.widths), value=0.0),),
    sample=lambda: [((np.arange(6.0).reshape(2, 3),), {"widths": ((1, 0), (2, -1)), "value": 5.0})],
)  # fmt: skip


def pad(input: Any, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    """More (or with negative numbers fewer) elements before and after, from the last dimension on.

    mode "constant" (`value`, 0 unless given), "reflect", "replicate" or "circular".
    Source: torch.nn.functional.pad.
    """
    widths = [int(n) for n in pad]
    if len(widths) % 2:
        raise RuntimeError("Padding length must be divisible by 2")
    if len(widths) > 2 * input.ndim:
        raise RuntimeError(
            "Padding length should be less than or equal to two times the input dimension but got "
            f"padding length {len(widths)} and input of dimension {input.ndim}"
        )
    pairs = list(zip(widths[::2], widths[1::2], strict=True))
    if mode == "constant":
        every = [(0, 0)] * (input.ndim - len(pairs)) + pairs[::-1]
        for axis, (size, (before, after)) in enumerate(zip(input.shape, every, strict=True)):
            if size + before + after < 0:
                raise RuntimeError(
                    f"The input size {size}, plus negative padding {before} and {after} resulted "
                    f"in a negative output size, which is invalid. Check dimension {axis} of your "
                    "input."
                )
        return _pad(input, widths=tuple(every), value=0.0 if value is None else float(value))
    if mode not in _PLACES:
        raise NotImplementedError(f"Unrecognised padding mode {mode}")
    if value is not None:
        raise ValueError(f"Padding mode '{mode}' doesn't take in value argument")
    if not len(pairs) < input.ndim <= len(pairs) + 2:
        raise NotImplementedError(
            f"Padding size {len(widths)} is not supported for {input.ndim}D input tensor."
        )
    for back, (before, after) in enumerate(pairs, 1):
        size = input.shape[-back]
        places = np.arange(-before, size + after)
        input = index_select(input, -back, make(_PLACES[mode](places, size)))
    return input


def _reflected(places: np.ndarray, size: int) -> np.ndarray:
    if -places[0] >= size or places[-1] - size + 1 >= size:
        raise RuntimeError(
            "Argument #4: Padding size should be less than the corresponding input dimension, but "
            f"got: padding ({-places[0]}, {places[-1] - size + 1}) at a dimension of size {size}"
        )
    inside = np.abs(places)
    return np.where(inside >= size, 2 * (size - 1) - inside, inside)


def _wrapped(places: np.ndarray, size: int) -> np.ndarray:
    if -places[0] > size or places[-1] - size + 1 > size:
        raise RuntimeError("Padding value causes wrapping around more than once.")
    return places % size


_PLACES = {
    "reflect": _reflected,
    "replicate": lambda places, size: np.clip(places, 0, size - 1),
    "circular": _wrapped,
}


# --- resizing ------------------------------------------------------------------------------------


def interpolate(
    input: Any, size: Any = None, scale_factor: Any = None, mode: str = "nearest",
    align_corners: bool | None = None, recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Any:  # fmt: skip
    """(N, C, *) resized to `size` or by `scale_factor`.

    mode "nearest" and "area" for any number of dimensions, "linear" for one, "bilinear" for two.
    NotImplementedError for other modes and for `antialias`.
    Source: torch.nn.functional.interpolate.
    """
    dims = input.ndim - 2
    sizes, scales = _sizes(input.shape[2:], size, scale_factor, bool(recompute_scale_factor))
    if align_corners is not None and mode in ("nearest", "area"):
        raise ValueError(
            "align_corners option can only be set with the interpolating modes: linear | bilinear "
            "| bicubic | trilinear"
        )
    if mode == "area" and dims in (1, 2):
        return adaptive_avg_pool(dims, input, sizes)
    if mode == "nearest":
        for axis, (new, scale) in enumerate(zip(sizes, scales, strict=True), 2):
            old = input.shape[axis]
            places = np.minimum((np.arange(new) * np.float32(scale)).astype(np.int64), old - 1)
            input = index_select(input, axis, make(places))
        return input
    if antialias or (mode, dims) not in (("linear", 1), ("bilinear", 2)):
        raise NotImplementedError(
            f"interpolate: mode {mode!r} of a {input.ndim}D input (antialias={antialias}) is not "
            "supported"
        )
    for axis, (new, scale) in enumerate(zip(sizes, scales, strict=True), 2):
        weights = _linear_weights(input.shape[axis], new, scale, bool(align_corners))
        matrix = make(weights.astype(input._data.dtype))
        if axis == input.ndim - 1:
            input = matmul(input, transpose(matrix, 0, 1))
        else:
            input = matmul(matrix, input)
    return input


def _sizes(
    old: Sequence[int], size: Any, scale_factor: Any, recompute: bool
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The new sizes, and old pixels per new pixel in each dimension."""
    if size is not None and scale_factor is not None:
        raise ValueError("only one of size or scale_factor should be defined")
    if size is None and scale_factor is None:
        raise ValueError("either size or scale_factor should be defined")
    if size is not None:
        sizes = several(size, "size", len(old))
        return sizes, tuple(n / m for n, m in zip(old, sizes, strict=True))
    is_number = isinstance(scale_factor, int | float)
    factors = (float(scale_factor),) * len(old) if is_number else tuple(scale_factor)
    sizes = tuple(math.floor(n * f) for n, f in zip(old, factors, strict=True))
    if recompute:
        return sizes, tuple(n / m for n, m in zip(old, sizes, strict=True))
    return sizes, tuple(1 / f for f in factors)


def _linear_weights(old: int, new: int, scale: float, align_corners: bool) -> np.ndarray:
    """(new, old): how much of each old pixel is in each new one."""
    if align_corners:
        places = np.arange(new) * ((old - 1) / (new - 1) if new > 1 else 0.0)
    else:
        places = np.maximum((np.arange(new) + 0.5) * scale - 0.5, 0)
    left = np.minimum(places.astype(np.int64), old - 1)
    right = np.minimum(left + 1, old - 1)
    share = np.clip(places - left, 0, 1)
    weights = np.zeros((new, old))
    np.add.at(weights, (np.arange(new), left), 1 - share)
    np.add.at(weights, (np.arange(new), right), share)
    return weights


# --- windows as columns --------------------------------------------------------------------------


def _unfold_forward(x: np.ndarray, *, geometry: Geometry) -> np.ndarray:
    view = Windows(geometry, x.dtype)
    channels, (rows, columns), (height, width) = geometry.image[0], geometry.out, geometry.kernel
    out = np.empty((len(x), channels, height, width, rows, columns), x.dtype)
    for image, result in zip(x, out, strict=True):
        np.copyto(view.inner[0], image.transpose(1, 2, 0))
        np.copyto(result, view.view[0, 0].transpose(4, 2, 3, 0, 1))
    return out.reshape(len(x), channels * height * width, rows * columns)


def _fold_forward(columns: np.ndarray, *, geometry: Geometry) -> np.ndarray:
    windows = Windows(geometry, columns.dtype)
    channels, taps = geometry.image[0], geometry.kernel[0] * geometry.kernel[1]
    parts = columns.reshape(len(columns), channels, taps, -1).transpose(0, 3, 2, 1)
    out = np.empty((len(columns), *geometry.image), columns.dtype)
    for part, result in zip(parts, out, strict=True):
        windows.clear()
        for rows, pixels in windows.strips():
            windows.add(rows, part[pixels][None])
        np.copyto(result, windows.inner[0].transpose(2, 0, 1))
    return out


_SAMPLE = Geometry((2, 5, 4), (3, 2), (2, 1), ((1, 1), (0, 0)), (1, 2), 1)
_unfold = define(
    "unfold", _unfold_forward, vjp=lambda n, g: (_fold(g, geometry=n.geometry),),
    sample=lambda: [((np.random.RandomState(0).rand(2, 2, 5, 4),), {"geometry": _SAMPLE})],
)  # fmt: skip
_fold = define(
    "fold", _fold_forward, vjp=lambda n, h: (_unfold(h, geometry=n.geometry),),
    sample=lambda: [((np.random.RandomState(0).rand(2, 12, 6),), {"geometry": _SAMPLE})],
)  # fmt: skip


def _fold_geometry(
    image: tuple[int, ...], kernel_size: Any, dilation: Any, padding: Any, stride: Any
) -> Geometry:
    top, left = several(padding, "padding", 2)
    geometry = Geometry(
        image, several(kernel_size, "kernel_size", 2), several(stride, "stride", 2),
        ((top, top), (left, left)), several(dilation, "dilation", 2), 1,
    )  # fmt: skip
    if min(geometry.out) < 1:
        raise RuntimeError(
            f"Given input with spatial size {list(image[1:])}, kernel_size={geometry.kernel}, "
            f"dilation={geometry.dilation}, padding={(top, left)}, calculated shape of the array "
            f"of sliding blocks as {geometry.out}, but its components must be at least one."
        )
    return geometry


def unfold(
    input: Any, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1
) -> Any:
    """The windows of ([N,] C, H, W) as columns: ([N,] C kh kw, windows).

    Source: torch.nn.functional.unfold.
    """
    batched = reshape(input, (1, *input.shape)) if input.ndim == 3 else input
    geometry = _fold_geometry(tuple(batched.shape[1:]), kernel_size, dilation, padding, stride)
    columns = _unfold(batched, geometry=geometry)
    return reshape(columns, tuple(columns.shape[1:])) if input.ndim == 3 else columns


def fold(
    input: Any, output_size: Any, kernel_size: Any, dilation: Any = 1, padding: Any = 0,
    stride: Any = 1,
) -> Any:  # fmt: skip
    """Columns of windows ([N,] C kh kw, windows) added up into images ([N,] C, *output_size).

    Source: torch.nn.functional.fold.
    """
    batched = reshape(input, (1, *input.shape)) if input.ndim == 2 else input
    kernel = several(kernel_size, "kernel_size", 2)
    if batched.shape[1] % (kernel[0] * kernel[1]):
        raise RuntimeError(
            "Expected size of input's dimension 1 to be divisible by the product of kernel_size, "
            f"but got input.size(1)={batched.shape[1]} and kernel_size={kernel}."
        )
    channels = batched.shape[1] // (kernel[0] * kernel[1])
    image = (channels, *several(output_size, "output_size", 2))
    geometry = _fold_geometry(image, kernel, dilation, padding, stride)
    if batched.shape[2] != math.prod(geometry.out):
        raise RuntimeError(
            f"Given output_size={image[1:]}, kernel_size={kernel}, dilation={geometry.dilation}, "
            f"padding={padding}, stride={geometry.stride}, expected size of input's dimension 2 to "
            f"match the calculated number of sliding blocks {geometry.out[0]} * {geometry.out[1]} "
            f"= {math.prod(geometry.out)}, but got input.size(2)={batched.shape[2]}."
        )
    images = _fold(batched, geometry=geometry)
    return reshape(images, tuple(images.shape[1:])) if input.ndim == 2 else images
