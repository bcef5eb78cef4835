"""Windows as columns, and back: Unfold and Fold.

Source: torch.nn.modules.fold.
"""

from __future__ import annotations

from collections.abc import Sequence

from dtrain.nn import functional as F
from dtrain.nn.modules.module import Module
from dtrain.tensor import Tensor

Sizes = int | Sequence[int]


class _Windows(Module):
    """The windows that Unfold takes apart and Fold adds up."""

    def __init__(
        self, kernel_size: Sizes, dilation: Sizes = 1, padding: Sizes = 0, stride: Sizes = 1
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.padding = padding
        self.stride = stride

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, dilation={self.dilation}, "
            f"padding={self.padding}, stride={self.stride}"
        )


class Unfold(_Windows):
    """(N, C, H, W) to (N, C * window, windows). Source: torch.nn.Unfold."""

    def forward(self, input: Tensor) -> Tensor:
        return F.unfold(input, self.kernel_size, self.dilation, self.padding, self.stride)


class Fold(_Windows):
    """(N, C * window, windows) to (N, C, *output_size), windows added. Source: torch.nn.Fold."""

    def __init__(
        self,
        output_size: Sizes,
        kernel_size: Sizes,
        dilation: Sizes = 1,
        padding: Sizes = 0,
        stride: Sizes = 1,
    ) -> None:
        super().__init__(kernel_size, dilation, padding, stride)
        self.output_size = output_size

    def forward(self, input: Tensor) -> Tensor:
        return F.fold(
            input, self.output_size, self.kernel_size, self.dilation, self.padding, self.stride
        )

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}, {super().extra_repr()}"
