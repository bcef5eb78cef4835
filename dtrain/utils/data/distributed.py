"""DistributedSampler: every rank reads its own share of a dataset, from where an epoch stopped.

This package knows nothing of communication: how many we are and who I am is asked of
`dtrain.ranks`, which `dtrain.distributed` tells.
Rules: all ranks have one order, and rank r of N takes its places r, r + N, ... So after k samples
on every rank the first k N of the order are used up, whoever used them: that number is all that a
checkpoint has to say for any number of ranks to go on.
Source: torch.utils.data.distributed.DistributedSampler; the state is not in torch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sized
from typing import Any

from dtrain.generator import Generator
from dtrain.ranks import world
from dtrain.utils.data.sampler import Sampler


class DistributedSampler(Sampler[int]):
    """Indices rank, rank + num_replicas, ... of an order that is the same on every rank.

    The order is a permutation by `seed + epoch`, or with shuffle=False the dataset's. All ranks
    get equally many: the first indices are repeated at the end, or with drop_last the last ones
    left out. Call `set_epoch(epoch)` before each epoch, or all have the same order; a second
    shuffled iteration of one epoch warns, once.

    `state_dict()` says how far all ranks together are in the epoch, `load_state_dict` lets the
    next iteration go on there, on as many ranks as there are then: what was used does not come
    again, what was not comes. Repeated or left out is only what makes the rest even.
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
        self._last_order: int | None = None
        self._warned = False
        self._begin_at(0)
        self._resuming = False

    def _begin_at(self, position: int) -> None:
        """Let the iteration start behind the first `position` indices of the order."""
        self._start = position
        self._drawn = 0  # indices given to this rank since
        self._delivered: int | None = None  # how many of them a DataLoader has handed on
        count = self._count() - position
        if self.drop_last and count % self.num_replicas:
            count -= self.num_replicas
        self.num_samples = max(0, math.ceil(count / self.num_replicas))
        self.total_size = self.num_samples * self.num_replicas

    def _count(self) -> int:
        """How many indices an epoch has, over all ranks."""
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        self._begin_at(self._start if self._resuming else 0)
        self._resuming = False
        order = self._order()[self._start :]
        if self.drop_last:
            order = order[: self.total_size]
        elif order:
            repeats = math.ceil(self.total_size / len(order))
            order = (order * repeats)[: self.total_size]
        return self._counted(order[self.rank :: self.num_replicas])

    def _counted(self, share: list[int]) -> Iterator[int]:
        for index in share:
            self._drawn += 1
            yield index

    def _order(self) -> list[int]:
        if not self.shuffle:
            return list(range(self._count()))
        self._warn_of_a_repeated_order()
        generator = Generator()
        generator.manual_seed(self.seed + self.epoch)
        order: list[int] = generator.randperm(self._count()).tolist()
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
        """Make the next iteration's order that of `epoch`.

        After `load_state_dict` the epoch that was loaded goes on; any other begins at its start.
        """
        if epoch != self.epoch:
            self._begin_at(0)
            self._resuming = False
        self.epoch = epoch

    @property
    def drawn(self) -> int:
        """How many indices this rank has been given in the current iteration."""
        return self._drawn

    def set_delivered(self, count: int | None) -> None:
        """Say how many of the `drawn` indices have come to the user; None: all.

        DataLoader does, since its workers read ahead.
        """
        self._delivered = count

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, the same on all ranks when all have made equally many steps.

        `position` counts what has come out on all ranks together: of a DataLoader, the batches
        that the loop has got; of the sampler itself, the indices.
        """
        taken = self._drawn if self._delivered is None else self._delivered
        position = min(self._start + taken * self.num_replicas, self._count())
        return {"epoch": self.epoch, "position": position, **self._identity()}

    def _identity(self) -> dict[str, Any]:
        """What the order depends on besides the epoch."""
        return {"length": self._count(), "shuffle": self.shuffle, "seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the state was taken, with this sampler's own number of ranks.

        ValueError when the order would be another one: a dataset of another length, another seed.
        """
        for name, own in self._identity().items():
            if state_dict[name] != own:
                raise ValueError(
                    f"DistributedSampler: the state is of a sampler with {name}="
                    f"{state_dict[name]}, this one has {name}={own}: indices would be repeated "
                    "or left out"
                )
        self.epoch = state_dict["epoch"]
        self._begin_at(state_dict["position"])
        self._resuming, self._last_order = True, None
