"""Convolutions: Conv1d and Conv2d.

Weights and biases start uniform on +-1/sqrt(fan_in), as in torch. Source: torch.nn.modules.conv.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dtrain import dtypes
from dtrain.nn import functional as F, init
from dtrain.nn.modules.module import Module
from dtrain.nn.parameter import Parameter
from dtrain.ops.create import empty
from dtrain.tensor import Tensor

Sizes = int | Sequence[int]


def _tuple(value: Sizes, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value)


class _Conv(Module):
    """What convolutions over `_dims` dimensions have in common.

    `padding` is a number for each side, "valid" (none) or "same" (the output has the size of the
    input; stride 1 only). `padding_mode` other than "zeros" is refused (NotImplementedError).
    ValueError, with torch's sentence, where the sizes do not go together.
    """

    _dims: int
    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: str | Sizes = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: dtypes.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _tuple(kernel_size, self._dims)
        self.stride = _tuple(stride, self._dims)
        self.padding = padding if isinstance(padding, str) else _tuple(padding, self._dims)
        self.dilation = _tuple(dilation, self._dims)
        self.groups = groups
        self.padding_mode = padding_mode
        _check(self)
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self.weight = Parameter(empty(shape, device=device, dtype=dtype))
        if bias:
            self.bias = Parameter(empty(out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias from uniform(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
        init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            fan_in, _ = init._calculate_fan_in_and_fan_out(self.weight)
            if fan_in:
                init.uniform_(self.bias, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def extra_repr(self) -> str:
        shown = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        shown += f", stride={self.stride}"
        if self.padding != (0,) * self._dims:
            shown += f", padding={self.padding}"
        if self.dilation != (1,) * self._dims:
            shown += f", dilation={self.dilation}"
        if self.groups != 1:
            shown += f", groups={self.groups}"
        return shown if self.bias is not None else shown + ", bias=False"


def _check(conv: _Conv) -> None:
    if conv.groups <= 0:
        raise ValueError("groups must be a positive integer")
    for name in ("in_channels", "out_channels"):
        if getattr(conv, name) % conv.groups:
            raise ValueError(f"{name} must be divisible by groups")
    if isinstance(conv.padding, str) and conv.padding not in ("same", "valid"):
        raise ValueError(
            f"Invalid padding string {conv.padding!r}, should be one of {{'same', 'valid'}}"
        )
    if conv.padding == "same" and any(s != 1 for s in conv.stride):
        raise ValueError("padding='same' is not supported for strided convolutions")
    if conv.padding_mode in ("reflect", "replicate", "circular"):
        raise NotImplementedError(
            f"padding_mode='{conv.padding_mode}' is not supported: pad the input yourself"
        )
    if conv.padding_mode != "zeros":
        raise ValueError(
            "padding_mode must be one of 'zeros', 'reflect', 'replicate', 'circular', but got "
            f"padding_mode='{conv.padding_mode}'"
        )


class Conv1d(_Conv):
    """Convolution of (N, C, L) or (C, L). Source: torch.nn.Conv1d."""

    _dims = 1

    def forward(self, input: Tensor) -> Tensor:
        return F.conv1d(  # type: ignore[no-any-return]
            input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class Conv2d(_Conv):
    """Convolution of (N, C, H, W) or (C, H, W). Source: torch.nn.Conv2d."""

    _dims = 2

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(  # type: ignore[no-any-return]
            input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )
