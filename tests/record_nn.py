"""Records what PyTorch's modules compute, print, raise and do in which order."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tests.nn.cases import ERRORS, REPRS, VALUES
from tests.nn.scenarios import SCENARIOS
from tests.nn.values import computed
from tests.recorded.registry import recording

NAMES = {"torch": torch, "nn": nn, "F": F}


@recording
def module_values() -> dict[str, torch.Tensor]:
    """Keys <expression>/<what>: see tests/nn/values.py."""
    values = {}
    for expression, inputs in VALUES.items():
        for key, value in computed(torch, expression, inputs).items():
            values[f"{expression}/{key}"] = value
    return values


@recording
def module_texts() -> dict[str, Any]:
    """{"repr": {expression: text}, "error": {statement: [class, text]}}."""
    return {
        "repr": {expression: repr(eval(f"nn.{expression}", NAMES)) for expression in REPRS},
        "error": {statement: _error_of(statement) for statement in ERRORS},
    }


def _error_of(statement: str) -> list[str]:
    try:
        exec(statement, dict(NAMES))
    except Exception as error:
        return [type(error).__name__, str(error)]
    raise AssertionError(f"PyTorch does not refuse: {statement}")


@recording
def module_scenarios() -> dict[str, Any]:
    """{name of a scenario: what it returned}."""
    torch.manual_seed(0)
    return {name: function(torch) for name, function in SCENARIOS.items()}


@recording
def module_signatures() -> dict[str, Any]:
    """{class: {"home": its module, "__init__": ..., "forward": ...: [[parameter, default]]}}."""
    classes = {
        name: kind
        for name, kind in vars(nn).items()
        if isinstance(kind, type) and issubclass(kind, nn.Module)
    }
    return {
        name: {"home": kind.__module__, "__init__": _parameters(kind), "forward": _forward(kind)}
        for name, kind in classes.items()
    }


def _parameters(kind: type) -> list[list[Any]]:
    return [
        [name, None if parameter.default is inspect.Parameter.empty else repr(parameter.default)]
        for name, parameter in inspect.signature(kind).parameters.items()
        if parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    ]


def _forward(kind: type) -> list[str]:
    return list(inspect.signature(kind.forward).parameters)
