"""Hooks that reduce the gradients of a sharded model as they are, or rounded to 16 bits.

They divide by the number of ranks in two steps, before and after the sum, so that neither large
nor small values leave the range of 16 bits. Source:
torch.distributed.algorithms._comm_hooks.default_hooks.
"""

from __future__ import annotations

import numpy as np

from dtrain import dtypes
from dtrain.distributed.collectives import all_reduce, reduce_scatter_single
from dtrain.distributed.world import ProcessGroup
from dtrain.tensor import Tensor


class DefaultState:
    """The group, and by what gradients are divided before the sum and behind it.

    ValueError without a group.
    """

    __slots__ = (
        "gradient_postdivide_factor",
        "gradient_predivide_factor",
        "process_group",
        "world_size",
    )

    def __init__(self, process_group: ProcessGroup) -> None:
        if process_group is None:
            raise ValueError(f"Expected to pass in an explicit ProcessGroup to {self}.")
        self.process_group = process_group
        self.world_size = process_group.size()
        self.gradient_predivide_factor = self._get_gradient_predivide_factor(self.world_size)
        self.gradient_postdivide_factor = self.world_size / self.gradient_predivide_factor

    @staticmethod
    def _get_gradient_predivide_factor(world_size: int) -> float:
        """The power of two about the root of the number of ranks, if that is divisible by it."""
        factor = 1
        while world_size % factor == 0 and world_size / factor > factor:
            factor *= 2
        return float(factor)


class LowPrecisionState(DefaultState):
    """With `parameter_type`, the dtype of gradients when they have been reduced."""

    __slots__ = ("parameter_type",)

    def __init__(
        self, process_group: ProcessGroup, parameter_type: dtypes.dtype = dtypes.float32
    ) -> None:
        super().__init__(process_group)
        self.parameter_type = parameter_type


def allreduce_hook(state: DefaultState, grad: Tensor) -> None:
    """The mean of `grad` over the ranks, in place: for NO_SHARD. Blocks for one all-reduce."""
    if state.gradient_predivide_factor > 1:
        grad.div_(state.gradient_predivide_factor)  # type: ignore[attr-defined]
    all_reduce(grad, group=state.process_group)
    if state.gradient_postdivide_factor > 1:
        grad.div_(state.gradient_postdivide_factor)  # type: ignore[attr-defined]


def reduce_scatter_hook(state: DefaultState, grad: Tensor, output: Tensor) -> None:
    """This rank's part of the mean of `grad` into `output`. Blocks for one reduce-scatter."""
    if state.gradient_predivide_factor > 1:
        grad.div_(state.gradient_predivide_factor)  # type: ignore[attr-defined]
    reduce_scatter_single(output, grad, group=state.process_group)
    if state.gradient_postdivide_factor > 1:
        output.div_(state.gradient_postdivide_factor)  # type: ignore[attr-defined]


def _low_precision(
    dtype: dtypes.dtype, state: LowPrecisionState, grad: Tensor, output: Tensor | None
) -> None:
    reduced = grad if output is None else output
    with np.errstate(over="ignore", invalid="ignore"):  # inf is a value, and seen in the result
        for tensor in (grad, reduced):
            tensor.data = tensor.data.to(dtype)
        if output is None:
            allreduce_hook(state, grad)
        else:
            reduce_scatter_hook(state, grad, output)
        reduced.data = reduced.data.to(state.parameter_type)


def fp16_compress_hook(
    state: LowPrecisionState, grad: Tensor, output: Tensor | None = None
) -> None:
    """The mean, by way of float16: half of the bytes."""
    _low_precision(dtypes.float16, state, grad, output)


def bf16_compress_hook(
    state: LowPrecisionState, grad: Tensor, output: Tensor | None = None
) -> None:
    """The mean, by way of bfloat16: half of the bytes."""
    _low_precision(dtypes.bfloat16, state, grad, output)
