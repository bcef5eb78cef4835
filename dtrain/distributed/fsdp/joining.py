"""Sharded models where ranks have different numbers of batches: what `Join` makes them do.

A rank that is through owns parts of the parameters: it goes on with the others, does what a pass
does without computing, and takes every optimizer step. Rules: 1. Before a pass ranks agree on what
it will do, by one small all-reduce. 2. After a pass all ranks have the same gradients' parts as if
the rank that is through had contributed zeros. Source: torch.distributed.algorithms.join.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dtrain.autograd.grad_mode import is_grad_enabled
from dtrain.device import device
from dtrain.distributed.algorithms.join import _OUTSIDE, Join, Joinable, JoinHook
from dtrain.distributed.world import ProcessGroup
from dtrain.nn.parallel.joining import heard

if TYPE_CHECKING:
    from dtrain.distributed.fsdp.state import ModuleState


@Joinable.register
class JoiningUnits:
    """The part of a sharded module that `Join` needs.

    A plain class: modules that were there before get it as a base, which Python allows only to
    classes that are laid out like theirs.
    """

    _fsdp_state: ModuleState
    _join_config = _OUTSIDE  # of modules that were made before they were sharded
    _divides_by_all = True

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """For `Join`. It needs `step`, what the loop does after each backward pass that reduces,
        such as `optimizer.step`: a rank that is through owns parts of the parameters.

        `divide_by_initial_world_size=False`: gradients are divided by the number of ranks that are
        still active. ValueError without `step`, for an inner module, and on a 2-D mesh.
        """
        step = kwargs.get("step")
        if step is None:
            raise ValueError(
                "Join with a sharded model needs step=..., what your loop does after backward "
                "(optimizer.step): ranks that are through own parts of the parameters"
            )
        state = self._fsdp_state
        root = state.make_root()
        if not state.is_root:
            raise ValueError("Join takes the outermost of the sharded modules")
        if any(unit.replicas is not None for unit in root.units):
            raise ValueError("Join does not know hybrid sharding, on a 2-D mesh")
        self._divides_by_all = kwargs.get("divide_by_initial_world_size", True)
        root.announce = self._announce
        return Shadow(self, step)

    @property
    def join_device(self) -> device:
        return device("cpu")

    @property
    def join_process_group(self) -> ProcessGroup:
        return self._fsdp_state.make_root().groups[0]

    def _announce(self) -> None:
        if not self._join_config.enable:
            return
        Join.notify_join_context(self)
        units = self._fsdp_state.make_root().units
        sync = all(unit.sync for unit in units)
        has_gradients = any(p._grad is not None for unit in units for p in unit.sharded)
        self._agree((is_grad_enabled(), sync, has_gradients))

    def _agree(self, calls: tuple[bool, ...] | None) -> list[bool]:
        active, _, done = heard(self.join_process_group, calls, 3)
        for unit in self._fsdp_state.make_root().units if not self._divides_by_all else ():
            unit.divide_by = float(active)
        return done


class Shadow(JoinHook):
    """Goes through the passes of the active ranks on a rank that is through."""

    def __init__(self, module: JoiningUnits, step: Callable[[], Any]) -> None:
        self.module, self.step = module, step

    def main_hook(self) -> None:
        root = self.module._fsdp_state.make_root()
        backward, sync, has_gradients = self.module._agree(None)
        if not has_gradients:  # the others have cleared them
            for parameter in (p for unit in root.units for p in unit.sharded):
                parameter.grad = None
        root.shadow(backward=backward, reduces=sync)
        if backward and sync:
            self.step()

    def post_hook(self, is_last_joiner: bool) -> None:
        root = self.module._fsdp_state.make_root()
        root.announce = None
        for unit in root.units if not self.module._divides_by_all else ():
            unit.divide_by = None
