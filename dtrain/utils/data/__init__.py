"""Datasets, samplers and loaders, at torch.utils.data's names and paths.

dataset.py says what there is to read, sampler.py and distributed.py in which order, collate.py how
samples become a batch; fetch.py reads one batch, dataloader.py is the loop, and workers.py the same
in other processes, which are worker.py.
"""

from __future__ import annotations

from dtrain.utils.data.collate import (
    default_collate as default_collate,
    default_convert as default_convert,
)
from dtrain.utils.data.dataloader import DataLoader as DataLoader
from dtrain.utils.data.dataset import (
    ChainDataset as ChainDataset,
    ConcatDataset as ConcatDataset,
    Dataset as Dataset,
    IterableDataset as IterableDataset,
    StackDataset as StackDataset,
    Subset as Subset,
    TensorDataset as TensorDataset,
    random_split as random_split,
)
from dtrain.utils.data.distributed import DistributedSampler as DistributedSampler
from dtrain.utils.data.fetch import get_worker_info as get_worker_info
from dtrain.utils.data.sampler import (
    BatchSampler as BatchSampler,
    RandomSampler as RandomSampler,
    Sampler as Sampler,
    SequentialSampler as SequentialSampler,
    SubsetRandomSampler as SubsetRandomSampler,
    WeightedRandomSampler as WeightedRandomSampler,
)
