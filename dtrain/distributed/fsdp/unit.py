"""A unit: parameters that are gathered and reduced together.

Owns: `Unit`, its states and its verbs, and `Slot`, where a parameter stands in a module. Knows
nothing of modules' calls, nor when anything is to happen: `root` does. One dtype a unit.

    SHARDED    --begin-->  GATHERING  --finish-->  WHOLE  --reshard-->  SHARDED

Each verb may be called in every state; what is done already is not done again.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

import numpy as np

from dtrain.autograd.node import make
from dtrain.comm.collectives import AllReduce, Barrier
from dtrain.comm.reduce import ReduceOp, widened
from dtrain.comm.shards import ReduceShards
from dtrain.distributed.device_mesh import DeviceMesh
from dtrain.distributed.fsdp.hooks import GradientHook, Reduction, reduce_by
from dtrain.distributed.fsdp.layout import Layout
from dtrain.distributed.fsdp.memory import Pool, home_for
from dtrain.distributed.fsdp.meter import Cause, Issued, Landed, Meter
from dtrain.distributed.fsdp.offload import mapped
from dtrain.distributed.fsdp.sharded import facing, sharded_parameter, whole_parameter
from dtrain.distributed.world import ProcessGroup
from dtrain.flat import Array

WRAPPED = "_fsdp_wrapped_module"
PREFIX = WRAPPED + "."
_WRAPPERS = (PREFIX, "_checkpoint_wrapped_module.")


def bare(name: str) -> str:
    """A name without those of wrappers."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


class State(enum.Enum):
    """Where the parameters of a unit are."""

    SHARDED = "sharded"
    GATHERING = "gathering"
    WHOLE = "whole"


@dataclass(frozen=True)
class Slot:
    """A parameter's place: `module._parameters[name]`, called `path` from the root of the unit."""

    module: Any
    name: str
    path: str


@dataclass(frozen=True)
class Precision:
    """Dtypes of a unit: `whole` in forward and backward, `reduced` in which gradients are added."""

    whole: np.dtype[Any]
    reduced: np.dtype[Any]


class Unit:
    """Parameters that this rank has a shard of; all ranks of `mesh` make it alike.

    `slots[i]`: all the places where parameter i stands. The ranks along the last axis of the mesh
    (`group`) own different shards, those along the first of two the same. `given_back`: it shall
    not be kept between forward and backward. Waits for all ranks.
    """

    def __init__(
        self,
        slots: Sequence[Sequence[Slot]],
        parameters: Sequence[Any],
        mesh: DeviceMesh,
        precision: Precision,
        *,
        given_back: bool = False,
        offload: bool = False,
    ) -> None:
        self.slots, self.precision, self.mesh = slots, precision, mesh
        self.group: ProcessGroup = mesh.get_group(mesh.ndim - 1)
        self.replicas: ProcessGroup | None = mesh.get_group(0) if mesh.ndim == 2 else None
        rank = self.group.rank()
        arrays = [p._data for p in parameters]
        self.layout = Layout([a.shape for a in arrays], arrays[0].dtype, self.group.size())
        self.offload = offload  # whether what this rank keeps is in files
        self.home = home_for(
            self.layout, self.group, precision.whole, given_back=given_back, offload=offload
        )
        self.state = State.SHARDED
        self.sharded, self.whole, self._faces = [], [], []
        views = self.layout.views(self.home.array)
        for index, parameter in enumerate(parameters):
            shard = self.home.shards[index]
            if not parameter.is_meta:
                np.copyto(shard, arrays[index][self.layout.rows(index, rank)])
            sharded = sharded_parameter(shard, parameter, mesh, self)
            whole = whole_parameter(views[index], self, index)
            self.sharded.append(sharded)
            self.whole.append(whole)
            # Specs of what was a DTensor before are wanted again, the arrays are not.
            self._faces.append(functools.partial(facing, whole, getattr(parameter, "_spec", None)))
        self.pool = Pool(self.group)  # where gradients are made; a root has one for all its units
        self.meter = Meter()  # told when it is gathered and reduced; a root has one for all, too
        self.where = ""  # the path of the module that it belongs to, in the root
        self.sync = True  # whether the next backward pass reduces
        self.sync_replicas = True  # and whether over the replicas, too
        self._partial: Array | None = None  # what has not been reduced over them yet
        self.reshards = True  # whether it is given back when its gradients are complete
        self.divide_by: float | None = None  # None: the number of ranks
        # The user's ways to reduce and to gather, and what is done to gradients that are reduced.
        self.reduction: Reduction | None = None
        self.all_gather: Any = None
        self.on_reduced: Callable[[Any], None] | None = None
        self.reading = False  # whether a rank may still read what was written before
        self._published = -1  # the versions of the shards when they were last made known
        self._gathering: Issued | None = None
        self._gradients: Array | None = None  # room for those of a pass, and flags
        self._homes: list[Any] = []  # views of it
        self._unreduced: Array | None = None  # the same of passes that did not reduce
        self._grads: Array | None = None  # room for the reduced ones of this rank, and flags
        self._grad_views: list[Any] = []
        self.put(self.sharded)

    @property
    def name(self) -> str:
        """The unit by the path of its first parameter."""
        return self.path_of(0)

    def path_of(self, index: int) -> str:
        """The path of a parameter in the bare model, as far as it is known."""
        own = bare(self.slots[index][0].path)
        return f"{self.where}.{own}" if self.where else own

    @property
    def whole_everywhere(self) -> bool:
        """Whether each rank keeps all of it: there are replicas, and nobody to share with."""
        return self.replicas is not None and self.group.size() == 1

    @property
    def runs_aside(self) -> bool:
        """Whether its calls can go on beside what computes."""
        return self.group.size() > 1 and self.group.arrays.runs_aside

    # ---- parameters

    def written(self) -> int:
        """How often the shards have been changed, all together."""
        return sum(p._version.count for p in self.sharded if p._version is not None)

    @property
    def is_read(self) -> bool:
        """Whether another rank may be reading this rank's shards where they are."""
        return self.reading and not self.home.moves

    def await_readers(self) -> None:
        """Wait until no rank reads these shards any more; all ranks come here, or none."""
        if self.is_read:
            self.group.issue(Barrier())
            self.reading = False

    @property
    def stale(self) -> bool:
        """Whether shards have changed since they were last made known to the other ranks."""
        return self._published != self.written()

    def publish(self) -> None:
        """Let the other ranks of this host see this rank's shards, once all have met."""
        if self._published < 0:
            self._need_values()
        self.home.publish()
        self._published = self.written()

    def begin(self, *, async_op: bool) -> None:
        """Start to gather, unless it is whole, or on its way; all ranks do.

        RuntimeError while a parameter has no values.
        """
        if self._published < 0:
            self._need_values()
        if self.stale and not self.home.moves:
            self.publish()
            self.group.issue(Barrier())
        if self.state is State.WHOLE and self.home.moves and self.stale:
            self.reshard()
        if self.state is not State.SHARDED:
            return
        if self.home.moves and (self.stale or not self.home.stays):
            self._published = self.written()
            now = monotonic()
            if self.all_gather is not None:
                self.home.gather_by(self.all_gather, self.group)
            else:
                work = self.home.gather(self.group, self.name, async_op)
                self._gathering = None if work is None else Issued(work, now, async_op)
        self.state = State.GATHERING

    def _need_values(self) -> None:
        empty = [self.path_of(i) for i, p in enumerate(self.sharded) if p.is_meta]
        if empty:
            raise RuntimeError(
                "FSDP parameters should be materialized from meta device before training, but the "
                f"following were still on meta device: {empty}\nFor example, call "
                "module.to_empty(device) to materialize to device and call "
                "module.reset_parameters() on each module to initialize values."
            )

    def finish(self, asked: float | None = None) -> None:
        """Wait until it is whole. `asked`: when it was asked for, if not now."""
        asked = monotonic() if asked is None else asked
        self.begin(async_op=False)
        self._arrive(asked)
        self.state = State.WHOLE

    def _arrive(self, asked: float) -> None:
        gathering, self._gathering = self._gathering, None
        if gathering is not None:
            wanted = gathering.wait()
            self.meter.gathered(self.where, self.home.array.nbytes, gathering, asked, wanted)

    def show_whole(self) -> None:
        """Let the whole parameters stand in their modules."""
        for whole, sharded in zip(self.whole, self.sharded, strict=True):
            whole._requires_grad = sharded._requires_grad
        self.put([face() for face in self._faces])
        self.reading = True

    def show_sharded(self) -> None:
        """Let the sharded parameters stand in their modules."""
        self.put(self.sharded)

    def put(self, parameters: Sequence[Any]) -> None:
        """Let these stand in the modules."""
        for slots, parameter in zip(self.slots, parameters, strict=True):
            for slot in slots:
                slot.module._parameters[slot.name] = parameter

    def leave(self) -> None:
        """The end of its backward pass."""
        self.show_sharded()
        if self.reshards:
            self.reshard()

    def reshard(self) -> None:
        """Give back what other ranks own."""
        if self.state is State.SHARDED:
            return
        self._arrive(monotonic())
        self.home.release()
        self.state = State.SHARDED

    # ---- gradients

    def gradient_home(self, index: int) -> Any:
        """Where the gradient of a whole parameter is to be made."""
        if self._gradients is None:
            total = self.layout.total
            self._gradients = self.pool.take(total + len(self.whole), self.precision.whole)
            self._homes = [make(view) for view in self.layout.views(self._gradients[:total])]
        return self._homes[index]

    def reduce(self, *, async_op: bool) -> Flight:
        """Begin to add the gradients of all ranks; what has none here contributes nothing.

        Behind the gradients travels a flag for each parameter, above 0 when some rank has one.
        """
        room = self._collected()
        if self._unreduced is not None:
            with np.errstate(over="ignore", invalid="ignore"):  # between parameters lies anything
                np.add(self._unreduced, room, out=self._unreduced, casting="same_kind")
            self.pool.give(room)
            room, self._unreduced = self._unreduced, None
        return Flight(self, room, async_op)

    def keep(self) -> None:
        """Keep the gradients of this rank for a later pass to reduce, in the dtype of reduction."""
        if self.precision.reduced == self.precision.whole:
            return  # where they are
        room, sums = self._collected(), self._unreduced
        if sums is None:
            sums = self._unreduced = self.pool.take(room.size, self.precision.reduced)
            sums[...] = 0
        with np.errstate(over="ignore", invalid="ignore"):
            np.add(sums, room, out=sums, casting="same_kind")
        self.pool.give(room)

    def _collected(self) -> Array:
        """All gradients of this rank in the flat array, and flags; it forgets them."""
        for index, whole in enumerate(self.whole):
            home, given = self.gradient_home(index), whole._grad
            if given is None:
                home._data[...] = 0
            elif given is not home:
                np.copyto(home._data, given._data, casting="same_kind")
            self._gradients[self.layout.total + index] = given is not None  # type: ignore[index]
            whole._grad = None
        assert self._gradients is not None
        room, self._gradients, self._homes = self._gradients, None, []
        return room

    def room_for_reduced(self) -> Array:
        """An array for this rank's reduced gradients, and the flags: where gradients are to stay
        if nothing is there yet.
        """
        held = any(p._grad is not None for p in self.sharded)
        if self.replicas is not None:
            held |= self._partial is not None or not self.sync_replicas
        if self.precision.reduced != self.layout.dtype or held:
            return np.empty(self._reduced_size, self.precision.reduced)
        return self._kept_grads()

    @property
    def _reduced_size(self) -> int:
        return sum(shard.size for shard in self.home.shards) + len(self.sharded)

    def _kept_grads(self) -> Array:
        if self._grads is None:
            room = mapped if self.offload else np.empty
            self._grads = room(self._reduced_size, self.layout.dtype)
            views = self.layout.shard_views(self._grads, self.group.rank())
            self._grad_views = [make(view) for view in views]
        return self._grads

    def reduce_replicas(self, reduced: Array) -> bool:
        """Add the gradients of the replicas, and what earlier passes left; or leave these, too."""
        assert self.replicas is not None
        if self._partial is not None:
            np.add(reduced, self._partial, out=reduced)
        self._partial = None if self.sync_replicas else reduced
        if self.sync_replicas and isinstance(self.reduction, GradientHook):
            gradients = reduced.size - len(self.sharded)
            self.reduction.all_reduce(reduced[:gradients])
            self.replicas.issue(AllReduce(reduced[gradients:]))
        elif self.sync_replicas:
            op = ReduceOp.AVG if self.divide_by is None else ReduceOp.SUM
            self.replicas.issue(AllReduce(reduced, op))
        return self.sync_replicas

    def take(self, reduced: Array) -> None:
        """Let the sharded parameters have the reduced gradients, added to what they have.

        A parameter that no rank had a gradient for keeps what it has.
        """
        kept, flags = self._kept_grads(), reduced[-len(self.sharded) :]
        new = self.layout.shard_views(reduced, self.group.rank())
        for index, (sharded, view) in enumerate(zip(self.sharded, self._grad_views, strict=True)):
            if flags[index] <= 0:
                continue
            if sharded._grad is not None:
                np.add(
                    sharded._grad._data, new[index], out=sharded._grad._data, casting="same_kind"
                )
                sharded._grad._bump_version()
                continue
            if reduced is not kept:
                np.copyto(view._data, new[index], casting="same_kind")
            sharded._grad = view
            view._bump_version()


class Flight:
    """A unit's gradients between `Unit.reduce` and their landing; `room` was lent by the pool."""

    def __init__(self, unit: Unit, room: Array, async_op: bool) -> None:
        self.unit, self.room = unit, room
        self.out = unit.room_for_reduced()
        tail = slice(unit.layout.total, room.size)
        cuts = [[*cuts, tail] for cuts in unit.layout.cuts]
        op = ReduceOp.AVG if unit.divide_by is None else ReduceOp.SUM
        if self.out.dtype not in (room.dtype, widened(room.dtype)):
            self.room = unit.pool.take(room.size, self.out.dtype)
            with np.errstate(over="ignore", invalid="ignore"):
                np.copyto(self.room, room, casting="same_kind")
            unit.pool.give(room)
        if unit.reduction is not None and not unit.whole_everywhere:
            own = unit.layout.cuts
            self.call = reduce_by(unit.reduction, self.room, self.out, own, unit.group, op)
            return
        call, now = ReduceShards(self.room, self.out, cuts, op, unit.name), monotonic()
        self.call = Issued(unit.group.issue(call, async_op=async_op), now, async_op)

    def land(self, cause: Cause) -> None:
        """Wait until the gradients are reduced and let the sharded parameters have them."""
        unit, replicas = self.unit, 0.0
        wanted = self.call.wait()
        unit.pool.give(self.room)
        unit.reading = False
        ready = unit.replicas is None or unit.reduce_replicas(self.out)
        if unit.replicas is not None:
            replicas = monotonic()
        unit.meter.reduced(unit.where, self.room.nbytes, self.call, Landed(cause, wanted, replicas))
        if ready:
            if unit.divide_by is not None:
                np.divide(self.out, self.out.dtype.type(unit.divide_by), out=self.out)
            if unit.on_reduced is not None:
                unit.on_reduced(make(self.out[: self.out.size - len(unit.sharded)]))
            unit.take(self.out)
