"""More or fewer pixels: Upsample.

Source: torch.nn.modules.upsampling.
"""

from __future__ import annotations

from typing import Any

from dtrain.nn import functional as F
from dtrain.nn.modules.module import Module
from dtrain.tensor import Tensor


class Upsample(Module):
    """`interpolate` to a `size` or by a `scale_factor`. Source: torch.nn.Upsample."""

    def __init__(
        self,
        size: Any = None,
        scale_factor: Any = None,
        mode: str = "nearest",
        align_corners: bool | None = None,
        recompute_scale_factor: bool | None = None,
    ) -> None:
        super().__init__()
        self.size = size
        if isinstance(scale_factor, tuple):
            self.scale_factor: Any = tuple(float(factor) for factor in scale_factor)
        else:
            self.scale_factor = float(scale_factor) if scale_factor else None
        self.mode = mode
        self.align_corners = align_corners
        self.recompute_scale_factor = recompute_scale_factor

    def forward(self, input: Tensor) -> Tensor:
        return F.interpolate(
            input, self.size, self.scale_factor, self.mode, self.align_corners,
            recompute_scale_factor=self.recompute_scale_factor,
        )  # fmt: skip

    def extra_repr(self) -> str:
        by = f"size={self.size!r}"
        if self.scale_factor is not None:
            by = f"scale_factor={self.scale_factor!r}"
        return f"{by}, mode={self.mode!r}"
