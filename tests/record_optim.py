"""Records what PyTorch's optimizers do: parameters and state after the runs of optim/cases.py."""

from __future__ import annotations

import torch

from tests.optim.cases import CASES, DTYPES, run
from tests.recorded.registry import recording


@recording
def optimizers() -> dict[str, torch.Tensor]:
    values = {}
    for case in CASES:
        for dtype in DTYPES:
            optimizer, params = run(torch, case, dtype)
            for index, param in enumerate(params):
                values[f"{case}/{dtype}/{index}"] = param.detach()
            for index, state in optimizer.state_dict()["state"].items():
                for name, value in state.items():
                    values[f"{case}/{dtype}/{index}/{name}"] = value
    return values


@recording
def optimizer_groups() -> dict[str, object]:
    """`param_groups` of a new optimizer's state_dict, with and without names."""
    found = {}
    for case in CASES:
        weight, bias = torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)
        for params in ([weight, bias], [("weight", weight), ("bias", bias)]):
            optimizer = eval(f"torch.optim.{case}", {"torch": torch, "params": params})
            found[f"{case}/{type(params[0]) is tuple}"] = optimizer.state_dict()["param_groups"]
    return found
