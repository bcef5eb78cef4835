"""Records torch.nn.functional: results and gradients of its functions, and their signatures."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import numpy as np
import torch

from tests.ops.functional_cases import CASES, evaluate
from tests.recorded.registry import recording


@recording
def functional() -> dict[str, np.ndarray]:
    """{expression: the vector of `evaluate`}, in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated options, which are recorded on purpose
        return {case[0]: evaluate(torch, case) for case in CASES}


@recording
def functional_signatures() -> dict[str, Any]:
    """{name: [[parameter, repr of its default or null], ...]}: the functions in Python."""
    found = {}
    for name, function in sorted(vars(torch.nn.functional).items()):
        if name.startswith("_") or not inspect.isfunction(function):
            continue
        parameters = inspect.signature(function).parameters
        if function.__module__ == "torch.nn.functional" and "args" not in parameters:
            found[name] = [
                [p.name, None if p.default is p.empty else repr(p.default)]
                for p in parameters.values()
            ]
    return found
