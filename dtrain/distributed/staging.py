"""How a call on tensors becomes a call on arrays, and how its results get back.

Owns: the checks of arguments, `Landing` (where results arrive) and `submit`, through which all
collectives of tensors go. Rules: a contiguous tensor is sent from and received into its own memory;
any other costs a copy. Results that were staged are copied back by whoever waits first.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

import numpy as np

from dtrain.autograd.grad_mode import is_grad_enabled
from dtrain.autograd.value import need_whole
from dtrain.comm.arrays import describe
from dtrain.distributed.work import Work
from dtrain.distributed.world import GroupMember, ProcessGroup
from dtrain.tensor import Tensor

Async = Work | None


def check_tensor(tensor: Any, name: str) -> Tensor:
    """`tensor` itself, or TypeError in torch's words."""
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"Invalid function argument. Expected parameter `{name}` of type torch.Tensor\n"
            f"             but got {type(tensor)} instead."
        )
    need_whole("a collective", tensor)
    if is_grad_enabled() and tensor.grad_fn is not None:
        _warn(f"`{name}` is part of a graph")
    return tensor


def _warn(what: str) -> None:
    warnings.warn(
        f"{what}, and gradients do not flow through this collective: detach() it, or use "
        "dtrain.distributed.nn.functional",
        stacklevel=4,
    )


def check_list(tensors: Any, name: str) -> list[Tensor]:
    """A list of tensors, or TypeError in torch's words."""
    if not isinstance(tensors, (list, tuple)) or not all(isinstance(t, Tensor) for t in tensors):
        kinds = [type(t) for t in tensors] if isinstance(tensors, (list, tuple)) else type(tensors)
        raise TypeError(
            f"Invalid function argument. Expected parameter `{name}` of type List[torch.Tensor]\n"
            f"             but got {kinds} instead."
        )
    need_whole("a collective", *tensors)
    if is_grad_enabled() and any(t.grad_fn is not None for t in tensors):
        _warn(f"a tensor of `{name}` is part of a graph")
    return list(tensors)


def _one_dtype(tensors: Sequence[Tensor]) -> np.dtype[Any]:
    """The dtype of all `tensors` (float32 of none); ValueError when they differ."""
    kinds = {t._data.dtype for t in tensors}
    if len(kinds) > 1:
        raise ValueError(
            f"Invalid usage of tensors with different dtypes. Found {sorted(map(str, kinds))}"
        )
    return kinds.pop() if kinds else np.dtype(np.float32)


class Landing:
    """Where a call reads and where its results arrive.

    A contiguous tensor stands for itself; for any other there is a copy, which `finish` copies
    back.
    """

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.tensors: list[Tensor] = []  # the outputs
        self.steps: list[Callable[[], None]] = []

    def read(self, tensor: Tensor) -> np.ndarray:
        """The values of `tensor` as a contiguous array, not to be written."""
        if tensor.requires_grad and tensor.grad_fn is None and is_grad_enabled():
            _warn("the input requires grad")  # a result elsewhere will not lead back to this leaf
        self.inputs.append(tensor)
        return np.ascontiguousarray(tensor._data).reshape(tensor._data.shape)

    def read_each(self, tensors: Sequence[Tensor]) -> np.ndarray:
        """The elements of several tensors of one dtype, one after the other."""
        self.inputs.extend(tensors)
        dtype = _one_dtype(tensors)
        return np.concatenate([t._data.reshape(-1) for t in tensors] or [np.empty(0, dtype)])

    def into(self, tensor: Tensor, *, read: bool = True) -> np.ndarray:
        """An array to receive into for `tensor`; `read`: its values are an input as well."""
        self.tensors.append(tensor)
        if read:
            self.inputs.append(tensor)
        data = tensor._data
        if data.flags.c_contiguous:
            self.steps.append(tensor._bump_version)
            return data
        staged: np.ndarray = np.array(data, order="C") if read else np.empty(data.shape, data.dtype)
        self.steps.append(lambda: tensor.set_array(staged))
        return staged

    def into_each(self, tensors: Sequence[Tensor], *, read: bool = False) -> np.ndarray:
        """One flat array whose consecutive parts go to `tensors`."""
        self.tensors.extend(tensors)
        size = sum(t._data.size for t in tensors)
        flat = self.read_each(tensors) if read else np.empty(size, _one_dtype(tensors))
        ends = np.cumsum([t._data.size for t in tensors])[:-1]
        self._spread(tensors, np.split(flat, ends) if tensors else [])
        return flat

    def into_rows(self, tensors: Sequence[Tensor], width: int) -> np.ndarray:
        """An array with a row of `width` elements for each tensor, which gets the first of them."""
        self.tensors.extend(tensors)
        rows = np.empty((len(tensors), width), _one_dtype(tensors))
        self._spread(tensors, [r[: t._data.size] for r, t in zip(rows, tensors, strict=True)])
        return rows

    def _spread(self, tensors: Sequence[Tensor], parts: Sequence[np.ndarray]) -> None:
        for tensor, part in zip(tensors, parts, strict=True):
            self.steps.append(partial(_set, tensor, part))

    def finish(self) -> None:
        """Bring what has arrived to the tensors."""
        for step in self.steps:
            step()


def _set(tensor: Tensor, flat: np.ndarray) -> None:
    tensor.set_array(flat.reshape(tensor._data.shape))


class Batch:
    """The calls of one `_coalescing_manager` block."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.works: list[Work] = []

    def wait(self) -> None:
        """Wait for all of them; raises the first failure."""
        for work in self.works:
            work.wait()


batch_here: ContextVar[Batch | None] = ContextVar("dtrain_batch", default=None)


def submit(
    group: ProcessGroup,
    call: Any,
    landing: Landing,
    async_op: bool,
    timeout: float | None = None,
) -> Async:
    """Submit a collective; None, or the Work when `async_op`.

    In a coalescing block nothing waits before the end of the block.
    """
    batch = batch_here.get()
    batched = batch is not None and batch.group is group
    work = group.issue(
        call,
        async_op=async_op or batched,
        timeout=timeout,
        inputs=landing.inputs,
        outputs=landing.tensors,
    )
    if not async_op and not batched:
        landing.finish()
        return None
    handle = Work(work, landing.tensors, landing.finish)
    if batched:
        assert batch is not None
        batch.works.append(handle)
    return handle if async_op else None


def root_of(
    group: ProcessGroup,
    global_rank: int | None,
    group_rank: int | None,
    name: str,
    default: int = 0,
) -> int:
    """The group rank that `src`/`dst` or `group_src`/`group_dst` name; only one may be given."""
    if global_rank is not None and group_rank is not None:
        raise ValueError(f"Can't specify both group_{name} and {name}")
    if group_rank is not None:
        if not 0 <= group_rank < group.size():
            raise ValueError(f"Group rank {group_rank} is not part of group (size {group.size()})")
        return group_rank
    return group.group_rank_of(group.ranks[default] if global_rank is None else global_rank)


def outside(group: Any) -> bool:
    """Whether the caller is not in the group: torch then warns and does nothing."""
    if group is not GroupMember.NON_GROUP_MEMBER:
        return False
    warnings.warn("Running a collective on a global rank which does not belong to the given group.",
                  stacklevel=3)  # fmt: skip
    return True


def check_parts(parts: list[Tensor], whole: Tensor, group: ProcessGroup, what: str) -> None:
    """ValueError unless `parts` has one tensor like `whole` for each rank."""
    if len(parts) != group.size():
        raise ValueError(
            f"{what}: expected a list of {group.size()} tensors, one per rank, got {len(parts)}"
        )
    for i, part in enumerate(parts):
        if part._data.shape != whole._data.shape or part._data.dtype != whole._data.dtype:
            raise ValueError(
                f"{what}: tensor {i} of the list is {describe(part._data)}, expected "
                f"{describe(whole._data)} as on this rank"
            )
