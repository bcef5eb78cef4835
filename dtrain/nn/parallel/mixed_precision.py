"""Mixed precision of DDP: forward and backward in a lower precision than the parameters have.

Source: torch.nn.parallel.distributed._MixedPrecision.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dtrain import dtypes
from dtrain.nn.modules.module import Module
from dtrain.tensor import Tensor


@dataclass
class _MixedPrecision:
    """`param_dtype`: of parameters and floating inputs in forward and backward; `reduce_dtype`: in
    which gradients travel (default `param_dtype`); `buffer_dtype`: of floating buffers, once.

    None leaves a dtype as it is. Parameters, their gradients and the optimizer keep their own.
    """

    param_dtype: dtypes.dtype | None = None
    reduce_dtype: dtypes.dtype | None = None
    buffer_dtype: dtypes.dtype | None = None


@contextlib.contextmanager
def cast_parameters(module: Module, dtype: dtypes.dtype) -> Iterator[None]:
    """Inside, floating parameters of `module` read as casts to `dtype`: gradients flow through."""
    changed: list[tuple[dict[str, Any], str, Any]] = []
    casts: dict[int, Tensor] = {}  # a shared parameter is cast once
    try:
        for one in module.modules():
            for name, parameter in one._parameters.items():
                if parameter is not None and parameter.is_floating_point():
                    cast = casts.setdefault(id(parameter), parameter.to(dtype))
                    changed.append((one._parameters, name, parameter))
                    one._parameters[name] = cast
        yield
    finally:
        for table, name, parameter in changed:
            table[name] = parameter


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with every Tensor in its lists, tuples and dicts replaced by `change` of it."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return type(value)((key, map_tensors(change, each)) for key, each in value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(change, each) for each in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(change, each) for each in value)
    return value


def cast_floating(value: Any, dtype: dtypes.dtype) -> Any:
    """`value` with its floating Tensors cast to `dtype`."""
    return map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, value)
