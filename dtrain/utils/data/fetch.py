"""One batch (or sample) from a dataset: what a loader does for each turn of the loop.

The same code runs in the loop itself and in worker processes; `get_worker_info` tells which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from dtrain.utils.data.dataset import IterableDataset


@dataclass
class WorkerInfo:
    """Which worker this process is: `id` of `num_workers`, its `seed` and its `dataset`."""

    id: int
    num_workers: int
    seed: int
    dataset: Any


_worker: WorkerInfo | None = None


def get_worker_info() -> WorkerInfo | None:
    """In a worker process of a DataLoader who it is, None elsewhere."""
    return _worker


def set_worker_info(info: WorkerInfo) -> None:
    """Called once, by the worker process itself."""
    global _worker
    _worker = info


class Fetcher:
    """Reads what an index sampler asks for: a list of indices, or one index when not batched.

    For iterable datasets only the length of the list counts. StopIteration when they are through,
    also when the last batch is short and to be dropped.
    """

    def __init__(
        self, dataset: Any, collate: Callable[[Any], Any], batched: bool, drop_last: bool
    ) -> None:
        self.dataset, self.collate = dataset, collate
        self.batched, self.drop_last = batched, drop_last
        self.stream: Iterator[Any] | None = None
        if isinstance(dataset, IterableDataset):
            self.stream = iter(dataset)

    def __call__(self, index: Any) -> Any:
        """The collated batch, or the converted sample, of `index`."""
        if self.stream is not None:
            return self.collate(self._read(self.stream, index))
        if not self.batched:
            return self.collate(self.dataset[index])
        if callable(getattr(self.dataset, "__getitems__", None)):
            return self.collate(self.dataset.__getitems__(index))
        return self.collate([self.dataset[i] for i in index])

    def _read(self, stream: Iterator[Any], index: Any) -> Any:
        if not self.batched:
            return next(stream)
        samples = list(islice(stream, len(index)))
        if not samples or (self.drop_last and len(samples) < len(index)):
            raise StopIteration
        return samples
