"""What fully sharded data parallel does around the calls of one module.

Owns: `ModuleState`, the hooks of a module that was given units of its own, and how the outermost
becomes the root of all. Rules: 1. Whole parameters stand in the modules during forward only; at all
other times `parameters()` and state dicts give the sharded ones. 2. The module whose forward is
called first, with none around it, is the root of all below it, for good.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from dtrain.autograd.grad_mode import is_grad_enabled
from dtrain.distributed.fsdp.policies import MixedPrecisionPolicy
from dtrain.distributed.fsdp.root import Root, meet
from dtrain.distributed.fsdp.unit import Unit, bare
from dtrain.nn.modules.module import Module
from dtrain.nn.parallel.mixed_precision import cast_floating, map_tensors
from dtrain.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from dtrain.tensor import Tensor


class ModuleState:
    """Several modules that are gathered together (mostly one), and their units, one per dtype.

    `reshard_after_forward`: whether memory is given back between forward and backward; None: yes,
    unless it is the root. `forward_prefetch`, `backward_prefetch`: whose units are gathered beside
    this one's forward and backward; None: the next in the order of the pass before.
    """

    def __init__(
        self,
        modules: Sequence[Module],
        units: Sequence[Unit],
        reshard_after_forward: bool | None,
        precision: MixedPrecisionPolicy,
    ) -> None:
        self.modules, self.units = list(modules), list(units)
        self.reshard_after_forward = reshard_after_forward
        self.precision = precision
        self.forward_prefetch: list[ModuleState] | None = None
        self.backward_prefetch: list[ModuleState] | None = None
        self.prefetches_late = False  # behind this one's backward, not beside it
        self.root: Root | None = None
        self.is_root = False
        self.summoned = False  # whether copies of the user stand in the modules
        self._entered: set[int] = set()  # modules of the group whose forward has begun, or is over
        for module in modules:
            module.register_forward_pre_hook(self.before, prepend=True, with_kwargs=True)
            module.register_forward_hook(self.after, always_call=True)
            module.register_state_dict_pre_hook(self._before_state_dict)
            module.register_load_state_dict_pre_hook(self._before_load)

    # ---- the tree

    def states(self) -> Iterator[ModuleState]:
        """This one and those below, in the order of registration."""
        seen: set[int] = set()
        for top in self.modules:
            for module in top.modules():
                state = state_of(module)
                if state is not None and id(state) not in seen:
                    seen.add(id(state))
                    yield state

    def make_root(self) -> Root:
        """Become the root of everything below, unless it belongs to one."""
        if self.root is not None:
            return self.root
        states = list(self.states())
        taken = [state for state in states if state.root is not None]
        if taken:
            raise RuntimeError(
                "FSDP state has already been lazily initialized for "
                f"{type(taken[0].modules[0]).__name__}: FSDP requires running forward through the "
                "root module first"
            )
        self.is_root = True
        root = Root([unit for state in states for unit in state.units])
        paths = {id(module): path for path, module in self.modules[0].named_modules()}
        for state in states:
            state.root = root
            for unit in state.units:
                unit.where = bare(paths.get(id(state.modules[0]), ""))
            if state.reshard_after_forward is None:
                state.reshard_after_forward = state is not self
        return root

    # ---- verbs

    def unshard(self, *, async_op: bool = False) -> None:
        """Start to gather, or gather and let the whole parameters stand in the modules."""
        if not async_op:
            self.wait()
            return
        for unit in self.units:
            unit.begin(async_op=True)

    def wait(self) -> None:
        """Wait for what `unshard` began."""
        for unit in self.units:
            unit.finish()
            unit.show_whole()

    def reshard(self) -> None:
        """Let the sharded parameters stand in the modules, and give memory back."""
        for unit in self.units:
            unit.show_sharded()
            unit.reshard()

    # ---- around forward

    def before(self, module: Module, args: Any, kwargs: Any) -> Any:
        root = self.make_root()
        if self.summoned:
            raise RuntimeError(
                "forward inside summon_full_params: its whole parameters are copies, to look at "
                "and to change; compute outside of the block"
            )
        if id(module) not in self._entered and not self._entered:
            if self.is_root:
                root.before_forward()
            root.gather_for_forward(self)
            for unit in self.units:
                unit.show_whole()
        self._entered.add(id(module))
        if self.precision.cast_forward_inputs and self.precision.param_dtype is not None:
            dtype = self.precision.param_dtype
            return cast_floating(args, dtype), cast_floating(kwargs, dtype)
        return None

    def after(self, module: Module, args: Any, output: Any) -> Any:
        if len(self._entered) == len(self.modules):
            self._entered.clear()
            self._end_forward()
        if is_grad_enabled() and self.units:
            map_tensors(self._watch, output)
        if self.precision.output_dtype is not None:
            return cast_floating(output, self.precision.output_dtype)
        return None

    def _end_forward(self) -> None:
        assert self.root is not None
        self.root.record(self._end_forward)
        self.root.end_forward(self)
        if self.is_root and not self.root.is_in_backward():
            self.root.meter.forward_ended()
        for unit in self.units:
            unit.show_sharded()
            if self.reshard_after_forward and not self.root.is_in_backward():
                unit.reshard()

    def _watch(self, output: Tensor) -> Tensor:
        if output.requires_grad:
            output.register_hook(self._before_backward)
        return output

    def _before_backward(self, grad: Tensor) -> None:
        assert self.root is not None
        self.root.gather_for_backward(self)

    # ---- around state

    def _before_state_dict(self, *_: Any) -> None:
        for unit in self.units:
            unit.show_sharded()

    def _before_load(self, *_: Any) -> None:
        self._before_state_dict()
        meet([unit for unit in self.units if unit.is_read])


def state_of(module: Module) -> ModuleState | None:
    """The state of a module that was given units of its own."""
    return module.__dict__.get("_fsdp_state")


def _before_step(optimizer: Optimizer, *_: Any) -> None:
    """Before any optimizer changes shards that other ranks may be reading."""
    units = {
        id(parameter._fsdp): parameter._fsdp
        for group in optimizer.param_groups
        for parameter in group["params"]
        if "_fsdp" in parameter.__dict__
    }
    meet(unit for unit in units.values() if unit.is_read)


register_optimizer_step_pre_hook(_before_step)
