"""A stage: some of a model's layers, and what one microbatch does to them, forward and backward.

Rules: 1. The input of every stage but the first is a leaf whose gradient goes back to the stage
before. 2. Between its forward and its backward a microbatch holds its inputs, its outputs and the
graph between them, no longer. 3. Gradients add up in `.grad` of the parameters over microbatches; a
submodule that reduces them over other ranks (DDP, FSDP) does so in the backward of the last one.
Source: torch.distributed.pipelining.stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from dtrain.autograd.grad_mode import is_grad_enabled
from dtrain.autograd.gradients import backward
from dtrain.distributed.pipelining.boundary import Boundary
from dtrain.distributed.world import ProcessGroup, resolve
from dtrain.nn.modules.module import Module
from dtrain.ops.create import zeros_like
from dtrain.tensor import Tensor


class PipelineStage:
    """Stage `stage_index` of `num_stages`: `submodule`, on rank `stage_index % size` of `group`.

    Its `forward` takes what the stage before returned: a tensor, or a tuple or list of them, of any
    dtypes; the first stage's takes the arguments of `step`, and every stage's the keyword arguments
    that its own rank gives to `step`. The last stage may return anything.

    group       default all ranks; with a device mesh, `mesh.get_group("pp")`.
    device, input_args, output_args, input_grads, output_grads, get_mesh   accepted and ignored:
                shapes and dtypes travel in front of each step's first microbatch.
    dw_builder  refused: there are no schedules that divide the backward pass.
    """

    def __init__(
        self, submodule: Module, stage_index: int, num_stages: int, device: Any = None,
        input_args: Any = None, output_args: Any = None, output_grads: Any = None,
        input_grads: Any = None, group: ProcessGroup | None = None,
        dw_builder: Callable[..., Any] | None = None, get_mesh: Any = None,
    ) -> None:  # fmt: skip
        if not 0 <= stage_index < num_stages:
            raise ValueError(f"Stage index {stage_index} is out of range of {num_stages}")
        if dw_builder is not None:
            raise NotImplementedError("dw_builder: dtrain has no schedule that calls it")
        self.submod, self.stage_index, self.num_stages = submodule, stage_index, num_stages
        self.group = resolve(group)
        self.group_rank, self.group_size = self.group.rank(), self.group.size()
        if num_stages < self.group_size:
            raise ValueError(
                f"Pipeline group size {self.group_size} cannot be larger than number of stages "
                f"{num_stages}"
            )
        if stage_index % self.group_size != self.group_rank:
            raise ValueError(
                f"stage {stage_index} of {num_stages} belongs on rank "
                f"{stage_index % self.group_size} of the group (size {self.group_size}), but this "
                f"is rank {self.group_rank}"
            )
        self._before = None if self.is_first else self._boundary(stage_index - 1, stage_index - 1)
        self._behind = None if self.is_last else self._boundary(stage_index, stage_index + 1)
        self._held: dict[int, tuple[list[Tensor], list[Tensor]]] = {}  # between F and B

    def _boundary(self, index: int, neighbour: int) -> Boundary:
        return Boundary(self.group, index, neighbour % self.group_size)

    @property
    def is_first(self) -> bool:
        """Whether its input is the batch."""
        return self.stage_index == 0

    @property
    def is_last(self) -> bool:
        """Whether its output is the model's."""
        return self.stage_index == self.num_stages - 1

    @property
    def waited(self) -> float:
        """Seconds that this stage has waited for others, in all."""
        return sum(b.waited for b in self._boundaries())

    def _boundaries(self) -> list[Boundary]:
        return [b for b in (self._before, self._behind) if b is not None]

    def join(self, following: PipelineStage) -> None:
        """Hand over to `following`, the next stage, which is on this rank, too."""
        following._before = self._behind

    def begin(self, plan: str) -> None:
        """A step begins; `plan` says what of it must be equal on all ranks.

        One that an exception cut short leaves nothing behind.
        """
        self._held.clear()
        for boundary in self._boundaries():
            boundary.begin(plan)

    def finish(self) -> None:
        """A step ends: what was sent has left."""
        for boundary in self._boundaries():
            boundary.finish()

    # --- one microbatch

    def forward(
        self, microbatch: int, args: Sequence[Any], kwargs: dict[str, Any], uniform: bool
    ) -> Any:
        """Receive, compute and send; returns the output.

        `args` and `uniform` (whether all microbatches are alike) count for the first stage.
        """
        received: list[Tensor] = []
        if self._before is not None:
            received, uniform = self._before.receive()
        with self._unreduced():
            output = self.submod(*(args if self.is_first else received), **kwargs)
        outputs = [] if self._behind is None else self._tensors_of(output)
        if self._behind is not None:
            self._behind.send(outputs, uniform)
        if is_grad_enabled():
            self._held[microbatch] = received, [t for t in outputs if t.requires_grad]
        return output

    def backward(
        self, microbatch: int, loss: Tensor | None, seed: Tensor | None, last: bool
    ) -> None:
        """Receive the gradients of a microbatch's outputs, or begin with `loss` (times `seed`) on
        the last stage; compute those of parameters and inputs; send the latter.

        `last`: no further microbatch follows in this step.
        """
        received, outputs = self._held.pop(microbatch)
        gradients: list[Any] = [seed]
        if self._behind is not None:
            gradients = self._behind.receive_gradients(outputs)
        else:
            assert loss is not None
            outputs = [loss]
        if outputs:
            self._reduce_in_this_backward(last)
            with nullcontext() if last else self._unreduced():
                backward(outputs, gradients)
        if self._before is not None:
            wanted = [t for t in received if t.requires_grad]
            self._before.send_gradients(
                [zeros_like(t) if t.grad is None else t.grad for t in wanted]
            )

    def _tensors_of(self, output: Any) -> list[Tensor]:
        tensors = list(output) if isinstance(output, (tuple, list)) else [output]
        for i, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    "a stage must return a tensor, or a tuple or list of tensors, for the next "
                    f"one, but output {i} of stage {self.stage_index} is a {type(tensor).__name__}"
                )
        return tensors

    # --- a submodule that reduces gradients over other ranks

    def _unreduced(self) -> AbstractContextManager[Any]:
        """A block in which DDP and its like keep gradients to themselves."""
        no_sync = getattr(self.submod, "no_sync", None)
        return nullcontext() if no_sync is None or not is_grad_enabled() else no_sync()

    def _reduce_in_this_backward(self, last: bool) -> None:
        """Let the backward pass that follows reduce gradients, or not."""
        for name in ("set_requires_gradient_sync", "set_is_last_backward"):  # of FSDPModule
            if hasattr(self.submod, name):
                getattr(self.submod, name)(last)
        if hasattr(self.submod, "reducer"):  # of DDP, whose forward passes were in no_sync
            self.submod.reducer.prepare(last)
