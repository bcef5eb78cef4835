"""`DistributedDataParallel`: every rank has the whole model, gradients are averaged.

buckets.py says which gradients travel together, reducer.py when; checks.py what must be equal;
divergence.py notices when it is not any more. Here are the class and what is copied between ranks.
Source: torch.nn.parallel.DistributedDataParallel; Li et al., VLDB 2020.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Sequence
from time import monotonic
from typing import Any, Literal

import numpy as np

from dtrain.autograd.grad_mode import is_grad_enabled
from dtrain.comm.collectives import Broadcast
from dtrain.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    allreduce_hook,
    bf16_compress_hook,
    fp16_compress_hook,
)
from dtrain.distributed.algorithms.ddp_comm_hooks.optimizer_overlap_hooks import (
    apply_optim_in_backward_hook,
)
from dtrain.distributed.algorithms.join import Joinable
from dtrain.distributed.grad_bucket import BuiltinCommHookType
from dtrain.distributed.optim.apply_optimizer_in_backward import take_over
from dtrain.distributed.world import ProcessGroup, resolve
from dtrain.dtypes import bfloat16, float16
from dtrain.flat import FlatBuffer
from dtrain.nn.modules.module import Module
from dtrain.nn.parallel.buckets import DEFAULT_CAPS, MIB
from dtrain.nn.parallel.checks import (
    Inventory,
    Watch,
    check_arguments,
    check_parts,
    check_same_parameters,
)
from dtrain.nn.parallel.divergence import Sentinel
from dtrain.nn.parallel.joining import JoiningModel
from dtrain.nn.parallel.mixed_precision import (
    _MixedPrecision,
    cast_floating,
    cast_parameters,
    map_tensors,
)
from dtrain.nn.parallel.reducer import CommHook, Reducer
from dtrain.nn.parallel.reports import ReportingModel

_COMPRESS = {float16: fp16_compress_hook, bfloat16: bf16_compress_hook}
_BUILTIN = {
    BuiltinCommHookType.ALLREDUCE: allreduce_hook,
    BuiltinCommHookType.FP16_COMPRESS: fp16_compress_hook,
}


class DistributedDataParallel(Module, JoiningModel, ReportingModel):
    """Wrap `module` so that backward leaves the mean of all ranks' gradients on every rank.

    Construction, forward and backward must happen on all ranks, in the same order. Construction
    checks that all ranks have the same parameters (names, shapes, dtypes), then copies parameters
    and buffers of rank 0 to all. It blocks until all ranks have come, at most the group's timeout.

    Gradients live in buckets: after a backward pass `param.grad` is a view into one, and is the
    sum over ranks, in rank order, divided by their number. Reductions run while backward goes on.
    Parameters that took no part on any rank keep their gradient as it was; nothing has to be
    declared for that. A forward pass of the module that goes around the wrapper, and a parameter
    that came after wrapping, are errors that name the parameter and the rank.

    process_group   the ranks that share the model, default all; or `device_mesh`, a 1-D mesh.
    bucket_cap_mb   size of a bucket in MiB; None: 25, over a network a sixteenth of all if that is
                    less (at least 2), and 1 for the first; or all in one where reducing beside
                    backward would only take its core (see `reducer`); "auto" (not
                    in torch): sizes are tried in the first passes and the fastest is kept (see
                    `tuning`), but not with a communication hook, which may depend on them.
    bucket_cap_mb_list  sizes of the buckets in turn, the last one for all that follow.
    broadcast_buffers, forward_sync_buffers  (one by its old, one by its new name) copy rank 0's
                    buffers to all before each forward in training mode that synchronizes.
    init_sync       False leaves out the check and the first copy: the caller vouches for them.
    mixed_precision `_MixedPrecision`: forward and backward, and the reduction, in other dtypes.
    delay_all_reduce_named_params  [(name, parameter)] that go into buckets of their own, behind
                    all others; `param_to_hook_all_reduce` is accepted: they come after it anyway.
    divergence_check_every  in how many passes all parameters are compared across ranks, at no
                    message (see `divergence`); 0: never. Not in torch.
    device_ids, output_device, dim, check_reduction   accepted and ignored: there is one device.
    find_unused_parameters, static_graph, skip_all_reduce_unused_params   accepted and ignored:
                    what is unused, and what is static, needs no telling.
    gradient_as_bucket_view, batched_grad_copy, lazy_bucket_allocation   accepted and ignored:
                    gradients are made in the buckets.
    """

    def __init__(
        self,
        module: Module,
        device_ids: Sequence[Any] | None = None,
        output_device: Any = None,
        dim: int = 0,
        broadcast_buffers: bool | None = None,
        init_sync: bool = True,
        process_group: ProcessGroup | None = None,
        bucket_cap_mb: float | Literal["auto"] | None = None,
        find_unused_parameters: bool = False,
        check_reduction: bool = False,
        gradient_as_bucket_view: bool = False,
        static_graph: bool = False,
        delay_all_reduce_named_params: Sequence[tuple[str, Any]] | None = None,
        param_to_hook_all_reduce: Any = None,
        mixed_precision: _MixedPrecision | None = None,
        device_mesh: Any = None,
        skip_all_reduce_unused_params: bool = False,
        bucket_cap_mb_list: Sequence[float] | None = None,
        batched_grad_copy: bool = False,
        forward_sync_buffers: bool | None = None,
        lazy_bucket_allocation: bool = False,
        *,
        divergence_check_every: int = 100,
    ) -> None:
        super().__init__()
        Joinable.__init__(self)
        delayed_params = list(delay_all_reduce_named_params or ())
        check_arguments(module, delayed_params, divergence_check_every)
        ignored = list(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
        named = [(n, p) for n, p in module.named_parameters()
                 if p.requires_grad and n not in ignored]  # fmt: skip
        if not named:
            raise RuntimeError(
                "DistributedDataParallel is not needed when a module doesn't have any parameter "
                "that requires a gradient."
            )
        caps = _caps(bucket_cap_mb, bucket_cap_mb_list)
        self.process_group = _group_of(process_group, device_mesh)
        check_parts(named, self.process_group)
        self.module = module
        self.broadcast_buffers = _one_of(broadcast_buffers, forward_sync_buffers)
        self.mixed_precision = mixed_precision
        self.require_backward_grad_sync = True
        self.parameters_to_ignore = set(ignored)
        if init_sync:
            check_same_parameters(named, self.process_group)
            self._copy_parameters()
            self._copy_buffers()
        every = divergence_check_every
        sentinel = Sentinel(named, self.process_group, every) if every else None
        delayed = {id(p) for _, p in delayed_params}
        tunes = bucket_cap_mb == "auto"
        self.reducer = Reducer(named, self.process_group, caps, sentinel, delayed, tunes)
        self._inventory = Inventory(module, [p for _, p in named], ignored)
        self._watch = Watch()
        self.reducer.went_around = self._watch.place
        hook = module.register_forward_pre_hook(self._watch)
        weakref.finalize(self, hook.remove).atexit = False  # a model may be wrapped anew
        if mixed_precision is not None:
            self._lower_precision(mixed_precision)
        if take_over([p for _, p in named]):
            self.reducer.register_hook(apply_optim_in_backward_hook, self.process_group)

    def _lower_precision(self, wanted: _MixedPrecision) -> None:
        reduced = wanted.reduce_dtype or wanted.param_dtype
        if reduced in _COMPRESS:
            self.reducer.register_hook(_COMPRESS[reduced], self.process_group)
        if wanted.buffer_dtype is not None:
            for buffer in self.module.buffers():
                if buffer.is_floating_point():
                    buffer.data = buffer.to(wanted.buffer_dtype)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """The module's forward, after the buffers have been copied from rank 0."""
        began = monotonic()
        self._inventory.check(self.process_group.rank())
        sync = self.require_backward_grad_sync
        copies = self.broadcast_buffers and self.training and sync
        weighs = self.reducer.loss_weight is not None
        source = self._begin_pass((sync, copies, sync and is_grad_enabled(), weighs))
        self.reducer.prepare(sync)
        if copies:
            self._copy_buffers(source)
        outputs = self._run(inputs, kwargs)
        if self.reducer.loss_weight is not None:
            outputs = map_tensors(self._weigh, outputs)
        self.reducer.meter.forward(began)
        return outputs

    def _copy_parameters(self, source: int = 0) -> None:
        self._copy(self.module.named_parameters(), source)

    def _copy_buffers(self, source: int = 0) -> None:
        self._copy(self.module.named_buffers(), source)

    def _copy(self, named: Iterable[tuple[str, Any]], source: int) -> None:
        kept = [t for name, t in named if name not in self.parameters_to_ignore]
        copy_from(source, kept, self.process_group)

    def _run(self, inputs: Any, kwargs: Any) -> Any:
        lower = self.mixed_precision and self.mixed_precision.param_dtype
        with self._watch.inside():
            if not lower:
                return self.module(*inputs, **kwargs)
            inputs, kwargs = cast_floating(inputs, lower), cast_floating(kwargs, lower)
            with cast_parameters(self.module, lower):
                return self.module(*inputs, **kwargs)

    def _weigh(self, output: Any) -> Any:
        """Let gradients that enter through `output` be those of the weighted loss."""
        if output.requires_grad:
            output.register_hook(lambda grad: grad * self.reducer.loss_weight)
        return output

    def set_loss_weight(self, weight: float | None) -> None:
        """Say how much the loss of the next passes stands for: its number of samples or tokens.

        If each rank's loss is a mean over so many, gradients become exactly those of the mean over
        all ranks' samples, and over all passes of an accumulation (no_sync): the sum of weight
        times gradient, divided by the sum of weights. Set it before each forward; all ranks must
        use it, or none. None goes back to the mean over ranks. Not in torch. Costs an all-reduce
        of 8 bytes and one more pass over the gradients. Gradients left from an earlier step do not
        mix with it: call zero_grad() after each.
        """
        if weight is not None and not 0 <= (weight := float(weight)) < float("inf"):
            raise ValueError(f"a loss's weight is finite and not negative, got {weight}")
        self.reducer.loss_weight = weight

    def _set_static_graph(self) -> None:
        """Accepted and ignored, as `static_graph` is."""

    def register_comm_hook(self, state: Any, hook: CommHook) -> None:
        """Let `hook(state, bucket)` reduce the gradients instead of the mean over ranks.

        It is called in backward, in bucket order, with a `dist.GradBucket`, and returns a future
        of the reduced gradients (a Tensor like `bucket.buffer()`), awaited at the end of backward.
        The buffer has not been divided by the number of ranks. What is unused travels separately:
        one small all-reduce a bucket. RuntimeError for a second hook.
        """
        if not callable(hook):
            raise TypeError("Communication hook must be callable.")
        self.reducer.register_hook(hook, state)

    def _register_builtin_comm_hook(self, comm_hook_type: BuiltinCommHookType) -> None:
        """Reduce as one of torch's built-in hooks does, among the ranks of this model's group.

        RuntimeError for a second hook.
        """
        if not isinstance(comm_hook_type, BuiltinCommHookType):
            raise TypeError(f"expected a dist.BuiltinCommHookType, got {comm_hook_type!r}")
        self.reducer.register_hook(_BUILTIN[comm_hook_type], self.process_group)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, forward and backward leave each rank its own gradients, accumulated.

        The first pass outside reduces what has been accumulated. The forward pass must be inside
        too. Source: torch's DDP.no_sync.
        """
        before = self.require_backward_grad_sync
        self.require_backward_grad_sync = False
        try:
            yield
        finally:
            self.require_backward_grad_sync = before


def _one_of(old: bool | None, new: bool | None) -> bool:
    if old is not None and new is not None and old != new:
        raise ValueError(
            f"broadcast_buffers={old} and forward_sync_buffers={new} are one option by its old and "
            "its new name: give one of them"
        )
    return next((value for value in (new, old) if value is not None), True)


def _group_of(group: ProcessGroup | None, mesh: Any) -> ProcessGroup:
    if mesh is None:
        return resolve(group)
    if group is not None:
        raise RuntimeError("Cannot specify both process_group and device_mesh arguments.")
    if mesh.ndim != 1:
        raise RuntimeError(
            f"Only 1D device mesh is supported, but got {mesh}: give one dimension of it, as in "
            "mesh['dp']"
        )
    return mesh.get_group(mesh_dim=0)  # type: ignore[no-any-return]


def _caps(one: float | str | None, several: Sequence[float] | None) -> Sequence[int] | None:
    """The sizes of the buckets in bytes, None if nobody asked for any."""
    if one is not None and several is not None:
        raise ValueError("bucket_cap_mb and bucket_cap_mb_list are both given: give one of them")
    if one == "auto":
        return DEFAULT_CAPS
    if isinstance(one, str):
        raise ValueError(f"bucket_cap_mb is a number of MiB or 'auto', got {one!r}")
    sizes = [one] if one is not None else list(several or ())
    if not all(size > 0 for size in sizes):
        raise ValueError(f"bucket_cap_mb must be positive, got {one if several is None else sizes}")
    if any(size == float("inf") for size in sizes):
        raise ValueError("bucket_cap_mb must be finite: for one bucket give the size of the model")
    return [int(size * MIB) for size in sizes] or None


def copy_from(source: int, tensors: Sequence[Any], group: ProcessGroup) -> None:
    """Overwrite `tensors` with those of the group's rank `source`, one message per dtype."""
    if group.size() == 1:
        return
    by_dtype: dict[np.dtype[Any], list[Any]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor._data.dtype, []).append(tensor)
    for same in by_dtype.values():
        flat = FlatBuffer.of([t._data for t in same], align=1)
        group.issue(Broadcast(flat.array, source))
        if group.rank() != source:
            for tensor, view in zip(same, flat.views, strict=True):
                tensor.set_array(view)
