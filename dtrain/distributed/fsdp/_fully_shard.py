"""`fully_shard`: parameters, gradients and optimizer state divided among ranks.

The public face of the engine: which parameters become a unit, and the verbs that a module gets.
Source: torch.distributed.fsdp.fully_shard (_fully_shard/_fully_shard.py); Rajbhandari et al.,
ZeRO, arXiv:1910.02054; Zhao et al., PyTorch FSDP, VLDB 2023.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from dtrain.distributed.device_mesh import DeviceMesh
from dtrain.distributed.fsdp.hooks import ReduceScatter
from dtrain.distributed.fsdp.joining import JoiningUnits
from dtrain.distributed.fsdp.making import make_state
from dtrain.distributed.fsdp.policies import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
)
from dtrain.distributed.fsdp.reports import ReportingUnits
from dtrain.distributed.fsdp.state import ModuleState, state_of
from dtrain.distributed.fsdp.unit import Unit
from dtrain.distributed.world import resolve
from dtrain.nn.modules.container import ModuleDict, ModuleList
from dtrain.nn.modules.module import Module


def fully_shard(
    module: Module | Sequence[Module],
    *,
    mesh: DeviceMesh | None = None,
    reshard_after_forward: bool | int | None = None,
    mp_policy: MixedPrecisionPolicy | None = None,
    offload_policy: OffloadPolicy | None = None,
    ignored_params: Collection[Any] | None = None,
) -> Any:
    """Divide the parameters of `module` among the ranks of `mesh`; returns it, as an `FSDPModule`.

    Each parameter is cut along dimension 0, as `torch.chunk` cuts: `module.parameters()` are then
    what this rank owns, and so are gradients and what optimizers hold. Call it on inner modules
    first: each call makes a unit of all parameters below that belong to none yet. Units are whole
    only while their modules compute. Several modules in a list make one unit; it is gathered before
    the first of them and given back after the last. Every rank keeps its own values: ranks are
    expected to have made the same model. Waits for all ranks.

    mesh            1-D: the ranks that share the parameters, default all. 2-D: the second dimension
                    shares, the first replicates (hybrid sharding).
    reshard_after_forward   whether a unit's memory is given back between forward and backward;
                    None: yes, except for the root. On one host with shared memory nothing has to be
                    given back, and it changes nothing. Over hosts with several ranks each keeps one
                    copy, unless this is True. 1 means False; another number, which must be a factor
                    of the number of ranks, None.
    mp_policy       dtypes in forward, backward and reduction.
    offload_policy  `CPUOffloadPolicy()`: what a rank keeps is in files, which memory need not hold.
    ignored_params  parameters that stay as they are.

    ValueError for a parameter without dimensions.
    """
    modules = [module] if isinstance(module, Module) else list(module)
    for each in modules:
        _check_module(each)
    if offload_policy is not None and not isinstance(offload_policy, OffloadPolicy):
        raise TypeError(f"offload_policy: expected an OffloadPolicy, got {offload_policy!r}")
    precision = mp_policy or MixedPrecisionPolicy()
    ranks = _mesh(mesh)
    after_forward = _after_forward(reshard_after_forward, ranks.size(ranks.ndim - 1))
    ignored = {id(p) for p in ignored_params or ()}
    offload = isinstance(offload_policy, CPUOffloadPolicy)
    make_state(modules, ranks, precision, after_forward, ignored, offload=offload)
    for each in modules:
        each.__class__ = _class_for(type(each))
    return module


def _check_module(module: Module) -> None:
    if isinstance(module, (ModuleList, ModuleDict)):
        raise ValueError(
            f"fully_shard does not support containers that do not implement forward: {module}"
        )
    if state_of(module) is not None:
        raise ValueError(f"fully_shard was called twice on a {type(module).__name__}")


def _after_forward(wanted: bool | int | None, size: int) -> bool | None:
    if wanted is None or isinstance(wanted, bool):
        return wanted
    if not isinstance(wanted, int):
        raise ValueError(
            "reshard_after_forward should be a bool or an int representing the group size to "
            f"reshard to, not {wanted}"
        )
    if wanted < 1 or size % wanted:
        raise ValueError(
            "If passing reshard_after_forward as an int, it should be a factor of "
            f"{size}, not {wanted}"
        )
    return None if wanted > 1 else False


def _mesh(mesh: DeviceMesh | None) -> DeviceMesh:
    if mesh is None:
        return DeviceMesh.from_group(resolve(None), "cpu")
    if mesh.ndim not in (1, 2):
        raise ValueError(f"fully_shard expects a 1D or 2D DeviceMesh but got {mesh}")
    return mesh


_classes: dict[type, type] = {}


def _class_for(cls: type) -> type:
    """`cls` with the verbs, made once; its name is torch's."""
    if cls not in _classes:
        made = type(f"FSDP{cls.__name__}", (FSDPModule, cls), {"__doc__": cls.__doc__})
        _classes.setdefault(cls, made)  # ranks may be threads
    return _classes[cls]


class FSDPModule(JoiningUnits, ReportingUnits):
    """The verbs of a module that `fully_shard` was called on. Source: torch's FSDPModule."""

    _fsdp_state: ModuleState

    def unshard(self, async_op: bool = False) -> UnshardHandle | None:
        """Gather the parameters, which then stand in the module until `reshard`.

        With `async_op` returns a handle at once, whose `wait` does the rest.
        """
        self._fsdp_state.unshard(async_op=async_op)
        return UnshardHandle(self._fsdp_state) if async_op else None

    def reshard(self) -> None:
        """Let the sharded parameters stand in the module, and give memory back."""
        self._fsdp_state.reshard()

    def set_requires_gradient_sync(
        self, requires_gradient_sync: bool, *, recurse: bool = True
    ) -> None:
        """Whether the next backward passes reduce. If not, each rank keeps its own whole gradients,
        accumulated: memory for as many numbers as the module has parameters. Without it, gradients
        are accumulated in the shards.
        """
        for unit in self._units(recurse):
            unit.sync = requires_gradient_sync

    def set_requires_all_reduce(self, requires_all_reduce: bool, *, recurse: bool = True) -> None:
        """On a 2-D mesh: whether gradients are added over the replicas, too, in the next backward
        passes. If not, they are kept as this rank's part of the sum, and added up with later ones.
        """
        for unit in self._units(recurse):
            unit.sync_replicas = requires_all_reduce

    def set_is_last_backward(self, is_last_backward: bool) -> None:
        """Changes nothing: all gradients are there when `backward` returns. (PyTorch can wait for
        them at a later one.)
        """

    def set_reduce_scatter_unused_params(
        self, reduce_scatter_unused_params: bool, *, recurse: bool = True
    ) -> None:
        """Changes nothing: units of which some ranks have no gradients are always reduced. A
        parameter that no rank has used keeps `grad` as it is.
        """

    def set_reshard_after_forward(self, reshard_after_forward: bool, recurse: bool = True) -> None:
        """Whether memory is given back between forward and backward. ValueError if no bool."""
        if not isinstance(reshard_after_forward, bool):
            raise ValueError(
                f"reshard_after_forward should be a bool, got {type(reshard_after_forward)}"
            )
        for state in self._below(recurse):
            state.reshard_after_forward = reshard_after_forward

    def set_reshard_after_backward(
        self, reshard_after_backward: bool, *, recurse: bool = True
    ) -> None:
        """Whether memory is given back when gradients are complete."""
        for unit in self._units(recurse):
            unit.reshards = reshard_after_backward

    def set_modules_to_forward_prefetch(self, modules: Sequence[FSDPModule]) -> None:
        """Whose parameters are gathered beside this module's forward, in place of the next one's.

        On one host with shared memory there is nothing to gather.
        """
        self._fsdp_state.forward_prefetch = [_state(each) for each in modules]

    def set_modules_to_backward_prefetch(self, modules: Sequence[FSDPModule]) -> None:
        """Whose parameters are gathered beside this module's backward, in place of the one's
        before.
        """
        self._fsdp_state.backward_prefetch = [_state(each) for each in modules]

    def set_gradient_divide_factor(self, factor: float) -> None:
        """Divide the sum of gradients over ranks by `factor`, not by their number."""
        for unit in self._fsdp_state.units:
            unit.divide_by = float(factor)

    set_reduce_scatter_divide_factor = set_gradient_divide_factor  # PyTorch's older name

    def set_custom_reduce_scatter(self, comm: Any) -> None:
        """Reduce this module's gradients by `comm(output_tensor=, input_tensor=, group=, op=)`.

        Both are flat tensors of `comm.allocate(size, dtype=, device=)`; `input_tensor` has a part
        for each rank, all of the length of `output_tensor`. It may return a Work. It is called in
        backward and nothing goes on beside it; one small all-reduce more tells which parameters
        were used.
        """
        for unit in self._fsdp_state.units:
            unit.reduction = ReduceScatter(comm)

    def set_custom_all_gather(self, comm: Any) -> None:
        """Gather this module's parameters by `comm(output_tensor=, input_tensor=, group=)`, flat
        tensors of `comm.allocate` as for `set_custom_reduce_scatter`.

        Not called where ranks share memory on one host: there is nothing to gather. The report of
        a step does not show it.
        """
        for unit in self._fsdp_state.units:
            unit.all_gather = comm

    def set_all_reduce_hook(self, hook: Callable[[Any], None], *, stream: Any = None) -> None:
        """Call `hook(grad)` with this rank's part of the reduced gradients, a flat tensor, which it
        may change in place; behind the all-reduce over replicas, if there are some.

        ValueError for a `stream`: there are none.
        """
        if stream is not None:
            raise ValueError("set_all_reduce_hook: there are no streams on the CPU, leave it out")
        for unit in self._fsdp_state.units:
            unit.on_reduced = hook

    def reset_iter_state(self) -> None:
        """Changes nothing: a pass that an exception has cut short is forgotten at the next forward
        of the root.
        """

    def _get_fsdp_state(self) -> ModuleState:
        return self._fsdp_state

    def _below(self, recurse: bool) -> Iterator[ModuleState]:
        return self._fsdp_state.states() if recurse else iter([self._fsdp_state])

    def _units(self, recurse: bool) -> Iterator[Unit]:
        return (unit for state in self._below(recurse) for unit in state.units)

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError(
            "FSDP does not support deepcopy. Please use state dict for serialization."
        )


def _state(module: FSDPModule) -> ModuleState:
    if not isinstance(module, FSDPModule):
        raise ValueError(
            f"expected a module that fully_shard was called on, got {type(module).__name__}"
        )
    return module._fsdp_state


def register_fsdp_forward_method(module: Module, method_name: str) -> None:
    """Let `module.method_name(...)` compute with whole parameters too, as forward does.

    Changes nothing on a module that fully_shard was not called on.
    """
    if not isinstance(module, FSDPModule):
        return
    if not hasattr(module, method_name):
        raise ValueError(f"{type(module)} does not have a method {method_name}")
    method = getattr(module, method_name)

    @functools.wraps(method)
    def around(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = _state(self)
        args, kwargs = state.before(self, args, kwargs) or (args, kwargs)
        output = method(*args, **kwargs)
        changed = state.after(self, args, output)
        return output if changed is None else changed

    setattr(module, method_name, around.__get__(module, type(module)))


def share_comm_ctx(modules: Sequence[FSDPModule]) -> None:
    """Let several sharded models of one process, such as the stages of a pipeline, make their
    gradients in the same memory. Each is made a root by it. ValueError for other modules.
    """
    for module in modules:
        if not isinstance(module, FSDPModule):
            raise ValueError(f"Expects list of FSDPModules but got {module}")
    roots = [module._fsdp_state.make_root() for module in modules]
    for root in roots[1:]:
        root.share_memory(roots[0])


class UnshardHandle:
    """A gathering that has begun."""

    def __init__(self, state: ModuleState) -> None:
        self._state = state

    def wait(self) -> None:
        """Wait for it; whole parameters stand in the module then."""
        self._state.wait()
