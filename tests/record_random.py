"""Records PyTorch's random stream: every case of draw_cases.py, mixed draws, and states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.draw_cases import CASES, MIXED, SEEDS, WEIGHTS, Draw
from tests.recorded.registry import recording


def _probabilities(n: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(n, dtype=torch.float64) / (n - 1)).to(dtype)


def _weights(rows: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(WEIGHTS[0] if rows == 1 else WEIGHTS[:rows], dtype=dtype)


def _randint(low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(low, high, shape, dtype=dtype)


TORCH: dict[str, Callable[..., torch.Tensor]] = {
    "uniform": lambda shape, dtype, low, high: torch.empty(shape, dtype=dtype).uniform_(low, high),
    "normal": lambda shape, dtype, mean, std: torch.empty(shape, dtype=dtype).normal_(mean, std),
    "exponential": lambda shape, dtype, lambd: torch.empty(shape, dtype=dtype).exponential_(lambd),
    "randint": _randint,
    "random": lambda shape, dtype: torch.empty(shape, dtype=dtype).random_(),
    "randperm": lambda n, dtype: torch.randperm(n, dtype=dtype),
    "bernoulli": lambda p, shape: torch.empty(shape).bernoulli_(p).bool(),
    "bernoulli_each": lambda shape, dtype: torch.bernoulli(_probabilities(*shape, dtype)).bool(),
    "dropout_mask": lambda p, shape: torch.nn.functional.dropout(torch.ones(shape), p).bool(),
    "multinomial": lambda rows, dtype, num_samples, replacement: torch.multinomial(
        _weights(rows, dtype), num_samples, replacement
    ),
}


def drawn(case: Draw) -> torch.Tensor:
    """The case drawn from PyTorch's default generator, cut to what is recorded."""
    arguments: dict[str, Any] = dict(case.arguments)
    if "dtype" in arguments:
        arguments["dtype"] = getattr(torch, arguments["dtype"])
    return TORCH[case.method](**arguments).reshape(-1)[-case.keep :].clone()


@recording
def random_draws() -> dict[str, torch.Tensor]:
    values = {}
    for seed in SEEDS:
        for case in CASES:
            torch.manual_seed(seed)
            values[f"{seed}/{case}"] = drawn(case)
            values[f"{seed}/{case}/next"] = torch.rand(1)
    return values


@recording
def random_mixed() -> dict[str, torch.Tensor]:
    """Keys <seed>/<index of MIXED>, and <seed>/state/<index>: the state before that draw."""
    values = {}
    for seed in SEEDS:
        torch.manual_seed(seed)
        for index, case in enumerate(MIXED):
            values[f"{seed}/state/{index}"] = torch.get_rng_state()
            values[f"{seed}/{index}"] = drawn(case)
    return values
