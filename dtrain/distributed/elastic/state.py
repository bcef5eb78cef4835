"""Training that goes on where it was: `State`, what has to survive, and `run`, the loop around it.

`commit` keeps the state in memory that dtrun holds (`memory`), `checkpoint` on disk. `restore`
takes the newest commit that all ranks have which have any, gives it to those that have none (a
node that is new), and without one the newest complete checkpoint. So a rank that dies costs the
step it was in, as long as dtrun on one node is alive. Rules: 1. the state is the same on all ranks
(data parallel), but for the random generator, which each rank keeps for itself; parts of sharded
models belong into `distributed.checkpoint`. 2. Every method here is collective, `commit` excepted,
which moves nothing between ranks.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from dtrain import random
from dtrain.comm.collectives import Broadcast
from dtrain.distributed import checkpoint as dcp
from dtrain.distributed.checkpoint._series import series_of
from dtrain.distributed.elastic.memory import Memory
from dtrain.distributed.elastic.packing import pack, unpack
from dtrain.distributed.notice import listen, should_stop
from dtrain.distributed.objects import all_gather_object
from dtrain.distributed.world import current_world, resolve

_OWN = ("folder", "every", "keep", "group", "step")


class State:
    """What has to survive: `State(model=model, optimizer=optimizer, folder="runs", lr=0.1)`.

    Objects with `state_dict` and `load_state_dict` are asked; anything else is plain data: numbers,
    str, lists, dicts, tensors, read and set as attributes: `state.lr`. `step` counts the commits.
    With a `folder`, every `every`-th commit is also a checkpoint there, of which `keep` are kept.
    Not in torch.
    """

    def __init__(
        self,
        *,
        folder: str | PathLike[str] | None = None,
        every: int = 100,
        keep: int = 2,
        group: Any = None,
        **objects: Any,
    ) -> None:
        taken = [name for name in objects if name in _OWN or hasattr(State, name)]
        if taken:
            raise ValueError(f"State: {taken[0]!r} is a name of State's own; choose another")
        if every < 1 or keep < 1:
            raise ValueError(f"State: every and keep are at least 1, got {every} and {keep}")
        self.folder = None if folder is None else Path(folder)
        self.every = every
        self.keep = keep
        self.group = group
        self.step = 0
        self._objects = {n: v for n, v in objects.items() if hasattr(v, "load_state_dict")}
        self._values = [name for name in objects if name not in self._objects]
        self.__dict__.update(objects)
        self._memory = Memory.inherited()

    def state_dict(self) -> dict[str, Any]:
        """Everything that is committed, but for the random generator."""
        objects = {name: value.state_dict() for name, value in self._objects.items()}
        values = {name: getattr(self, name) for name in self._values}
        return {"step": self.step, "objects": objects, "values": values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; KeyError when it was of other names."""
        for name, value in self._objects.items():
            value.load_state_dict(state["objects"][name])
        for name in self._values:
            setattr(self, name, state["values"][name])
        self.step = state["step"]

    def commit(self) -> None:
        """The step is done: count it, keep the state in memory, and now and then on disk.

        Costs a copy of the state; collective only when it is a checkpoint's turn.
        """
        self.step += 1
        if self._memory is not None:
            own = pack({"random": random.get_rng_state()})
            shared = pack(self.state_dict())
            size = sum(memoryview(part).nbytes for part in own)
            self._memory.write(self.step, [size.to_bytes(8, "little"), *own, *shared])
        if self.folder is not None and self.step % self.every == 0:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Write a checkpoint `folder`/step-N, complete or not there; nothing without a folder."""
        if self.folder is None:
            return
        shared = np.concatenate([np.frombuffer(part, np.uint8) for part in pack(self.state_dict())])
        content = {"state": shared, f"random.{self._rank()}": random.get_rng_state()}
        target = self.folder / f"step-{self.step}"
        writer = dcp.FileSystemWriter(target, keep=self.keep)
        dcp.save(content, storage_writer=writer, process_group=self.group)

    def restore(self) -> str:
        """Go back to the newest state there is: "memory", "disk", or "" when there is none."""
        held = set() if self._memory is None else self._memory.numbers()
        numbers = self._everybodys(sorted(held))
        newest = newest_common(numbers)
        saved = self._checkpoints()
        if newest >= 0 and (not saved or newest >= saved[0][0]):
            self._from_memory(newest, [newest in found for found in numbers])
            return "memory"
        return "disk" if any(self._from_disk(path) for _, path in saved) else ""

    def _from_memory(self, number: int, has: list[bool]) -> None:
        shared = b""
        if has[self._rank()]:
            assert self._memory is not None
            data = memoryview(self._memory.read(number))
            cut = 8 + int.from_bytes(data[:8], "little")
            random.set_rng_state(unpack(data[8:cut])["random"])
            shared = data[cut:]
        if not all(has):
            shared = self._sent(shared, has.index(True))
        self.load_state_dict(unpack(shared))

    def _sent(self, shared: Any, source: int) -> Any:
        """The bytes that rank `source` of the group has, on all ranks."""
        sizes = self._everybodys(len(shared))
        buffer = np.empty(sizes[source], np.uint8)
        if self._rank() == source:
            buffer[:] = np.frombuffer(shared, np.uint8)
        resolve(self.group).issue(Broadcast(buffer, source))
        return buffer

    def _from_disk(self, path: Path) -> bool:
        """Load one checkpoint; False, with a warning, when it is damaged."""
        reader = dcp.FileSystemReader(path, fallback=False)
        mine = f"random.{self._rank()}"
        try:
            sizes, damage = _sizes(reader, ("state", mine)), ""
        except dcp.DamagedCheckpoint as error:
            sizes, damage = {}, str(error)
        damages = [told for told in self._everybodys(damage) if told]
        content = {name: np.empty(size, np.uint8) for name, size in sizes.items()}
        if not damages:
            try:
                dcp.load(content, storage_reader=reader, process_group=self.group)
            except dcp.CheckpointException as error:
                damages = [str(error)]
        if damages:
            warnings.warn(f"the checkpoint {path} is damaged: {damages[0]}", stacklevel=3)
            return False
        if mine in content:
            random.set_rng_state(content[mine])
        self.load_state_dict(unpack(content["state"]))
        return True

    def _checkpoints(self) -> list[tuple[int, Path]]:
        """Those that rank 0 sees, newest first: all ranks try the same ones."""
        found: list[str] = []
        if self.folder is not None:
            paths = series_of(self.folder / "step-0")
            found = self._everybodys([str(path) for path in paths])[0]
        return [(int(text.rpartition("-")[2]), Path(text)) for text in found]

    def _everybodys(self, value: Any) -> list[Any]:
        if self._alone():
            return [value]
        values: list[Any] = [None] * resolve(self.group).size()
        all_gather_object(values, value, group=self.group)
        return values

    def _rank(self) -> int:
        return 0 if self._alone() else resolve(self.group).rank()

    def _alone(self) -> bool:
        return self.group is None and current_world().default is None


def newest_common(numbers: Sequence[Collection[int]]) -> int:
    """The newest commit of all that are up to date; -1 without one.

    Ranks commit one step behind each other at most, and each holds two: whoever is further behind
    was away, and counts as having none.
    """
    newest = max((max(found) for found in numbers if found), default=-1)
    near = [set(found) for found in numbers if found and max(found) >= newest - 1]
    return max(set.intersection(*near), default=-1) if near else -1


def _sizes(reader: dcp.FileSystemReader, names: Iterable[str]) -> dict[str, int]:
    """The lengths of those of these arrays of bytes that a checkpoint has."""
    there = reader.read_metadata().state_dict_metadata
    return {name: there[name].size[0] for name in names if name in there}


def run(state: State, steps: int) -> Iterator[int]:
    """`for step in run(state, 1000): ...` does the steps that are left, each committed at its end.

    Restores first. When a rank is asked to stop (SIGTERM, SIGUSR1, `request_stop`), all ranks end
    behind the same step: with a checkpoint, if there is a folder, and SystemExit(0).
    """
    listen()
    state.restore()
    while state.step < steps:
        yield state.step
        state.commit()
        if should_stop(state.group):
            state.checkpoint()
            sys.exit(0)
