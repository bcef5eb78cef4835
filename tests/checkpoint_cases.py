"""Objects saved by PyTorch (recorded as files) and by dtrain: made alike of either package."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

CASES: dict[str, Callable[[Any], Any]] = {}


def case(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    CASES[function.__name__] = function
    return function


@case
def plain_data(torch):
    return {
        "numbers": [0, 255, 65536, -1, 2**40, 2**70, -(2**70), 1.5, 2 + 3j],
        "nothing": [None, True, False, (), [], {}, set()],
        "text": ["", "a", "\u00e4\u4e2d", "x" * 300],
        "tuples": ((1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "nested": OrderedDict(a={"b": [{"c": (1, [2])}]}),
        "set": {7},
        "bytes": [b"\x00\xff", bytearray(b"\x01\xfe")],
    }


@case
def every_dtype(torch):
    names = "float32 float64 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64"
    values = {name: torch.tensor([0, 1, 1]).to(getattr(torch, name)) for name in names.split()}
    values["uint32"] = torch.tensor([1, 2], dtype=torch.uint32)
    return values


@case
def views(torch):
    whole = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    return {
        "whole": whole,
        "part": whole[1, 1:, ::2],
        "transposed": whole.transpose(0, 2),
        "number": torch.tensor(5.0),
        "empty": torch.zeros(0),
        "again": whole,
    }


@case
def parameters(torch):
    w = torch.nn.Parameter(torch.ones(2, 2))
    return {
        "w": w,
        "tied": w,
        "frozen": torch.nn.Parameter(torch.zeros(1), requires_grad=False),
        "needs grad": torch.ones(1, requires_grad=True),
    }


@case
def names(torch):
    return {
        "dtypes": [torch.float32, torch.int64, torch.bool],
        "size": torch.ones(2, 3).shape,
        "device": torch.device("cpu", 0),
    }


@case
def state_dict(torch):
    torch.manual_seed(4)
    nn = torch.nn
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).state_dict()


@case
def whole_module(torch):
    torch.manual_seed(5)
    nn = torch.nn
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.LayerNorm(3), nn.Dropout(0.1))
