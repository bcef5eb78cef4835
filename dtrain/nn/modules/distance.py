"""How alike vectors are: CosineSimilarity.

Source: torch.nn.modules.distance.
"""

from __future__ import annotations

from dtrain.nn import functional as F
from dtrain.nn.modules.module import Module
from dtrain.tensor import Tensor


class CosineSimilarity(Module):
    """x1 . x2 / (|x1| |x2|) along `dim`. Source: torch.nn.CosineSimilarity."""

    def __init__(self, dim: int = 1, eps: float = 1e-8) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return F.cosine_similarity(x1, x2, self.dim, self.eps)
