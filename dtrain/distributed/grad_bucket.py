"""`GradBucket`: the gradients that travel together, as a communication hook is given them.

`BuiltinCommHookType` names the hooks that DistributedDataParallel brings along. Source:
torch.distributed.GradBucket, torch.distributed.BuiltinCommHookType.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

from dtrain.tensor import Tensor


class GradBucket:
    """One bucket of a model's gradients in the middle of a backward pass.

    `buffer` is flat and lives in memory that the ranks of one host share; the gradients are views
    of it, and what alignment leaves between them is zero.
    """

    __slots__ = ("_buffer", "_gradients", "_index", "_last", "_parameters")

    def __init__(
        self,
        index: int,
        buffer: Tensor,
        gradients: Sequence[Tensor],
        parameters: Sequence[Any],
        last: bool,
    ) -> None:
        self._index, self._last = index, last
        self._buffer = buffer
        self._gradients, self._parameters = list(gradients), list(parameters)

    def index(self) -> int:
        """The bucket's place in the order of reduction, from 0."""
        return self._index

    def buffer(self) -> Tensor:
        """The flat gradients of this rank, 1-D, not divided by the number of ranks."""
        return self._buffer

    def set_buffer(self, buffer: Tensor) -> None:
        """Replace the values of `buffer()`; ValueError when the size or the dtype is another."""
        if buffer.shape != self._buffer.shape or buffer.dtype is not self._buffer.dtype:
            raise ValueError(
                f"set_buffer: expected {self._buffer.dtype} {list(self._buffer.shape)}, got "
                f"{buffer.dtype} {list(buffer.shape)}"
            )
        self._buffer.set_array(buffer._data)

    def gradients(self) -> list[Tensor]:
        """A view of `buffer()` for each parameter, in the parameter's shape."""
        return list(self._gradients)

    def parameters(self) -> list[Any]:
        """The parameters, in the order of `gradients()`."""
        return list(self._parameters)

    def is_last(self) -> bool:
        """Whether this is the last bucket of the pass."""
        return self._last


class BuiltinCommHookType(Enum):
    """What `DistributedDataParallel._register_builtin_comm_hook` takes.

    ALLREDUCE is what happens without a hook; FP16_COMPRESS rounds gradients to float16 on their
    way.
    """

    ALLREDUCE = 1
    FP16_COMPRESS = 2
