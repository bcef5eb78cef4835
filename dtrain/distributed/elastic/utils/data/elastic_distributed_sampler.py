"""ElasticDistributedSampler: shares of the part of a dataset from one index on.

Rules: the order is a permutation of that part by the epoch alone, as in torch. A program that wants
to go on inside of a shuffled epoch uses `DistributedSampler.state_dict`: a start index of the
dataset cannot say which samples of a permutation were used.
Source: torch.distributed.elastic.utils.data.ElasticDistributedSampler.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from dtrain.utils.data.distributed import DistributedSampler


class ElasticDistributedSampler(DistributedSampler):
    """`DistributedSampler` over the indices `start_index` and up, always shuffled."""

    def __init__(
        self,
        dataset: Any,
        num_replicas: int | None = None,
        rank: int | None = None,
        start_index: int = 0,
    ) -> None:
        if not isinstance(dataset, Sized):
            raise TypeError("Dataset must be an instance of collections.abc.Sized")
        if start_index >= len(dataset):
            raise ValueError(
                f"Start index {start_index} should be less than dataset size {len(dataset)}"
            )
        self.start_index = start_index
        super().__init__(dataset, num_replicas, rank)

    def _count(self) -> int:
        return len(self.dataset) - self.start_index

    def _order(self) -> list[int]:
        return [index + self.start_index for index in super()._order()]

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "start_index": self.start_index}
