"""Schedules: what `step` and `eval` do with a batch. They follow an order (orders.py), no more.

Rules: 1. All ranks of the group make the same calls, with the same number of microbatches; only the
first stage needs the inputs, only the last one targets. 2. The loss of a step is the mean over
microbatches of `loss_fn`: gradients are divided where backward begins, so that they are right also
when several steps accumulate. 3. An exception says in which pass of which stage it was raised.
Source: torch.distributed.pipelining.schedules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from time import monotonic
from typing import Any, NamedTuple

from dtrain.autograd.grad_mode import is_grad_enabled, no_grad
from dtrain.distributed.pipelining import orders
from dtrain.distributed.pipelining.microbatch import (
    merge_chunks,
    sizes_of,
    split_args_kwargs_into_chunks,
)
from dtrain.distributed.pipelining.orders import FORWARD, Action, Order
from dtrain.distributed.pipelining.stage import PipelineStage
from dtrain.distributed.world import current_world
from dtrain.ops.create import full_like
from dtrain.tape import MAIN
from dtrain.tensor import Tensor


class StepReport(NamedTuple):
    """Where the time of a step went on this rank, in seconds: `waited` for other stages.

    The last stage ends before the first: the bubble is 1 - mean(total - waited) / max(total), over
    all ranks.
    """

    total: float
    waited: float


class _PipelineSchedule:
    """What all schedules share: `stages` are those of this rank.

    n_microbatches  into how many parts `step` cuts its batch.
    loss_fn         `loss_fn(output, target)` -> scalar, of a microbatch. All ranks give one, though
                    only the last stage calls it; None: `step` runs forward only, without gradients.
    args_chunk_spec, kwargs_chunk_spec, output_merge_spec   how arguments are cut and outputs put
                    together, see `microbatch`; default: along dimension 0.
    scale_grads     gradients are those of the mean over microbatches, else of the sum.
    """

    @staticmethod
    def _make(ranks: int, stages: int, microbatches: int) -> Order:
        raise NotImplementedError

    def __init__(
        self, stages: Sequence[PipelineStage], n_microbatches: int,
        loss_fn: Callable[..., Tensor] | None, args_chunk_spec: Any, kwargs_chunk_spec: Any,
        output_merge_spec: Any, scale_grads: bool,
    ) -> None:  # fmt: skip
        if n_microbatches < 1:
            raise ValueError(f"n_microbatches must be at least 1, got {n_microbatches}")
        self._stages = {stage.stage_index: stage for stage in stages}
        some = stages[0]
        where = some.group_size, some.num_stages, n_microbatches
        mine = list(range(some.group_rank, some.num_stages, some.group_size))
        if sorted(self._stages) != mine or len(stages) != len(mine):
            raise ValueError(
                f"rank {some.group_rank} of {some.group_size} needs the stages {mine} of "
                f"{some.num_stages}, but got {[stage.stage_index for stage in stages]}"
            )
        for stage in stages:
            if stage.stage_index + 1 in self._stages:
                stage.join(self._stages[stage.stage_index + 1])
        self.pipeline_order = dict(enumerate(type(self)._make(*where)))
        self._order = self.pipeline_order[some.group_rank]
        self._forward_order = orders.forward_only(*where)[some.group_rank]
        self.n_microbatches, self._loss_fn = n_microbatches, loss_fn
        self._specs = args_chunk_spec, kwargs_chunk_spec
        self._merge_spec, self._scale = output_merge_spec, scale_grads
        self.last_step: StepReport | None = None

    def step(
        self, *args: Any, target: Any = None, losses: list[Any] | None = None,
        return_outputs: bool = True, loss_kwargs: dict[str, Any] | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Forward and backward over a whole batch: gradients add up in the parameters' `.grad`.

        Blocks until this rank's part is done. Returns the merged, detached output on the rank of
        the last stage (None without `return_outputs`), None on others.

        args        the batch, for the first stage; others do not look at it.
        kwargs      for the stages of this rank.
        target      for `loss_fn`, on the last stage; cut like args.
        losses      a list; on the last stage it gets the losses of all microbatches.
        loss_kwargs further arguments of `loss_fn`.
        """
        trains = self._loss_fn is not None
        if trains and not is_grad_enabled():
            raise RuntimeError(
                "step() requires gradients to be enabled for backward computation; it should not "
                "be used under torch.no_grad() context. Please call eval() instead."
            )
        batch = self._batch(args, kwargs, target, loss_kwargs, losses)
        if trains and batch.targets is None and self._has_last:
            raise ValueError("step() needs target= on the rank of the last stage, for loss_fn")
        if trains:
            self._run(batch, self._order)
        else:
            with no_grad():
                self._run(batch, self._forward_order)
        return self._result(batch, losses, return_outputs)

    def eval(
        self, *args: Any, target: Any = None, losses: list[Any] | None = None, **kwargs: Any
    ) -> Any:
        """Forward over a whole batch, without gradients; as `step` otherwise. Losses are computed
        when there is a target.
        """
        batch = self._batch(args, kwargs, target, None, losses)
        with no_grad():
            self._run(batch, self._forward_order)
        return self._result(batch, losses, True)

    @property
    def _has_last(self) -> bool:
        return any(stage.is_last for stage in self._stages.values())

    def _batch(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any,
        loss_kwargs: dict[str, Any] | None, losses: Any,
    ) -> _Batch:  # fmt: skip
        if losses is not None and not isinstance(losses, list):
            raise TypeError(f"losses must be a list but got a {type(losses)}")
        size, (args_spec, kwargs_spec) = self.n_microbatches, self._specs
        first = any(stage.is_first for stage in self._stages.values())
        cut_args, cut_kwargs = split_args_kwargs_into_chunks(
            args if first else (), kwargs, size, args_spec if first else None, kwargs_spec
        )
        targets = None
        if target is not None and self._has_last and self._loss_fn is not None:
            targets = [t["target"] for t in
                       split_args_kwargs_into_chunks((), {"target": target}, size)[1]]  # fmt: skip
        return _Batch(cut_args, cut_kwargs, targets, loss_kwargs or {})

    def _run(self, batch: _Batch, order: Sequence[Action]) -> None:
        begun, before = monotonic(), self._waited()
        trains = "with" if order is self._order else "without"
        plan = f"{self.n_microbatches} microbatches {trains} gradients"
        for stage in self._stages.values():
            stage.begin(plan)
        for action in order:
            with self._told(action):
                if action.kind == FORWARD:
                    self._forward(batch, action)
                else:
                    self._backward(batch, action)
        for stage in self._stages.values():
            stage.finish()
        self.last_step = StepReport(monotonic() - begun, self._waited() - before)

    def _waited(self) -> float:
        return sum(stage.waited for stage in self._stages.values())

    def _forward(self, batch: _Batch, action: Action) -> None:
        stage, m = self._stages[action.stage], action.microbatch
        output = stage.forward(m, batch.args[m], batch.kwargs[m], batch.uniform)
        if not stage.is_last:
            return
        batch.outputs.append(output)
        if batch.targets is not None:
            assert self._loss_fn is not None
            batch.losses.append(self._loss_fn(output, batch.targets[m], **batch.loss_kwargs))

    def _backward(self, batch: _Batch, action: Action) -> None:
        stage, m = self._stages[action.stage], action.microbatch
        loss = batch.losses[m] if stage.is_last else None
        last = m == self.n_microbatches - 1
        if loss is None:
            stage.backward(m, None, None, last)
            return
        seed = full_like(loss, 1 / self.n_microbatches if self._scale else 1.0)
        stage.backward(m, loss, seed, last)
        batch.losses[m] = loss.detach()

    @contextlib.contextmanager
    def _told(self, action: Action) -> Iterator[None]:
        """Put the action on the timeline, and into what is raised."""
        kind = "forward" if action.kind == FORWARD else "backward"
        begun = monotonic()
        try:
            yield
        except Exception as error:
            rank = self._stages[action.stage].group_rank
            error.add_note(
                f"in the {kind} pass of microbatch {action.microbatch} (of {self.n_microbatches}) "
                f"on pipeline stage {action.stage} (rank {rank})"
            )
            raise
        tape = current_world().tape
        if tape is not None:
            about = {"stage": action.stage, "microbatch": action.microbatch}
            tape.add(f"{kind} {action}", "pipeline", MAIN, begun, monotonic(), **about)

    def _result(self, batch: _Batch, losses: list[Any] | None, wanted: bool) -> Any:
        if not self._has_last:
            return None
        if losses is not None:
            losses[:] = batch.losses
        if not wanted:
            return None
        with no_grad():
            return merge_chunks(batch.outputs, self._merge_spec)


class _Batch:
    """The microbatches of one step and what became of them on this rank."""

    def __init__(
        self, args: list[tuple[Any, ...]], kwargs: list[dict[str, Any]],
        targets: list[Any] | None, loss_kwargs: dict[str, Any],
    ) -> None:  # fmt: skip
        self.args, self.kwargs, self.targets, self.loss_kwargs = args, kwargs, targets, loss_kwargs
        both = list(zip(args, kwargs, strict=True))
        self.uniform = all(sizes_of(part) == sizes_of(both[0]) for part in both)
        self.outputs: list[Any] = []
        self.losses: list[Tensor] = []


class PipelineScheduleSingle(_PipelineSchedule):
    """Schedules of one stage a rank; arguments as in `_PipelineSchedule`."""

    def __init__(
        self, stage: PipelineStage, n_microbatches: int,
        loss_fn: Callable[..., Tensor] | None = None, args_chunk_spec: Any = None,
        kwargs_chunk_spec: Any = None, output_merge_spec: Any = None, scale_grads: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(
            [stage], n_microbatches, loss_fn, args_chunk_spec, kwargs_chunk_spec,
            output_merge_spec, scale_grads,
        )  # fmt: skip


class ScheduleGPipe(PipelineScheduleSingle):
    """All microbatches forward, then all backward: every one of them in memory at once.

    Bubble: (S - 1) / (M + S - 1) of the time, S stages, M microbatches.
    """

    _make = staticmethod(orders.gpipe)


class Schedule1F1B(PipelineScheduleSingle):
    """Backward as soon as possible: the bubble of GPipe, min(M, S - stage) microbatches in memory.

    Fewer microbatches than stages are allowed (PyTorch refuses them).
    """

    _make = staticmethod(orders.one_forward_one_backward)


class PipelineScheduleMulti(_PipelineSchedule):
    """Schedules of several stages a rank: rank r has the stages r, r + ranks, r + 2 ranks ...

    use_full_backward, backward_requires_autograd, defer_pp_recv   accepted and ignored: backward
    passes are always whole, and by autograd; receives wait for nobody else.
    """

    def __init__(
        self, stages: list[PipelineStage], n_microbatches: int,
        loss_fn: Callable[..., Tensor] | None = None, args_chunk_spec: Any = None,
        kwargs_chunk_spec: Any = None, output_merge_spec: Any = None, scale_grads: bool = True,
        backward_requires_autograd: bool = True, defer_pp_recv: bool = False,
        use_full_backward: bool | None = None,
    ) -> None:  # fmt: skip
        if not stages:
            raise ValueError("a schedule needs the stages of this rank, but the list is empty")
        super().__init__(
            stages, n_microbatches, loss_fn, args_chunk_spec, kwargs_chunk_spec,
            output_merge_spec, scale_grads,
        )  # fmt: skip


class ScheduleInterleaved1F1B(PipelineScheduleMulti):
    """1F1B with V stages a rank in turn: bubble (R - 1) / (V M + R - 1) on R ranks, V times the
    messages. Needs a number of microbatches that is a multiple of max(1, M // R).
    """

    _make = staticmethod(orders.interleaved)


class ScheduleLoopedBFS(PipelineScheduleMulti):
    """All microbatches forward through all stages of a rank, then all backward."""

    _make = staticmethod(orders.looped_bfs)


def get_schedule_class(schedule_name: str) -> type[_PipelineSchedule]:
    """The schedule of this name (in any case): GPipe, 1F1B, Interleaved1F1B, LoopedBFS."""
    known = {
        "GPipe": ScheduleGPipe,
        "1F1B": Schedule1F1B,
        "Interleaved1F1B": ScheduleInterleaved1F1B,
        "LoopedBFS": ScheduleLoopedBFS,
    }
    for name, kind in known.items():
        if name.lower() == schedule_name.lower():
            return kind
    raise ValueError(f"Unknown schedule '{schedule_name}'. The available options are {list(known)}")
