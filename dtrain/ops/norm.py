"""Normalisation: layer_norm, rms_norm and group_norm over rows, batch_norm over channels.

The fused ops keep the normalised rows (or, for channels, only mean and deviation) and finish the
gradient in a few passes. Statistics are of the dtype of the input; variances are computed from
centred values, never as a difference of squares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from dtrain.autograd.dispatch import Whole, elsewhere
from dtrain.autograd.op import define
from dtrain.autograd.value import has_part
from dtrain.ops.elementwise import rsqrt, square
from dtrain.ops.reduce import mean
from dtrain.ops.shape import reshape
from dtrain.ranks import Peers

ROWS = 49152  # elements of the rows that layer_norm takes together; half and twice are slower
GROUP = 131072  # elements of the samples that batch_norm takes together; less and more is slower


def _rand(*shape: int) -> np.ndarray:
    return np.random.RandomState(0).randn(*shape)


def _column(values: np.ndarray) -> np.ndarray:
    return values[:, None]


# --- rows ----------------------------------------------------------------------------------------


def _layer_norm_forward(
    x: np.ndarray, weight: np.ndarray | None, bias: np.ndarray | None, *, eps: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    y, normal, rstd = np.empty_like(x), np.empty_like(x), np.empty(len(x), x.dtype)
    even = _weights(x.shape[1], x.dtype)
    for rows in _row_blocks(x):
        own = x[rows]
        part = np.subtract(own, _column(own @ even), out=normal[rows])
        rstd[rows] = 1 / np.sqrt(np.vecdot(part, part) / x.shape[1] + eps)
        part *= _column(rstd[rows])
        _scale(part, weight, bias, y[rows])
    return y, normal, rstd


def _weights(count: int, dtype: Any) -> np.ndarray:
    """What a row is multiplied with for its mean: a matrix-vector product is the fastest sum."""
    return np.full(count, 1 / max(count, 1), dtype)


def _row_blocks(x: np.ndarray) -> Iterator[slice]:
    """Rows whose elements, and those of a few arrays more, stay in cache from pass to pass."""
    step = max(1, ROWS // max(1, x.shape[1]))
    return (slice(i, i + step) for i in range(0, len(x), step))


def _scale(
    normal: np.ndarray, weight: np.ndarray | None, bias: np.ndarray | None, out: np.ndarray
) -> None:
    if weight is None:
        np.copyto(out, normal)
    else:
        np.multiply(normal, weight, out=out)
    if bias is not None:
        out += bias


def _layer_norm_vjp(n: Any, g: np.ndarray) -> Any:
    # with h = g * weight: dx = (h - mean(h) - normal mean(h normal)) rstd
    dx = np.empty_like(g) if n.needs[0] else None
    sums = np.zeros((2, g.shape[1]), g.dtype)
    mean_of = _weights(g.shape[1], g.dtype)
    if n.weight is not None:
        mean_of *= n.weight
    for rows in _row_blocks(g):
        part, normal = g[rows], n.normal[rows]
        ones, along = np.ones(len(part), g.dtype), part * normal
        sums[0] += ones @ along
        sums[1] += ones @ part
        if dx is not None:
            centre, slope = part @ mean_of, along @ mean_of
            np.multiply(normal, _column(slope), out=along)
            along += _column(centre)
            out = dx[rows]
            _scale(part, n.weight, None, out)
            out -= along
            out *= _column(n.rstd[rows])
    return dx, sums[0] if n.needs[1] else None, sums[1] if n.needs[2] else None


def _layer_norm_composite(x: Any, weight: Any, bias: Any, *, eps: float) -> Any:
    centred = x - mean(x, 1, True)
    y = centred * rsqrt(mean(square(centred), 1, True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


_layer_norm = define(
    "layer_norm", _layer_norm_forward, vjp=_layer_norm_vjp, aux="normal rstd",
    composite=_layer_norm_composite,
    sample=lambda: [((_rand(3, 5), _rand(5), _rand(5)), {"eps": 1e-5}),
                    ((_rand(3, 5), None, None), {"eps": 1e-5})],
)  # fmt: skip


def _rms_norm_forward(
    x: np.ndarray, weight: np.ndarray | None, *, eps: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rstd = 1 / np.sqrt(np.vecdot(x, x) / x.shape[1] + eps)
    normal = x * _column(rstd)
    y = np.empty_like(normal)
    _scale(normal, weight, None, y)
    return y, normal, rstd


def _rms_norm_vjp(n: Any, g: np.ndarray) -> Any:
    dx = dweight = None
    if n.needs[0]:
        dx = g.copy() if n.weight is None else g * n.weight
        dx -= n.normal * _column(np.vecdot(dx, n.normal) / g.shape[1])
        dx *= _column(n.rstd)
    if n.needs[1]:
        dweight = np.einsum("ij,ij->j", g, n.normal)
    return dx, dweight


def _rms_norm_composite(x: Any, weight: Any, *, eps: float) -> Any:
    y = x * rsqrt(mean(square(x), 1, True) + eps)
    return y if weight is None else y * weight


_rms_norm = define(
    "rms_norm", _rms_norm_forward, vjp=_rms_norm_vjp, aux="normal rstd",
    composite=_rms_norm_composite,
    sample=lambda: [((_rand(3, 5), _rand(5)), {"eps": 1e-5}), ((_rand(3, 5), None), {"eps": 0.1})],
)  # fmt: skip


def _check_normalized(
    input: Any, normalized_shape: Sequence[int], weight: Any, bias: Any
) -> tuple[int, ...]:
    """`normalized_shape` as a tuple, once it fits input and parameters; torch's sentences."""
    shape = tuple(normalized_shape)
    if not shape:
        raise RuntimeError(
            "Expected normalized_shape to be at least 1-dimensional, i.e., containing at least "
            f"one element, but got normalized_shape = {list(shape)}"
        )
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and tuple(value.shape) != shape:
            raise RuntimeError(
                f"Expected {name} to be of same shape as normalized_shape, but got {name} of "
                f"shape {list(value.shape)} and normalized_shape = {list(shape)}"
            )
    if tuple(input.shape[-len(shape) :]) != shape:
        wanted = ", ".join(["*", *map(str, shape)])
        raise RuntimeError(
            f"Given normalized_shape={list(shape)}, expected input with shape [{wanted}], but got "
            f"input of size{list(input.shape)}"
        )
    return shape


def _rows(x: Any, size: int) -> Any:
    return x if x.ndim == 2 and x.shape[1] == size else reshape(x, (-1, size))


def _flat(x: Any, size: int) -> Any:
    return x if x is None or x.ndim == 1 else reshape(x, (size,))


def layer_norm(
    input: Any, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None,
    eps: float = 1e-5,
) -> Any:  # fmt: skip
    """Rows over the last dimensions (`normalized_shape`) to mean 0 and variance 1, then
    `* weight + bias`. Source: torch.nn.functional.layer_norm.
    """
    shape = _check_normalized(input, normalized_shape, weight, bias)
    if has_part(input, weight, bias):
        attrs = {"normalized_shape": shape, "eps": eps}
        return elsewhere(_LAYER_NORM, (input, weight, bias), attrs)
    size = math.prod(shape)
    y = _layer_norm(_rows(input, size), _flat(weight, size), _flat(bias, size), eps=eps)
    return y if y.shape == input.shape else reshape(y, tuple(input.shape))


def rms_norm(
    input: Any, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None
) -> Any:
    """`input / sqrt(mean(input^2) + eps) * weight` over the last dimensions; eps None is the
    dtype's epsilon. Source: torch.nn.functional.rms_norm.
    """
    shape = _check_normalized(input, normalized_shape, weight, None)
    if has_part(input, weight):
        return elsewhere(_RMS_NORM, (input, weight), {"normalized_shape": shape, "eps": eps})
    size = math.prod(shape)
    if eps is None:
        eps = float(np.finfo(_kind(input)).eps)
    if _kind(input).itemsize < 4:  # 16 bits are too few for sums; torch's are 32, too
        wide = rms_norm(input.float(), shape, None if weight is None else weight.float(), eps)
        return wide.to(input.dtype)
    y = _rms_norm(_rows(input, size), _flat(weight, size), eps=eps)
    return y if y.shape == input.shape else reshape(y, tuple(input.shape))


_LAYER_NORM = Whole(
    "layer_norm", lambda x, weight, bias, **attrs: layer_norm(x, weight=weight, bias=bias, **attrs)
)
_RMS_NORM = Whole("rms_norm", lambda x, weight, **attrs: rms_norm(x, weight=weight, **attrs))


def _kind(x: Any) -> Any:
    return getattr(x, "_data", x).dtype


def group_norm(
    input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    """Each sample's channels in `num_groups` groups, every group to mean 0 and variance 1, then
    `* weight + bias` by channel: (N, C, *). Source: torch.nn.functional.group_norm.
    """
    if input.ndim < 2:
        raise RuntimeError(
            f"Expected at least 2 dimensions for input tensor but received {input.ndim}"
        )
    channels = input.shape[1]
    if num_groups <= 0 or channels % num_groups:
        raise RuntimeError(
            "Expected number of channels in input to be divisible by num_groups, but got input "
            f"of shape {list(input.shape)} and num_groups={num_groups}"
        )
    rows = reshape(input, (input.shape[0] * num_groups, -1))
    y = reshape(_layer_norm(rows, None, None, eps=eps), tuple(input.shape))
    by_channel = (1, channels) + (1,) * (input.ndim - 2)
    y = y if weight is None else y * reshape(weight, by_channel)
    return y if bias is None else y + reshape(bias, by_channel)


# --- channels: arrays (samples, channels, length) ----------------------------------------------


def _samples(x: np.ndarray) -> Iterator[slice]:
    """Groups of samples whose elements, and a temporary or two of their size, stay in cache."""
    step = max(1, GROUP // max(1, x[:1].size))
    return (slice(i, i + step) for i in range(0, len(x), step))


def _channel_sum(x: np.ndarray) -> np.ndarray:
    return np.add.reduce(np.add.reduce(x, axis=2), axis=0)


def _moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Of every channel: mean, sum of squares about it, and how many values there are."""
    count = x.size // x.shape[1]
    centre = _channel_sum(x) / max(count, 1)
    spread = np.zeros(x.shape[1], x.dtype)
    for part in _samples(x):
        centred = x[part] - _column(centre)
        spread += np.add.reduce(np.vecdot(centred, centred), axis=0)
    return centre, spread, count


def _pooled_moments(x: np.ndarray, peers: Peers) -> tuple[np.ndarray, np.ndarray, int]:
    """`_moments` of the batches of all ranks together, which may be of different sizes.

    Sums are about each rank's own mean, and moved to the common one afterwards: no difference of
    squares (Chan, Golub and LeVeque 1983). What travels is float64, in which counts are exact.
    """
    channels = x.shape[1]
    centre, spread, count = _moments(x)
    rows = peers.gather(np.concatenate([centre, spread, [count]]).astype(np.float64))
    centres, spreads = rows[:, :channels], rows[:, channels:-1]
    counts = rows[:, -1:]
    total = counts.sum()
    common = (centres * counts).sum(axis=0) / max(total, 1.0)
    spread = (spreads + counts * (centres - common) ** 2).sum(axis=0)
    return common.astype(x.dtype), spread.astype(x.dtype), int(total)


def _batch_norm_forward(
    x: np.ndarray, weight: np.ndarray | None, bias: np.ndarray | None, *, eps: float,
    observe: Callable[[np.ndarray, np.ndarray, int], None] | None, peers: Peers | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:  # fmt: skip
    centre, spread, count = _moments(x) if peers is None else _pooled_moments(x, peers)
    if observe is not None:
        observe(centre, spread, count)
    rstd = 1 / np.sqrt(spread / max(count, 1) + eps)
    scale = rstd if weight is None else rstd * weight
    shift = -centre * scale if bias is None else bias - centre * scale
    y = np.empty(x.shape, x.dtype)
    for part in _samples(x):
        np.multiply(x[part], _column(scale), out=y[part])
        y[part] += _column(shift)
    return y, centre, rstd, count


def _batch_norm_vjp(n: Any, g: np.ndarray) -> Any:
    # dx = scale (g - mean(g) - normal mean(g normal)), with normal = (x - centre) rstd
    along = np.zeros(g.shape[1], g.dtype)
    for part in _samples(g):
        along += np.add.reduce(np.vecdot(g[part], n.x[part] - _column(n.centre)), axis=0)
    total = _channel_sum(g)
    dweight = along * n.rstd if n.needs[1] else None
    dbias = total if n.needs[2] else None
    if not n.needs[0]:
        return None, dweight, dbias
    if n.peers is not None:  # the means are of all ranks; weight and bias are this rank's part
        total, along = np.split(n.peers.sum(np.concatenate([total, along])), 2)
    return _batch_norm_dx(n, g, total, along), dweight, dbias


def _batch_norm_dx(n: Any, g: np.ndarray, total: np.ndarray, along: np.ndarray) -> np.ndarray:
    scale = n.rstd if n.weight is None else n.rstd * n.weight
    slope = along * n.rstd * n.rstd / n.count
    offset = total / n.count - slope * n.centre
    dx = np.empty(g.shape, g.dtype)
    for part in _samples(g):
        np.multiply(n.x[part], _column(-slope), out=dx[part])
        dx[part] += g[part]
        dx[part] -= _column(offset)
        dx[part] *= _column(scale)
    return dx


def _batch_norm_composite(
    x: Any, weight: Any, bias: Any, *, eps: float, observe: Any, peers: Any
) -> Any:
    if peers is not None:
        raise RuntimeError(
            "batch_norm over several ranks cannot be differentiated twice; use BatchNorm, or "
            "create_graph=False"
        )
    centred = x - mean(x, (0, 2), True)
    y = centred * rsqrt(mean(square(centred), (0, 2), True) + eps)
    y = y if weight is None else y * reshape(weight, (-1, 1))
    return y if bias is None else y + reshape(bias, (-1, 1))


_ALONE = {"eps": 1e-5, "observe": None, "peers": None}

_batch_norm = define(
    "batch_norm", _batch_norm_forward, vjp=_batch_norm_vjp, aux="centre rstd count",
    composite=_batch_norm_composite,
    sample=lambda: [((_rand(3, 2, 4), _rand(2), _rand(2)), _ALONE),
                    ((_rand(4, 3, 1), None, None), _ALONE)],
)  # fmt: skip


def batch_norm(
    input: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Any:  # fmt: skip
    """Every channel of (N, C, *) to mean 0 and variance 1, then `* weight + bias`.

    With `training` the batch's own statistics are used, and the running ones (tensors (C,) or
    None) move towards them in place by `momentum`, the variance unbiased; without it the running
    ones are used. Source: torch.nn.functional.batch_norm.
    """
    channels = input.shape[1]
    for name, value in (("running_mean", running_mean), ("running_var", running_var),
                        ("weight", weight), ("bias", bias)):  # fmt: skip
        if value is not None and value.shape[0] != channels:
            raise RuntimeError(f"{name} should contain {channels} elements not {value.shape[0]}")
    if training:
        return _normalized_by_batch(input, running_mean, running_var, weight, bias, momentum, eps)
    for name, value in (("running_mean", running_mean), ("running_var", running_var)):
        if value is None:
            raise RuntimeError(f"{name} must be defined in evaluation mode")
    by_channel = (channels,) + (1,) * (input.ndim - 2)
    scale = rsqrt(running_var + eps)
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale if bias is None else bias - running_mean * scale
    return input * reshape(scale, by_channel) + reshape(shift, by_channel)


def batch_norm_over_ranks(
    input: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, momentum: float,
    eps: float, peers: Peers,
) -> Any:  # fmt: skip
    """`batch_norm` in training by the statistics of the batches of all `peers` together.

    The batches may be of different sizes, also empty. All ranks call it, and backward through it,
    in the same order; both wait for each other. The gradients of weight and bias are this rank's
    part of the sum over ranks.
    """
    return _normalized_by_batch(
        input, running_mean, running_var, weight, bias, momentum, eps, peers
    )


def _normalized_by_batch(
    input: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, momentum: float,
    eps: float, peers: Peers | None = None,
) -> Any:  # fmt: skip
    def observe(centre: np.ndarray, spread: np.ndarray, count: int) -> None:
        if count <= 1:
            where = "" if peers is None else " on this rank, and no other values on the others"
            raise ValueError(
                "Expected more than 1 value per channel when training, got input size "
                f"{input.shape}{where}"
            )
        if running_mean is not None:
            _move(running_mean, centre, momentum)
        if running_var is not None:
            _move(running_var, spread / (count - 1), momentum)

    x = reshape(input, (*input.shape[:2], math.prod(input.shape[2:])))
    y = _batch_norm(x, weight, bias, eps=eps, observe=observe, peers=peers)
    return reshape(y, tuple(input.shape))


def _move(running: Any, value: np.ndarray, momentum: float) -> None:
    running.set_array(running._data * (1 - momentum) + value * momentum)
