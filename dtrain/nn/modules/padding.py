"""Padding as modules: constant, zero, reflecting, replicating and circular, in 1 and 2 dimensions.

`padding` is one number for all sides, or (left, right[, top, bottom]); negative ones cut off.
Source: torch.nn.modules.padding.
"""

from __future__ import annotations

from collections.abc import Sequence

from dtrain.nn import functional as F
from dtrain.nn.modules.module import Module
from dtrain.tensor import Tensor

Sizes = int | Sequence[int]


class _Pad(Module):
    """Padding of `_dims` dimensions in one of `pad`'s modes."""

    _dims: int
    _mode: str

    def __init__(self, padding: Sizes) -> None:
        super().__init__()
        sides = 2 * self._dims
        self.padding = (padding,) * sides if isinstance(padding, int) else tuple(padding)

    def forward(self, input: Tensor) -> Tensor:
        return F.pad(input, self.padding, self._mode)

    def extra_repr(self) -> str:
        return f"{self.padding}"


class _ConstantPad(_Pad):
    """Padding with one number."""

    _mode = "constant"

    def __init__(self, padding: Sizes, value: float) -> None:
        super().__init__(padding)
        self.value = value

    def forward(self, input: Tensor) -> Tensor:
        return F.pad(input, self.padding, self._mode, self.value)

    def extra_repr(self) -> str:
        return f"padding={self.padding}, value={self.value}"


class ConstantPad1d(_ConstantPad):
    """`value` at the ends of the last dimension. Source: torch.nn.ConstantPad1d."""

    _dims = 1


class ConstantPad2d(_ConstantPad):
    """`value` around the last two dimensions. Source: torch.nn.ConstantPad2d."""

    _dims = 2


class ZeroPad1d(ConstantPad1d):
    """Zeros at the ends of the last dimension. Source: torch.nn.ZeroPad1d."""

    def __init__(self, padding: Sizes) -> None:
        super().__init__(padding, 0.0)

    def extra_repr(self) -> str:
        return f"{self.padding}"


class ZeroPad2d(ConstantPad2d):
    """Zeros around the last two dimensions. Source: torch.nn.ZeroPad2d."""

    def __init__(self, padding: Sizes) -> None:
        super().__init__(padding, 0.0)

    def extra_repr(self) -> str:
        return f"{self.padding}"


class ReflectionPad1d(_Pad):
    """The input mirrored at its ends, which are not repeated. Source: torch.nn.ReflectionPad1d."""

    _dims, _mode = 1, "reflect"


class ReflectionPad2d(_Pad):
    """The input mirrored at its edges, which are not repeated. Source: torch.nn.ReflectionPad2d."""

    _dims, _mode = 2, "reflect"


class ReplicationPad1d(_Pad):
    """The ends repeated. Source: torch.nn.ReplicationPad1d."""

    _dims, _mode = 1, "replicate"


class ReplicationPad2d(_Pad):
    """The edges repeated. Source: torch.nn.ReplicationPad2d."""

    _dims, _mode = 2, "replicate"


class CircularPad1d(_Pad):
    """The other end goes on. Source: torch.nn.CircularPad1d."""

    _dims, _mode = 1, "circular"


class CircularPad2d(_Pad):
    """The other edge goes on. Source: torch.nn.CircularPad2d."""

    _dims, _mode = 2, "circular"
