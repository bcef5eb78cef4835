"""`FullyShardedDataParallel`: the engine of `fully_shard` as a module around a module.

Names go through the wrapper: `named_parameters`, `state_dict` and attributes are those of what is
inside. Source: torch.distributed.fsdp.fully_sharded_data_parallel; Zhao et al., PyTorch FSDP, VLDB
2023.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from dtrain.distributed.device_mesh import DeviceMesh
from dtrain.distributed.fsdp import wrapped_state
from dtrain.distributed.fsdp.api import (
    BackwardPrefetch,
    CPUOffload,
    MixedPrecision,
    OptimStateDictConfig,
    ShardingStrategy,
    StateDictConfig,
    StateDictSettings,
    StateDictType,
)
from dtrain.distributed.fsdp.hooks import GradientHook
from dtrain.distributed.fsdp.joining import JoiningUnits
from dtrain.distributed.fsdp.making import make_state
from dtrain.distributed.fsdp.materializing import begin_with_the_first, give_values
from dtrain.distributed.fsdp.older_state import OlderState
from dtrain.distributed.fsdp.policies import MixedPrecisionPolicy
from dtrain.distributed.fsdp.reports import ReportingUnits
from dtrain.distributed.fsdp.state import ModuleState
from dtrain.distributed.fsdp.strategies import HYBRID, mesh_for, reshard_after_forward
from dtrain.distributed.fsdp.summoning import summoned
from dtrain.distributed.fsdp.unit import WRAPPED, Unit, bare
from dtrain.distributed.fsdp.wrap import chosen_modules, replace_modules
from dtrain.nn.modules.module import Module
from dtrain.nn.parallel.mixed_precision import cast_floating, map_tensors
from dtrain.nn.utils.clip_grad import clip_grad_norm_
from dtrain.optim.optimizer import Optimizer
from dtrain.tensor import Tensor


class FullyShardedDataParallel(Module, JoiningUnits, ReportingUnits, OlderState):
    """Divide the parameters of `module`, their gradients and optimizer state among ranks.

    process_group, device_mesh   the ranks that share, default all; for hybrid strategies a tuple of
                    two groups (who share, who replicate) or a 2-D mesh, default: the ranks of a
                    host share.
    sharding_strategy   ShardingStrategy, default FULL_SHARD.
    auto_wrap_policy    which modules below get a wrapper, hence a unit, of their own: see
                    dtrain.distributed.fsdp.wrap.
    backward_prefetch   BackwardPrefetch, or None: a unit is gathered when it is needed.
    mixed_precision     MixedPrecision.
    cpu_offload         CPUOffload(offload_params=True): what a rank keeps is in files, for models
                    larger than memory.
    ignored_modules, ignored_states   modules, or parameters or modules, that stay as they are and
                    are not reduced.
    sync_module_states  begin with the first rank's parameters and buffers. Without it each rank
                    keeps its own rows of its own values: ranks are expected to be equal.
    use_orig_params     is always so: parameters keep their names, shapes and number.
    param_init_fn   called on modules that are on the meta device, to give them memory and values;
                    without it they need a `reset_parameters`. One wrapper after the other, inner
                    ones first, so that no rank holds more than one whole.
    device_id, limit_all_gathers, forward_prefetch   accepted, and change nothing: there is one
                    device, at most two units are gathered or reduced at a time, and the next unit
                    is always gathered beside forward.

    Parameters are those of `fully_shard`: DTensors outside of forward, `grad` as well. All ranks
    construct it; waits for them. ValueError for arguments that do not go together.
    """

    _fsdp_wrapped_module: Module
    _fsdp_state: ModuleState

    def __init__(
        self,
        module: Module,
        process_group: Any = None,
        sharding_strategy: ShardingStrategy | None = None,
        cpu_offload: CPUOffload | None = None,
        auto_wrap_policy: Any = None,
        backward_prefetch: BackwardPrefetch | None = BackwardPrefetch.BACKWARD_PRE,
        mixed_precision: MixedPrecision | None = None,
        ignored_modules: Iterable[Module] | None = None,
        param_init_fn: Callable[[Module], None] | None = None,
        device_id: Any = None,
        sync_module_states: bool = False,
        forward_prefetch: bool = False,
        limit_all_gathers: bool = True,
        use_orig_params: bool = False,
        ignored_states: Iterable[Any] | None = None,
        device_mesh: DeviceMesh | None = None,
    ) -> None:
        super().__init__()
        strategy = sharding_strategy or ShardingStrategy.FULL_SHARD
        mesh = mesh_for(strategy, process_group, device_mesh)
        kept = _Ignored(ignored_modules, ignored_states)
        self.sharding_strategy, self.mixed_precision = strategy, mixed_precision or MixedPrecision()
        self._state_dict_settings = wrapped_state.settings_for(StateDictType.FULL_STATE_DICT)
        if auto_wrap_policy is not None:
            below = {
                **{"sharding_strategy": strategy, "device_mesh": _given(mesh, strategy)},
                **{"backward_prefetch": backward_prefetch, "mixed_precision": mixed_precision},
                **{"ignored_states": kept.states, "cpu_offload": cpu_offload},
                **{"param_init_fn": param_init_fn, "sync_module_states": sync_module_states},
            }
            _wrap_below(module, auto_wrap_policy, kept, below)
        give_values(module, param_init_fn, kept.modules, kept.ids)
        if sync_module_states:
            begin_with_the_first(module, mesh, kept.modules, kept.ids)
        self._fsdp_wrapped_module = module
        self._cast_buffers(kept.parameters)
        policy = MixedPrecisionPolicy(
            param_dtype=self.mixed_precision.param_dtype,
            reduce_dtype=self.mixed_precision.reduce_dtype,
            cast_forward_inputs=False,
        )
        given_back = reshard_after_forward(strategy)
        offload = cpu_offload is not None and cpu_offload.offload_params
        state = make_state([self], mesh, policy, given_back, kept.ids, offload=offload)
        if backward_prefetch is None:
            state.backward_prefetch = []
        state.prefetches_late = backward_prefetch is BackwardPrefetch.BACKWARD_POST
        self.register_state_dict_post_hook(wrapped_state.keys_without_wrapper)
        self.register_load_state_dict_pre_hook(wrapped_state.keys_with_wrapper)
        self.register_load_state_dict_post_hook(wrapped_state.missing_without_wrapper)

    def _cast_buffers(self, kept: Iterable[Tensor]) -> None:
        wanted, ignored = self.mixed_precision.buffer_dtype, {id(each) for each in kept}
        for buffer in self._fsdp_wrapped_module.buffers() if wanted is not None else ():
            if buffer.is_floating_point() and id(buffer) not in ignored:
                buffer.data = buffer.to(wanted)

    # ---- names

    @property
    def module(self) -> Module:
        """The module inside."""
        return self._fsdp_wrapped_module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == WRAPPED:  # not there yet
                raise
            return getattr(self._fsdp_wrapped_module, name)

    def __getitem__(self, key: int) -> Any:
        return self._fsdp_wrapped_module[key]  # type: ignore[index]

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        """As without wrappers. A module above this one sees the wrapper's name, as in torch."""
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield bare(name), parameter

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        """As without wrappers."""
        for name, buffer in super().named_buffers(*args, **kwargs):
            yield bare(name), buffer

    # ---- computing

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, with whole parameters."""
        precision = self.mixed_precision
        casts = precision.cast_forward_inputs
        if self._fsdp_state.is_root:
            casts = precision.cast_root_forward_inputs
        if casts and precision.param_dtype is not None:
            args = cast_floating(args, precision.param_dtype)
            kwargs = cast_floating(kwargs, precision.param_dtype)
        return self._fsdp_wrapped_module(*args, **kwargs)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """A block whose backward passes do not reduce: each rank keeps its own whole gradients.

        That is memory for as many numbers as the model has parameters, on each rank; accumulating
        without it keeps parts. The forward passes are to be in the block, too. RuntimeError on an
        inner wrapper.
        """
        self._be_root("no_sync()")
        units = list(self._units())
        before = [unit.sync for unit in units]
        try:
            for unit in units:
                unit.sync = False
            yield
        finally:
            for unit, sync in zip(units, before, strict=True):
                unit.sync = sync

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale gradients down so that the norm of all of them, of all ranks, is at most
        `max_norm`; returns the norm before. All ranks call it. RuntimeError on an inner wrapper.
        """
        self._be_root("clip_grad_norm_()")
        total = clip_grad_norm_(self.parameters(), max_norm, norm_type)
        whole: Tensor = wrapped_state.as_chosen(total, StateDictType.FULL_STATE_DICT)
        return whole

    def register_comm_hook(self, state: Any, hook: Callable[..., Any]) -> None:
        """Let `hook` reduce gradients, as those of `algorithms._comm_hooks.default_hooks` do.

        With NO_SHARD `hook(state, grad)` changes a unit's flat gradients in place; else
        `hook(state, grad, output)` fills `output` with this rank's part of `grad`, which has one
        of that length for each rank. It divides by the number of ranks itself. It is called in
        backward and nothing goes on beside it; one small all-reduce more tells which parameters
        were used. AssertionError on an inner wrapper, with hybrid sharding, or for a second hook.
        """
        if not self.check_is_root():
            raise AssertionError("register_comm_hook can only be called on a root instance.")
        for each in FullyShardedDataParallel.fsdp_modules(self):
            if each.sharding_strategy in HYBRID:
                raise AssertionError(
                    "Communication hook is not supported for hybrid strategies: "
                    f"{each.sharding_strategy}"
                )
        if any(unit.reduction is not None for unit in self._units()):
            raise AssertionError("A communication hook is already registered")
        if not callable(hook):
            raise ValueError(f"The communication hook must be callable but got {hook}")
        for unit in self._units():
            unit.reduction = GradientHook(hook, state)

    def apply(self, fn: Callable[[Module], Any]) -> FullyShardedDataParallel:
        """Call `fn` on every module, children first, with whole parameters, which it may change."""
        if self._fsdp_state.summoned:  # below a wrapper whose `apply` this is
            return super().apply(fn)
        with self.summon_full_params(self):
            return super().apply(fn)

    def check_is_root(self) -> bool:
        """Whether it is the outermost wrapper."""
        self._fsdp_state.make_root()
        return self._fsdp_state.is_root

    def _be_root(self, what: str) -> None:
        if not self.check_is_root():
            raise RuntimeError(
                f"`{what}` on inner FSDP instances is not supported. Please call `{what}` on root "
                "FSDP instance."
            )

    def _units(self) -> Iterator[Unit]:
        return (unit for state in self._fsdp_state.states() for unit in state.units)

    # ---- the whole

    @staticmethod
    def fsdp_modules(module: Module, root_only: bool = False) -> list[FullyShardedDataParallel]:
        """The wrappers in a tree; with `root_only` those that have none above them."""
        found = list(wrapped_state.wrappers(module, FullyShardedDataParallel))
        if not root_only:
            return found
        inner = {id(below) for each in found for below in each.modules() if below is not each}
        return [each for each in found if id(each) not in inner]

    @staticmethod
    def summon_full_params(
        module: Module,
        recurse: bool = True,
        writeback: bool = True,
        rank0_only: bool = False,
        offload_to_cpu: bool = False,
        with_grads: bool = False,
    ) -> contextlib.AbstractContextManager[None]:
        """A block in which whole parameters stand in the modules, copies of this rank.

        writeback    changes of them (the same on all ranks) are kept, else forgotten.
        rank0_only   only the first rank has them, the others keep their parts.
        with_grads   gradients are whole, too.
        offload_to_cpu is accepted and changes nothing. All ranks enter it, and wait for each other.
        No forward or backward inside. NotImplementedError for `writeback` with `rank0_only`.
        """
        found = FullyShardedDataParallel.fsdp_modules(module)
        if not recurse:
            found = [each for each in found if each is module]
        states = [each._fsdp_state for each in found]
        return summoned(states, writeback, rank0_only, with_grads)

    # ---- state

    @staticmethod
    def set_state_dict_type(
        module: Module,
        state_dict_type: StateDictType,
        state_dict_config: StateDictConfig | None = None,
        optim_state_dict_config: OptimStateDictConfig | None = None,
    ) -> StateDictSettings:
        """Say what `state_dict` and `optim_state_dict` give, of all wrappers in `module`; returns
        what was set before. RuntimeError for a config of another type, or wrappers that differ.
        """
        before = FullyShardedDataParallel.get_state_dict_type(module)
        settings = wrapped_state.settings_for(
            state_dict_type, state_dict_config, optim_state_dict_config
        )
        for each in FullyShardedDataParallel.fsdp_modules(module):
            each._state_dict_settings = settings
        return before

    @staticmethod
    def get_state_dict_type(module: Module) -> StateDictSettings:
        """What is set, of all wrappers in `module`."""
        found = [w._state_dict_settings for w in FullyShardedDataParallel.fsdp_modules(module)]
        if any(each != found[0] for each in found):
            raise RuntimeError(
                "All FSDP modules must have the same state dict settings. "
                f"Got {found[0]} and {next(each for each in found if each != found[0])}."
            )
        return found[0] if found else wrapped_state.settings_for(StateDictType.FULL_STATE_DICT)

    @staticmethod
    @contextlib.contextmanager
    def state_dict_type(
        module: Module,
        state_dict_type: StateDictType,
        state_dict_config: StateDictConfig | None = None,
        optim_state_dict_config: OptimStateDictConfig | None = None,
    ) -> Iterator[None]:
        """A block with `set_state_dict_type`."""
        before = FullyShardedDataParallel.set_state_dict_type(
            module, state_dict_type, state_dict_config, optim_state_dict_config
        )
        try:
            yield
        finally:
            for each in FullyShardedDataParallel.fsdp_modules(module):
                each._state_dict_settings = before

    @staticmethod
    def optim_state_dict(
        model: Module,
        optim: Optimizer,
        optim_state_dict: dict[str, Any] | None = None,
        group: Any = None,
    ) -> dict[str, Any]:
        """The state of `optim`, or `optim_state_dict`, under the names of the model's parameters;
        tensors whole or in parts as `set_state_dict_type` says. All ranks call it.

        `group` is accepted: the ranks are those of the model.
        """
        settings = FullyShardedDataParallel.get_state_dict_type(model)
        return wrapped_state.optimizer_state(model, optim, optim_state_dict, settings)

    @staticmethod
    def optim_state_dict_to_load(
        model: Module,
        optim: Optimizer,
        optim_state_dict: dict[str, Any],
        is_named_optimizer: bool = False,
        load_directly: bool = False,
        group: Any = None,
    ) -> dict[str, Any]:
        """State by names, from any number of ranks, as `optim.load_state_dict` takes it; loaded
        right away with `load_directly`. `is_named_optimizer` and `group` are accepted and ignored.
        """
        state = wrapped_state.optimizer_state_to_load(model, optim, optim_state_dict)
        if load_directly:
            optim.load_state_dict(state)
        return state


class _Ignored:
    """What the user wants to be left alone: modules, and parameters with buffers."""

    def __init__(self, modules: Iterable[Module] | None, states: Iterable[Any] | None) -> None:
        if modules is not None and states is not None:
            raise ValueError(
                "Cannot pass both ignored_modules and ignored_states at the same time. Please just "
                "pass ignored_states."
            )
        self.states = list(modules if modules is not None else states or ())
        for each in self.states:
            if not isinstance(each, (Module, Tensor)):
                raise TypeError(
                    "ignored_states expects all nn.Parameter or all nn.Module list elements, got "
                    f"{type(each)}"
                )
        self.modules = {
            below for m in self.states if isinstance(m, Module) for below in m.modules()
        }
        inside = [t for m in self.modules for t in (*m.parameters(), *m.buffers())]
        self.parameters = [*inside, *(t for t in self.states if isinstance(t, Tensor))]
        self.ids = {id(tensor) for tensor in self.parameters}


def _given(mesh: DeviceMesh, strategy: ShardingStrategy) -> DeviceMesh | None:
    """The mesh that a wrapper below is to be given."""
    if strategy is ShardingStrategy.NO_SHARD:
        return DeviceMesh.from_group(mesh.get_group(0), "cpu")
    return mesh


def _wrap_below(module: Module, policy: Any, kept: _Ignored, options: dict[str, Any]) -> None:
    """Wrap what `policy` takes below `module`."""
    for path, each in module.named_modules():
        if isinstance(each, FullyShardedDataParallel):
            raise ValueError(
                "FSDP auto wrapping requires modules to not already have FSDP applied but found "
                f"{path} in {module}"
            )
    chosen = chosen_modules(
        module, policy, ignored_modules=kept.modules, ignored_params=kept.parameters,
        root_kwargs=options,
    )  # fmt: skip
    chosen.pop(module, None)
    precision = options["mixed_precision"]
    if precision is not None and precision.param_dtype is not None:
        own = tuple(precision._module_classes_to_ignore)
        for each in module.modules():
            if isinstance(each, own) and each is not module and each not in kept.modules:
                chosen[each] = {**options, "mixed_precision": None}
                _compute_as_it_is(each)
    replace_modules(module, chosen, FullyShardedDataParallel)


def _compute_as_it_is(module: Module) -> None:
    """Let a module get inputs in its own dtype and give results in that of its inputs."""
    own = next((p.dtype for p in module.parameters()), None)
    given: list[Any] = []

    def before(module: Module, args: Any) -> Any:
        map_tensors(lambda t: given.append(t.dtype) or t, args)  # type: ignore[func-returns-value]
        return args if own is None else cast_floating(args, own)

    def after(module: Module, args: Any, output: Any) -> Any:
        dtype = given[0] if given else None
        given.clear()
        return output if dtype is None else cast_floating(output, dtype)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)
