"""Filling tensors with initial values: constants, uniform, normal, Xavier, Kaiming, orthogonal.

Every function changes its tensor in place, outside any graph, and returns it. With the same seed
(or `generator`) the numbers are PyTorch's. They are drawn for the whole tensor, of which a DTensor
takes its part: values do not depend on how it is cut. For a tensor on the meta device nothing is
drawn. Source: torch.nn.init.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np

from dtrain.autograd.grad_mode import no_grad
from dtrain.generator import Generator
from dtrain.ops.random import source_of
from dtrain.tensor import Tensor

_GAINS = {
    **dict.fromkeys(("linear", "sigmoid", "conv1d", "conv2d", "conv3d"), 1.0),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), 1.0),
    "tanh": 5.0 / 3,
    "relu": math.sqrt(2.0),
    "selu": 3.0 / 4,
}


def calculate_gain(nonlinearity: str, param: float | None = None) -> float:
    """The factor that keeps the variance through a nonlinearity; `param` is leaky_relu's slope."""
    if nonlinearity in _GAINS:
        return _GAINS[nonlinearity]
    if nonlinearity != "leaky_relu":
        raise ValueError(f"Unsupported nonlinearity {nonlinearity}")
    if param is None:
        param = 0.01
    if isinstance(param, bool) or not isinstance(param, (int, float)):
        raise ValueError(f"negative_slope {param} not a valid number")
    return math.sqrt(2.0 / (1 + param**2))


@no_grad()
def uniform_(
    tensor: Tensor, a: float = 0.0, b: float = 1.0, generator: Generator | None = None
) -> Tensor:
    """Uniform on [a, b)."""
    return tensor.uniform_(a, b, generator=generator)


@no_grad()
def normal_(
    tensor: Tensor, mean: float = 0.0, std: float = 1.0, generator: Generator | None = None
) -> Tensor:
    """Normal with the given mean and standard deviation."""
    return tensor.normal_(mean, std, generator=generator)


@no_grad()
def constant_(tensor: Tensor, val: float) -> Tensor:
    """The number `val` everywhere."""
    return tensor.fill_(val)


def ones_(tensor: Tensor) -> Tensor:
    """1 everywhere."""
    return constant_(tensor, 1.0)


def zeros_(tensor: Tensor) -> Tensor:
    """0 everywhere."""
    return constant_(tensor, 0.0)


@no_grad()
def eye_(tensor: Tensor) -> Tensor:
    """The identity matrix. ValueError unless 2-d."""
    if tensor.ndim != 2:
        raise ValueError("Only tensors with 2 dimensions are supported")
    if tensor.is_meta:
        return tensor
    return tensor.copy_(np.eye(*tensor.shape, dtype=tensor._data.dtype))


@no_grad()
def trunc_normal_(
    tensor: Tensor,
    mean: float = 0.0,
    std: float = 1.0,
    a: float = -2.0,
    b: float = 2.0,
    generator: Generator | None = None,
) -> Tensor:
    """Normal, cut to [a, b]: what falls outside is drawn again.

    Where [a, b] holds less than 30 % of the normal's mass, uniform draws are accepted by its
    density instead. Warns when `mean` is more than two `std` outside of [a, b].
    """
    if mean < a - 2 * std or mean > b + 2 * std:
        warnings.warn(
            "mean is more than 2 std from [a, b] in nn.init.trunc_normal_. "
            "The distribution of values may be incorrect.",
            stacklevel=2,
        )
    if tensor.is_meta:
        return tensor
    inside = 0.5 * (math.erf((b - mean) / (std * 2**0.5)) - math.erf((a - mean) / (std * 2**0.5)))
    draw = _redrawn_normal if inside > 0.3 else _accepted_uniform
    return draw(tensor, mean, std, a, b, generator)


def _redrawn_normal(
    tensor: Tensor, mean: float, std: float, a: float, b: float, generator: Generator | None
) -> Tensor:
    kind = tensor._data.dtype.type
    low, high = kind(a), kind(b)
    values = source_of(generator).normal(tuple(tensor.shape), tensor.dtype, mean, std)
    while (outside := (values < low) | (values > high)).any():
        fresh = source_of(generator).normal(values.shape, tensor.dtype, mean, std)
        np.copyto(values, fresh, where=outside)
    return tensor.copy_(values)


def _accepted_uniform(
    tensor: Tensor, mean: float, std: float, a: float, b: float, generator: Generator | None
) -> Tensor:
    """Rejection sampling: u in [a, b) is kept with probability density(u) / peak density."""
    source, shape, dtype = source_of(generator), tuple(tensor.shape), tensor.dtype
    peak = -0.5 * ((max(a, min(mean, b)) - mean) / std) ** 2
    values = np.empty(shape, dtype.numpy)
    pending = np.ones(shape, bool)
    while pending.any():
        fresh = source.uniform(shape, dtype, a, b)
        np.copyto(values, fresh, where=pending)
        log_density = ((fresh - mean) / std) ** 2 * -0.5 - peak
        pending &= np.log(source.uniform(shape, dtype)) > log_density
    return tensor.copy_(values)


def _calculate_fan_in_and_fan_out(tensor: Tensor) -> tuple[int, int]:
    if tensor.ndim < 2:
        raise ValueError(
            "Fan in and fan out can not be computed for tensor with fewer than 2 dimensions"
        )
    receptive_field = math.prod(tensor.shape[2:])
    return tensor.shape[1] * receptive_field, tensor.shape[0] * receptive_field


def _fan(tensor: Tensor, mode: str) -> int:
    mode = mode.lower()
    modes = ["fan_in", "fan_out"]
    if mode not in modes:
        raise ValueError(f"Mode {mode} not supported, please use one of {modes}")
    return _calculate_fan_in_and_fan_out(tensor)[modes.index(mode)]


def xavier_uniform_(
    tensor: Tensor, gain: float = 1.0, generator: Generator | None = None
) -> Tensor:
    """Uniform with variance `gain^2 * 2 / (fan_in + fan_out)` (Glorot and Bengio, 2010)."""
    bound = gain * math.sqrt(2.0 / sum(_calculate_fan_in_and_fan_out(tensor))) * math.sqrt(3.0)
    return uniform_(tensor, -bound, bound, generator)


def xavier_normal_(tensor: Tensor, gain: float = 1.0, generator: Generator | None = None) -> Tensor:
    """Normal with variance `gain^2 * 2 / (fan_in + fan_out)` (Glorot and Bengio, 2010)."""
    std = gain * math.sqrt(2.0 / sum(_calculate_fan_in_and_fan_out(tensor)))
    return normal_(tensor, 0.0, std, generator)


def kaiming_uniform_(
    tensor: Tensor,
    a: float = 0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    generator: Generator | None = None,
) -> Tensor:
    """Uniform with variance `gain^2 / fan` (He et al., 2015); `a` is leaky_relu's slope."""
    if 0 in tensor.shape:
        return _nothing_to_do(tensor)
    std = calculate_gain(nonlinearity, a) / math.sqrt(_fan(tensor, mode))
    bound = math.sqrt(3.0) * std
    return uniform_(tensor, -bound, bound, generator)


def kaiming_normal_(
    tensor: Tensor,
    a: float = 0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    generator: Generator | None = None,
) -> Tensor:
    """Normal with variance `gain^2 / fan` (He et al., 2015); `a` is leaky_relu's slope."""
    if 0 in tensor.shape:
        return _nothing_to_do(tensor)
    std = calculate_gain(nonlinearity, a) / math.sqrt(_fan(tensor, mode))
    return normal_(tensor, 0.0, std, generator)


def _nothing_to_do(tensor: Tensor) -> Tensor:
    warnings.warn("Initializing zero-element tensors is a no-op", stacklevel=3)
    return tensor


@no_grad()
def orthogonal_(tensor: Tensor, gain: float = 1, generator: Generator | None = None) -> Tensor:
    """A (semi) orthogonal matrix of rows x the rest, times `gain` (Saxe et al., 2013)."""
    if tensor.ndim < 2:
        raise ValueError("Only tensors with 2 or more dimensions are supported")
    if tensor.is_meta or tensor.numel() == 0:
        return tensor
    rows = tensor.shape[0]
    shape = (rows, tensor.numel() // rows)
    drawn = source_of(generator).normal(shape, tensor.dtype)
    wide = shape[0] < shape[1]
    q, r = np.linalg.qr(drawn.T if wide else drawn)
    q = q * np.sign(np.diagonal(r))  # makes q uniform over the orthogonal matrices
    q = q.T if wide else q
    return tensor.copy_(q.reshape(tensor.shape) * tensor._data.dtype.type(gain))


@no_grad()
def sparse_(
    tensor: Tensor, sparsity: float, std: float = 0.01, generator: Generator | None = None
) -> Tensor:
    """Normal, with the fraction `sparsity` of every column 0 (Martens, 2010). 2-d tensors."""
    if tensor.ndim != 2:
        raise ValueError("Only tensors with 2 dimensions are supported")
    if tensor.is_meta:
        return tensor
    rows, columns = tensor.shape
    zeros = math.ceil(sparsity * rows)
    values = source_of(generator).normal((rows, columns), tensor.dtype, 0, std)
    for column in range(columns):
        values[source_of(generator).randperm(rows)[:zeros], column] = 0
    return tensor.copy_(values)


@no_grad()
def dirac_(tensor: Tensor, groups: int = 1) -> Tensor:
    """A convolution weight that hands every input channel on. 3-, 4- or 5-d tensors."""
    if tensor.ndim not in (3, 4, 5):
        raise ValueError("Only tensors with 3, 4, or 5 dimensions are supported")
    if tensor.shape[0] % groups:
        raise ValueError("dim 0 must be divisible by groups")
    if tensor.is_meta:
        return tensor
    values = np.zeros(tuple(tensor.shape), tensor._data.dtype)
    outputs = tensor.shape[0] // groups
    centre: tuple[Any, ...] = tuple(size // 2 for size in tensor.shape[2:])
    for group in range(groups):
        for channel in range(min(outputs, tensor.shape[1])):
            values[(group * outputs + channel, channel, *centre)] = 1
    return tensor.copy_(values)
