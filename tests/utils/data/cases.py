"""Loaders and samplers that are recorded from PyTorch and repeated by the tests.

Everything is written in the API that both have: the functions are given PyTorch when recording and
dtrain when testing.
"""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import numpy as np

# The text of the loader after `DataLoader(`, on `Draws(torch, 10)`.
MAP_LOADERS = (
    "batch_size=3, shuffle=True, num_workers=2",
    "batch_size=2, shuffle=True, num_workers=3, drop_last=True, prefetch_factor=1",
    "batch_size=None, num_workers=2",
    "batch_size=4, num_workers=2, persistent_workers=True, shuffle=True",
)
# The same on `Shares(torch, 11)`, an iterable dataset.
ITERABLE_LOADERS = (
    "batch_size=3",
    "batch_size=3, drop_last=True",
    "batch_size=None",
    "batch_size=2, num_workers=3, drop_last=True",
    "batch_size=3, num_workers=2, persistent_workers=True",
)
# dataset length, num_replicas, shuffle, drop_last, seed, epoch
SHARES = tuple(product((1, 7, 12), (1, 3, 5), (False, True), (False, True), (3,), (0, 2)))


def datasets(torch: Any) -> tuple[type, type]:
    """The two dataset classes, of PyTorch or of dtrain."""

    class Draws(torch.utils.data.Dataset):
        """Sample i: i, and a number of each random stream, as a worker seeds it."""

        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> tuple[Any, ...]:
            in_worker = torch.utils.data.get_worker_info() is not None
            plain = (random.random(), np.random.rand()) if in_worker else (0.0, 0.0)
            return index, torch.rand(1), *plain

    class Shares(torch.utils.data.IterableDataset):
        """0 to 10; each worker yields every num_workers-th number."""

        def __iter__(self) -> Any:
            info = torch.utils.data.get_worker_info()
            yield from range(0 if info is None else info.id, 11, info.num_workers if info else 1)

    return Draws, Shares


def read(torch: Any, options: str, iterable: bool) -> dict[str, Any]:
    """Two epochs of a loader after manual_seed(5), and the next number of the stream."""
    torch.manual_seed(5)
    dataset = datasets(torch)[iterable]()
    loader = eval(
        f"DataLoader(dataset, {options})",
        {"DataLoader": torch.utils.data.DataLoader, "dataset": dataset},
    )
    epochs = [[plain(batch) for batch in loader] for _ in range(2)]
    return {"epochs": epochs, "next": torch.rand(1).item()}


def plain(batch: Any) -> Any:
    """Tensors in a batch as lists of numbers."""
    if isinstance(batch, (list, tuple)):
        return [plain(part) for part in batch]
    return batch.tolist() if hasattr(batch, "tolist") else batch


def shares(torch: Any, case: tuple[Any, ...]) -> list[list[int]]:
    """The indices of every rank."""
    length, replicas, shuffle, drop_last, seed, epoch = case
    found = []
    for rank in range(replicas):
        sampler = torch.utils.data.DistributedSampler(
            range(length), replicas, rank, shuffle, seed, drop_last
        )
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert len(order) == len(sampler)
        found.append(order)
    return found
