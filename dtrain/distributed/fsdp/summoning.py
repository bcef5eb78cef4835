"""Whole parameters for a while, outside of forward: to look at, to save, to initialise.

Rule: they are copies of each rank, although ranks of one host share the parameters they compute
with: all ranks may change them in place, each its own, and do not meet in that memory.
Source: torch.distributed.fsdp, summon_full_params.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dtrain.autograd.node import make
from dtrain.distributed.fsdp.state import ModuleState
from dtrain.distributed.fsdp.unit import Unit
from dtrain.distributed.fsdp.wrapped_state import is_first
from dtrain.nn.parameter import Parameter


@contextlib.contextmanager
def summoned(
    states: Sequence[ModuleState], writeback: bool, rank0_only: bool, with_grads: bool
) -> Iterator[None]:
    """A block in which the units of `states` are whole, in copies; all ranks enter it.

    NotImplementedError for `writeback` with `rank0_only`; RuntimeError inside another such block.
    """
    if writeback and rank0_only:
        raise NotImplementedError(
            "writeback=True and rank0_only=True is not supported: only the first rank would change "
            "its part"
        )
    if any(state.summoned for state in states):
        raise RuntimeError("summon_full_params: these parameters are already whole")
    units = [unit for state in states for unit in state.units]
    whole: list[tuple[Unit, list[Any]]] = []
    shown = not rank0_only or not states or is_first(states[0])
    for unit in units:
        copies = [_copy(sharded, with_grads) for sharded in unit.sharded]
        if shown:
            unit.put(copies)
            whole.append((unit, copies))
    for state in states:
        state.summoned = True
    try:
        yield
    finally:
        for state in states:
            state.summoned = False
        for unit, copies in whole:
            unit.show_sharded()
            if writeback:
                _write_back(unit, copies)


def _copy(sharded: Any, with_grad: bool) -> Any:
    whole = Parameter(make(_whole(sharded)), requires_grad=sharded.requires_grad)
    if with_grad and sharded._grad is not None:
        whole.grad = make(_whole(sharded.grad))
    return whole


def _whole(tensor: Any) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = tensor.detach().full_tensor()._data
    return found.copy() if np.may_share_memory(found, tensor._data) else found


def _write_back(unit: Unit, copies: Sequence[Any]) -> None:
    unit.await_readers()
    for sharded, whole in zip(unit.sharded, copies, strict=True):
        np.copyto(sharded._data, sharded._cut(whole._data, "summon_full_params"))
        sharded._bump_version()
        if whole._grad is not None and sharded._grad is not None:
            np.copyto(sharded._grad._data, sharded._cut(whole._grad._data, "summon_full_params"))
