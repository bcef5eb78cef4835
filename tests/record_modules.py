"""Records what PyTorch draws when it initialises modules, shuffles data and runs nn.init."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    random_split,
)

from tests.draw_cases import SEEDS
from tests.recorded.registry import recording

# Written as the expression that follows "nn.": tests evaluate the same text with dtrain's nn.
MODULES = (
    "Linear(4, 3)",
    "Linear(4, 3, bias=False)",
    "Bilinear(2, 3, 4)",
    "Embedding(7, 5)",
    "Embedding(7, 5, padding_idx=2)",
    "LayerNorm(5)",
    "GroupNorm(2, 4)",
    "BatchNorm1d(3)",
    "BatchNorm2d(3)",
    "Conv1d(3, 4, 3)",
    "Conv2d(3, 4, 3)",
    "Conv2d(4, 4, (2, 3), groups=2, bias=False)",
    "ConvTranspose2d(3, 2, 3)",
    "PReLU(3)",
    "MultiheadAttention(8, 2)",
    "MultiheadAttention(8, 2, bias=False, batch_first=True)",
    "MultiheadAttention(8, 2, kdim=5, vdim=6, add_bias_kv=True)",
    "RNN(3, 4)",
    "LSTM(3, 4, num_layers=2)",
    "LSTM(3, 4, bidirectional=True, bias=False)",
    "LSTM(3, 5, proj_size=2)",
    "GRU(3, 4)",
    "LSTMCell(3, 4)",
    "GRUCell(3, 4)",
    "TransformerEncoderLayer(8, 2, 16)",
    "TransformerDecoderLayer(8, 2, 16)",
    "Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))",
)

# The text between "nn.init." and the tensor's closing parenthesis.
INIT = (
    "uniform_(w)",
    "uniform_(w, -0.3, 0.7)",
    "normal_(w)",
    "normal_(w, 0.1, 0.02)",
    "trunc_normal_(w)",
    "trunc_normal_(w, 0.1, 0.02, 0.08, 0.15)",
    "xavier_uniform_(w)",
    "xavier_uniform_(w, gain=2.0)",
    "xavier_normal_(w)",
    "kaiming_uniform_(w)",
    "kaiming_uniform_(w, a=5**0.5)",
    "kaiming_normal_(w)",
    "kaiming_normal_(w, mode='fan_out', nonlinearity='relu')",
    "orthogonal_(w)",
)
SHAPES = ((6, 5), (4, 3, 2, 2))


@recording
def modules() -> dict[str, torch.Tensor]:
    """Keys <seed>/<expression>/<state_dict key>, and <seed>/<expression>/#next: the next rand."""
    values = {}
    for seed in SEEDS:
        for expression in MODULES:
            torch.manual_seed(seed)
            module = eval(f"nn.{expression}", {"nn": nn})
            for key, value in module.state_dict().items():
                values[f"{seed}/{expression}/{key}"] = value
            values[f"{seed}/{expression}/#next"] = torch.rand(1)
    return values


@recording
def init_functions() -> dict[str, torch.Tensor]:
    """Keys <seed>/<call>/<shape as 6x5>: what the call leaves in a float32 tensor w."""
    values = {}
    for seed in SEEDS:
        for call in INIT:
            for shape in SHAPES:
                torch.manual_seed(seed)
                w = torch.zeros(shape)
                eval(f"nn.init.{call}", {"nn": nn, "w": w})
                values[f"{seed}/{call}/{'x'.join(map(str, shape))}"] = w
    return values


def _epochs(loader: Iterable[Any]) -> list[Any]:
    """Two passes over a loader of single numbers: a list of batches for each."""
    return [[batch.tolist() for batch in loader] for _ in range(2)]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


DATA = list(range(10))
ORDERS: dict[str, Callable[[int], Any]] = {
    "RandomSampler(data)": lambda s: list(RandomSampler(DATA)),
    "RandomSampler(data, generator=g)": lambda s: list(
        RandomSampler(DATA, generator=_generator(s + 1))
    ),
    "RandomSampler(data, num_samples=23)": lambda s: list(RandomSampler(DATA, num_samples=23)),
    "RandomSampler(data, replacement=True, num_samples=70)": lambda s: list(
        RandomSampler(DATA, replacement=True, num_samples=70)
    ),
    "SubsetRandomSampler([3, 1, 4, 5, 9])": lambda s: list(SubsetRandomSampler([3, 1, 4, 5, 9])),
    "WeightedRandomSampler(range(1, 6), 12)": lambda s: list(
        WeightedRandomSampler(range(1, 6), 12)
    ),
    "WeightedRandomSampler(range(1, 6), 4, replacement=False)": lambda s: list(
        WeightedRandomSampler(range(1, 6), 4, replacement=False)
    ),
    "DataLoader(data, batch_size=3, shuffle=True)": lambda s: _epochs(
        DataLoader(DATA, batch_size=3, shuffle=True)
    ),
    "DataLoader(data, batch_size=3, shuffle=True, drop_last=True, generator=g)": lambda s: _epochs(
        DataLoader(DATA, batch_size=3, shuffle=True, drop_last=True, generator=_generator(s + 1))
    ),
    "DataLoader(data, batch_size=4)": lambda s: _epochs(DataLoader(DATA, batch_size=4)),
    "random_split(data, [7, 3])": lambda s: [p.indices for p in random_split(DATA, [7, 3])],
    "random_split(data, [0.5, 0.25, 0.25])": lambda s: [
        p.indices for p in random_split(DATA, [0.5, 0.25, 0.25])
    ],
    "DistributedSampler(data, 3, rank, seed=s % 1000), epoch 2": lambda s: [
        _distributed(rank, s % 1000) for rank in range(3)
    ],
}


def _distributed(rank: int, seed: int) -> list[int]:
    sampler = DistributedSampler(DATA, 3, rank, seed=seed)
    sampler.set_epoch(2)
    return list(sampler)


@recording
def data_orders() -> dict[str, Any]:
    """{seed: {expression: {"order": ..., "next": the next torch.rand(1) as a number}}}."""
    values: dict[str, Any] = {}
    for seed in SEEDS:
        values[str(seed)] = {}
        for expression, order in ORDERS.items():
            torch.manual_seed(seed)
            drawn = order(seed)
            values[str(seed)][expression] = {"order": drawn, "next": torch.rand(1).item()}
    return values
