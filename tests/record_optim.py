"""Records PyTorch's optimizers and schedules: the runs of optim/cases.py and schedules.py."""

from __future__ import annotations

import torch

from tests.optim.cases import CASES, DTYPES, run
from tests.optim.schedules import SCHEDULES, build, optimizer, run as run_schedule
from tests.recorded.registry import recording


@recording
def optimizers() -> dict[str, torch.Tensor]:
    values = {}
    for case in CASES:
        for dtype in DTYPES:
            made, params = run(torch, case, dtype)
            for index, param in enumerate(params):
                values[f"{case}/{dtype}/{index}"] = param.detach()
            for index, state in made.state_dict()["state"].items():
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
            made = eval(f"torch.optim.{case}", {"torch": torch, "params": params})
            found[f"{case}/{type(params[0]) is tuple}"] = made.state_dict()["param_groups"]
    return found


@recording
def schedules() -> dict[str, object]:
    """`rates`: before each step and after the last; `keys` of the state_dict after them."""
    found = {}
    for schedule in SCHEDULES:
        scheduler = build(torch, schedule, optimizer(torch))
        rates = run_schedule(scheduler)
        found[schedule] = {"rates": rates, "keys": sorted(scheduler.state_dict())}
    return found
