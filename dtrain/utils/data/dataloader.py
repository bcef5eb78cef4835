"""DataLoader: iterates over batches of a dataset, in this process or in worker processes.

Orders, and what an iteration takes from the random stream, are PyTorch's: one base seed first, then
what the sampler draws. Source: torch.utils.data.DataLoader.
"""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Any, Generic, TypeVar

from dtrain.generator import Generator
from dtrain.utils.data.collate import default_collate, default_convert
from dtrain.utils.data.dataset import IterableDataset
from dtrain.utils.data.distributed import DistributedSampler
from dtrain.utils.data.fetch import Fetcher
from dtrain.utils.data.sampler import (
    BatchSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    draw_seed,
)
from dtrain.utils.data.worker import Job
from dtrain.utils.data.workers import Workers

T = TypeVar("T", covariant=True)

FIXED = ("batch_size", "batch_sampler", "sampler", "drop_last", "dataset", "persistent_workers")


class DataLoader(Generic[T]):
    """Batches of `dataset`, collated.

    `batch_size` None gives single samples. `sampler` or `batch_sampler` replace the order that
    `shuffle` chooses. `num_workers` > 0 reads in that many processes (see workers.py), in the same
    order; `timeout` is how many seconds one batch may take them, 0 as long as they live;
    `persistent_workers` keeps them from one iteration to the next. Accepted and without effect:
    `pin_memory` and `pin_memory_device` (there is no other device), `multiprocessing_context`
    (workers are always fresh interpreters) and `in_order` (batches always come in order).
    A `DistributedSampler` is told which batches the loop has got, so that its state leaves out
    what workers have read ahead.
    """

    _complete = False

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        sampler: Any = None,
        batch_sampler: Any = None,
        num_workers: int = 0,
        collate_fn: Callable[[Any], Any] | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
        generator: Generator | None = None,
        *,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        pin_memory_device: str = "",
        in_order: bool = True,
    ) -> None:
        _require_worker_options(num_workers, timeout, prefetch_factor, persistent_workers)
        self.dataset = dataset
        self.num_workers = num_workers
        self.prefetch_factor = 2 if num_workers and prefetch_factor is None else prefetch_factor
        self.pin_memory, self.pin_memory_device = pin_memory, pin_memory_device
        self.timeout = timeout
        self.worker_init_fn = worker_init_fn
        self.multiprocessing_context = multiprocessing_context
        self.generator = generator
        self.in_order = in_order
        self.persistent_workers = persistent_workers
        if isinstance(dataset, IterableDataset):
            _require_no_order(shuffle=shuffle, sampler=sampler, batch_sampler=batch_sampler)
        if sampler is not None and shuffle:
            raise ValueError("sampler option is mutually exclusive with shuffle")
        if batch_sampler is not None:
            if batch_size != 1 or shuffle or sampler is not None or drop_last:
                raise ValueError(
                    "batch_sampler option is mutually exclusive with batch_size, shuffle, "
                    "sampler, and drop_last"
                )
            batch_size = None
        elif batch_size is None and drop_last:
            raise ValueError(
                "batch_size=None option disables auto-batching and is mutually exclusive with "
                "drop_last"
            )
        self.sampler = self._default_sampler(bool(shuffle)) if sampler is None else sampler
        if batch_size is not None:
            batch_sampler = BatchSampler(self.sampler, batch_size, drop_last)
        self.batch_size, self.batch_sampler, self.drop_last = batch_size, batch_sampler, drop_last
        self.collate_fn = collate_fn or (default_collate if self._batched else default_convert)
        self._workers: Workers | None = None  # the persistent ones
        self._complete = True

    def _default_sampler(self, shuffle: bool) -> Sampler[Any]:
        if isinstance(self.dataset, IterableDataset):
            return _NoIndices()
        if shuffle:
            return RandomSampler(self.dataset, generator=self.generator)
        return SequentialSampler(self.dataset)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._complete and name in FIXED:
            raise ValueError(
                f"{name} attribute should not be set after {type(self).__name__} is initialized"
            )
        super().__setattr__(name, value)

    @property
    def _index_sampler(self) -> Any:
        return self.sampler if self.batch_sampler is None else self.batch_sampler

    def __len__(self) -> int:
        """How many batches; TypeError when the dataset or the sampler has no length."""
        if not isinstance(self.dataset, IterableDataset):
            return len(self._index_sampler)
        count = len(self.dataset)  # type: ignore[arg-type]
        if self.batch_size is None:
            return count
        return (count if self.drop_last else count + self.batch_size - 1) // self.batch_size

    def __iter__(self) -> Iterator[T]:
        indices = iter(self._index_sampler)
        sampler = getattr(self._index_sampler, "sampler", self._index_sampler)
        if not isinstance(sampler, DistributedSampler):
            return self._batches(indices)
        sizes: deque[int] = deque()
        return _delivered(self._batches(_noted(indices, sampler, sizes)), sampler, sizes)

    def _batches(self, indices: Iterator[Any]) -> Iterator[T]:
        if self._workers is not None:
            return self._workers.iterate(indices)
        base_seed = draw_seed(self.generator)  # drawn without workers too: the stream is torch's
        if self.num_workers == 0:
            return self._read(indices, self._fetcher())
        workers = self._start_workers(base_seed)
        if self.persistent_workers:
            self._workers = workers
        return workers.iterate(indices)

    def _read(self, indices: Iterator[Any], fetch: Fetcher) -> Iterator[T]:
        while True:
            try:
                batch = fetch(next(indices))
            except StopIteration:
                return
            yield batch

    @property
    def _batched(self) -> bool:
        return self.batch_sampler is not None

    def _fetcher(self) -> Fetcher:
        return Fetcher(self.dataset, self.collate_fn, self._batched, self.drop_last)

    def _start_workers(self, base_seed: int) -> Workers:
        cores = len(os.sched_getaffinity(0))
        if self.num_workers > cores:
            warnings.warn(
                f"This DataLoader will create {self.num_workers} worker processes in total. Our "
                f"suggested max number of worker in current system is {cores}, which is smaller "
                "than what this DataLoader is going to create.",
                stacklevel=3,
            )
        job = Job(
            dataset=self.dataset,
            collate=self.collate_fn,
            batched=self._batched,
            drop_last=self.drop_last,
            init=self.worker_init_fn,
            base_seed=base_seed,
            count=self.num_workers,
        )
        return Workers(
            job,
            prefetch=self.prefetch_factor or 0,
            timeout=self.timeout,
            persistent=self.persistent_workers,
        )


def _noted(indices: Iterator[Any], sampler: DistributedSampler, sizes: deque[int]) -> Iterator[Any]:
    """`indices`, noting how many of the sampler's each takes: workers read ahead of the loop."""
    before = 0
    for index in indices:
        if not before:
            sampler.set_delivered(0)
        sizes.append(sampler.drawn - before)
        before = sampler.drawn
        yield index


def _delivered(batches: Iterator[T], sampler: DistributedSampler, sizes: deque[int]) -> Iterator[T]:
    """`batches`, telling the sampler of each that the loop gets; at the end all is used."""
    count = 0
    for batch in batches:
        count += sizes.popleft()
        sampler.set_delivered(count)
        yield batch
    sampler.set_delivered(None)


class _NoIndices(Sampler[None]):
    """What stands for indices of an iterable dataset: it knows itself what comes next."""

    def __iter__(self) -> Iterator[None]:
        return repeat(None)


def _require_worker_options(
    num_workers: int, timeout: float, prefetch_factor: int | None, persistent_workers: bool
) -> None:
    if num_workers < 0:
        raise ValueError(
            "num_workers option should be non-negative; use num_workers=0 to disable "
            "multiprocessing."
        )
    if timeout < 0:
        raise ValueError("timeout option should be non-negative")
    if num_workers == 0:
        for name, given in (
            ("timeout", timeout != 0),
            ("prefetch_factor", prefetch_factor is not None),
            ("persistent_workers", persistent_workers),
        ):
            if given:
                raise ValueError(
                    f"{name} option could only be specified in multiprocessing: {name} needs "
                    "num_workers > 0"
                )
    elif prefetch_factor is not None and prefetch_factor <= 0:
        raise ValueError("prefetch_factor option should be positive")


def _require_no_order(**options: Any) -> None:
    for name, value in options.items():
        if value is not None and value is not False:
            raise ValueError(
                f"DataLoader with IterableDataset: expected unspecified {name} option, but got "
                f"{name}={value}"
            )
