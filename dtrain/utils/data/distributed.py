"""DistributedSampler: every rank reads its own share of a dataset.

This package knows nothing of communication: how many we are and who I am is asked of
`dtrain.ranks`, which `dtrain.distributed` tells.
Source: torch.utils.data.distributed.DistributedSampler.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sized

from dtrain.generator import Generator
from dtrain.ranks import world
from dtrain.utils.data.sampler import Sampler


class DistributedSampler(Sampler[int]):
    """Indices rank, rank + num_replicas, ... of an order that is the same on every rank.

    The order is a permutation by `seed + epoch`, or with shuffle=False the dataset's. All ranks
    get equally many: the first indices are repeated at the end, or with drop_last the last ones
    left out. Call `set_epoch(epoch)` before each epoch, or all have the same order; a second
    shuffled iteration of one epoch warns, once.
    """

    def __init__(
        self,
        dataset: Sized,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        if num_replicas is None or rank is None:
            size, own = world()
            num_replicas = size if num_replicas is None else num_replicas
            rank = own if rank is None else rank
        if not 0 <= rank < num_replicas:
            raise ValueError(
                f"Invalid rank {rank}, rank should be in the interval [0, {num_replicas - 1}]"
            )
        self.dataset = dataset
        self.num_replicas, self.rank = num_replicas, rank
        self.epoch = 0
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        count = len(dataset)
        if drop_last and count % num_replicas:
            count -= num_replicas
        self.num_samples = math.ceil(count / num_replicas)
        self.total_size = self.num_samples * num_replicas
        self._last_order: int | None = None
        self._warned = False

    def __iter__(self) -> Iterator[int]:
        order = self._order()
        if self.drop_last:
            order = order[: self.total_size]
        elif order:
            repeats = math.ceil(self.total_size / len(order))
            order = (order * repeats)[: self.total_size]
        return iter(order[self.rank :: self.num_replicas])

    def _order(self) -> list[int]:
        if not self.shuffle:
            return list(range(len(self.dataset)))
        self._warn_of_a_repeated_order()
        generator = Generator()
        generator.manual_seed(self.seed + self.epoch)
        order: list[int] = generator.randperm(len(self.dataset)).tolist()
        return order

    def _warn_of_a_repeated_order(self) -> None:
        if self.epoch == self._last_order and not self._warned:
            self._warned = True
            warnings.warn(
                f"DistributedSampler gives the order of epoch {self.epoch} again: call "
                "set_epoch(epoch) before each epoch to shuffle anew",
                stacklevel=4,
            )
        self._last_order = self.epoch

    def __len__(self) -> int:
        return self.num_samples

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration's order that of `epoch`."""
        self.epoch = epoch
