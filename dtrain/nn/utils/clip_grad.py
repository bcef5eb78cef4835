"""Clipping of gradients: by their total norm, or each element by value.

Gradients are changed in place. Those that are cut over a mesh (DTensor) count as wholes: then all
ranks call these functions, which block for an all-reduce an axis. `foreach` is accepted for torch's
signature and ignored: there is one way to do it. Source: torch.nn.utils.clip_grad.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from types import GeneratorType
from typing import Any

import numpy as np

from dtrain.autograd.node import make
from dtrain.autograd.value import PARTS
from dtrain.tensor import Tensor


def _listed(tensors: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _norm(array: np.ndarray, order: float) -> float:
    """The norm of one array. Squares are added by BLAS; where they overflow, in float64."""
    flat = array.ravel(order="K")
    if flat.dtype.itemsize < 4:
        flat = flat.astype(np.float32)
    if order == 2.0:
        squares = float(np.vdot(flat, flat).real)
        if math.isfinite(squares) and squares > 1e-30:
            return math.sqrt(squares)
        flat = flat.astype(np.promote_types(flat.dtype, np.float64))
    return float(np.linalg.norm(flat, order)) if flat.size else 0.0


def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Any:
    """The norm of all tensors taken as one vector, a 0-d tensor of the first one's dtype; of
    DTensors of one mesh a replicated DTensor.

    RuntimeError, with `error_if_nonfinite`, when it is inf or nan.
    """
    listed = _listed(tensors)
    arrays = [tensor._data for tensor in listed]
    norm_type = float(norm_type)
    if not arrays:
        return make(np.zeros((), np.float32))
    norms: Any = np.array([_norm(array, norm_type) for array in arrays])
    parts: list[Any] = [tensor for tensor in listed if tensor.__class__ in PARTS]
    if parts:
        norms = parts[0]._whole_norms(listed, norms, norm_type)
    total = np.asarray(np.linalg.norm(norms, norm_type), arrays[0].dtype)
    if error_if_nonfinite and not np.isfinite(total):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, "
            "so it cannot be clipped. To disable this error and scale the gradients by the "
            "non-finite norm anyway, set `error_if_nonfinite=False`"
        )
    result = make(total)
    return parts[0]._everywhere(result, listed) if parts else result


def clip_grads_with_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    total_norm: Tensor,
    foreach: bool | None = None,
) -> None:
    """Scale all gradients by `max_norm / (total_norm + 1e-6)` where that is below 1."""
    scale = float(max_norm) / (total_norm.item() + 1e-6)
    if scale >= 1.0:
        return
    for parameter in _listed(parameters):
        if parameter.grad is not None:
            data = parameter.grad._data
            with np.errstate(
                invalid="ignore", over="ignore"
            ):  # inf and nan are values, as in torch
                np.multiply(data, data.dtype.type(scale), out=data)
            parameter.grad._bump_version()


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Any:
    """Scale gradients down so that their total norm is at most `max_norm`.

    Returns the norm before, a 0-d tensor. Parameters without gradient are passed over.
    """
    listed = _listed(parameters)
    if isinstance(parameters, GeneratorType) and not listed:
        warnings.warn(
            "`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=2
        )
    grads = [parameter.grad for parameter in listed if parameter.grad is not None]
    total_norm = get_total_norm(grads, norm_type, error_if_nonfinite)
    clip_grads_with_norm_(listed, max_norm, total_norm)
    return total_norm


def clip_grad_value_(
    parameters: Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None = None
) -> None:
    """Limit every element of every gradient to [-clip_value, clip_value]."""
    limit = float(clip_value)
    for parameter in _listed(parameters):
        if parameter.grad is not None:
            data = parameter.grad._data
            np.clip(data, -limit, limit, out=data)
            parameter.grad._bump_version()
