"""Parameters as one vector, and back.

Source: torch.nn.utils.convert_parameters.
"""

from __future__ import annotations

from collections.abc import Iterable

from dtrain.nn.modules.tree import type_name
from dtrain.ops.join import cat
from dtrain.tensor import Tensor


def parameters_to_vector(parameters: Iterable[Tensor]) -> Tensor:
    """All parameters flattened and joined into one new 1-d tensor, in their order."""
    return cat([parameter.reshape(-1) for parameter in parameters])


def vector_to_parameters(vec: Tensor, parameters: Iterable[Tensor]) -> None:
    """Make the parameters views of consecutive pieces of `vec`. TypeError unless a Tensor."""
    if not isinstance(vec, Tensor):
        raise TypeError(f"expected torch.Tensor, but got: {type_name(vec)}")
    start = 0
    for parameter in parameters:
        size = parameter.numel()
        parameter.data = vec[start : start + size].view_as(parameter).data
        start += size
