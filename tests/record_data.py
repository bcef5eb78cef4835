"""Records what PyTorch's loaders with workers give, and the shares of DistributedSampler."""

from __future__ import annotations

import warnings

import torch
import torch.utils.data

from tests.recorded.registry import recording
from tests.utils.data.cases import ITERABLE_LOADERS, MAP_LOADERS, SHARES, read, shares


@recording
def data_loaders() -> dict[str, object]:
    warnings.filterwarnings("ignore", "This DataLoader will create")
    found = {options: read(torch, options, iterable=False) for options in MAP_LOADERS}
    found |= {
        f"iterable, {options}": read(torch, options, iterable=True) for options in ITERABLE_LOADERS
    }
    return found


@recording
def distributed_shares() -> dict[str, object]:
    return {str(case): shares(torch, case) for case in SHARES}
