"""Convolutions and their transposes: Conv1d, Conv2d, ConvTranspose1d, ConvTranspose2d.

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
from dtrain.tensor import Size, Tensor

Sizes = int | Sequence[int]
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def _tuple(value: Sizes, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value)


class _Conv(Module):
    """What convolutions over `_dims` dimensions have in common.

    `padding` is a number for each side, "valid" (none) or "same" (the output has the size of the
    input; stride 1 only). `padding_mode` says what is there: "zeros", "reflect", "replicate" or
    "circular". ValueError, with torch's sentence, where the sizes do not go together.
    """

    _dims: int
    transposed = False
    output_padding: tuple[int, ...]
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
        self.output_padding = (0,) * self._dims
        _check(self)
        first, second = out_channels, in_channels
        if self.transposed:
            first, second = second, first
        shape = (first, second // groups, *self.kernel_size)
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
        if self.output_padding != (0,) * self._dims:
            shown += f", output_padding={self.output_padding}"
        if self.groups != 1:
            shown += f", groups={self.groups}"
        if self.bias is None:
            shown += ", bias=False"
        return (
            shown if self.padding_mode == "zeros" else f"{shown}, padding_mode={self.padding_mode}"
        )

    def _padded(self, input: Tensor) -> tuple[Tensor, Any]:
        """The input, and the padding that is left to do after `padding_mode` did its own."""
        if self.padding_mode == "zeros":
            return input, self.padding
        sides: list[int] = []  # from the last dimension on, before and after
        for i in reversed(range(self._dims)):
            if isinstance(self.padding, str):
                total = self.dilation[i] * (self.kernel_size[i] - 1) * (self.padding == "same")
                sides += [total // 2, total - total // 2]
            else:
                sides += [self.padding[i]] * 2
        return F.pad(input, sides, self.padding_mode), 0


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
    if conv.padding_mode not in _PADDING_MODES:
        raise ValueError(
            f"padding_mode must be one of {_PADDING_MODES}, but got "
            f"padding_mode='{conv.padding_mode}'"
        )


class Conv1d(_Conv):
    """Convolution of (N, C, L) or (C, L). Source: torch.nn.Conv1d."""

    _dims = 1

    def forward(self, input: Tensor) -> Tensor:
        input, padding = self._padded(input)
        return F.conv1d(
            input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups
        )


class Conv2d(_Conv):
    """Convolution of (N, C, H, W) or (C, H, W). Source: torch.nn.Conv2d."""

    _dims = 2

    def forward(self, input: Tensor) -> Tensor:
        input, padding = self._padded(input)
        return F.conv2d(
            input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups
        )


class _ConvTranspose(_Conv):
    """What transposed convolutions have in common: the gradient of a convolution as a module.

    `output_padding` adds to one side of the output; a call may name an `output_size` instead.
    """

    transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes = 0,
        output_padding: Sizes = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Sizes = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: dtypes.dtype | None = None,
    ) -> None:
        if padding_mode != "zeros":
            raise ValueError(f'Only "zeros" padding mode is supported for {type(self).__name__}')
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype,
        )  # fmt: skip
        self.output_padding = _tuple(output_padding, self._dims)

    def _output_padding(self, input: Tensor, output_size: Sequence[int] | None) -> tuple[int, ...]:
        if output_size is None:
            return self.output_padding
        sizes = list(output_size)[-self._dims :]
        lead = input.ndim - self._dims
        if len(output_size) not in (self._dims, input.ndim):
            raise ValueError(
                f"ConvTranspose{self._dims}D: for {input.ndim}D input, output_size must have "
                f"{self._dims} or {input.ndim} elements (got {len(output_size)})"
            )
        least = [
            (input.shape[lead + i] - 1) * self.stride[i]
            - 2 * self.padding[i]
            + self.dilation[i] * (self.kernel_size[i] - 1)
            + 1
            for i in range(self._dims)
        ]
        most = [size + step - 1 for size, step in zip(least, self.stride, strict=True)]
        if any(not a <= n <= b for a, n, b in zip(least, sizes, most, strict=True)):
            raise ValueError(
                f"requested an output size of {sizes}, but valid sizes range from {least} to "
                f"{most} (for an input of {Size(input.shape[2:])})"
            )
        return tuple(n - a for n, a in zip(sizes, least, strict=True))


class ConvTranspose1d(_ConvTranspose):
    """Transposed convolution of (N, C, L) or (C, L). Source: torch.nn.ConvTranspose1d."""

    _dims = 1

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        return F.conv_transpose1d(
            input, self.weight, self.bias, self.stride, self.padding,
            self._output_padding(input, output_size), self.groups, self.dilation,
        )  # fmt: skip


class ConvTranspose2d(_ConvTranspose):
    """Transposed convolution of (N, C, H, W) or (C, H, W). Source: torch.nn.ConvTranspose2d."""

    _dims = 2

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        return F.conv_transpose2d(
            input, self.weight, self.bias, self.stride, self.padding,
            self._output_padding(input, output_size), self.groups, self.dilation,
        )  # fmt: skip
