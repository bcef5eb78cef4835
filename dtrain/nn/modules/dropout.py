"""Dropout: random zeros while training, nothing in evaluation.

With the same seed the same elements are dropped as in PyTorch. Source: torch.nn.modules.dropout.
"""

from __future__ import annotations

from dtrain.nn import functional as F
from dtrain.nn.modules.module import Module
from dtrain.tensor import Tensor


class Dropout(Module):
    """Sets each element to 0 with probability `p` and scales the others by 1 / (1 - p).

    ValueError for p outside [0, 1]. Source: torch.nn.Dropout.
    """

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
        self.p = p
        self.inplace = inplace

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(input, self.p, self.training, self.inplace)

    def extra_repr(self) -> str:
        return f"p={self.p}, inplace={self.inplace}"


class Dropout1d(Dropout):
    """Dropout of whole channels of (N, C, L) or (C, L). Source: torch.nn.Dropout1d."""

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout1d(input, self.p, self.training, self.inplace)


class Dropout2d(Dropout):
    """Dropout of whole channels of (N, C, H, W). Source: torch.nn.Dropout2d."""

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout2d(input, self.p, self.training, self.inplace)
