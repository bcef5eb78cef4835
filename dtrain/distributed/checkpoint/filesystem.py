"""Checkpoints as folders: FileSystemWriter and FileSystemReader.

A checkpoint is a folder with one safetensors file a rank (or thread) and a manifest. It is made
under another name beside its place (".NAME.RANDOM.partial"), is on the disk before it gets its
name by one rename, and replaces an older one of that name by one exchange; only then is the older
one deleted. All ranks must see the same file system. Source:
torch.distributed.checkpoint.filesystem.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from dtrain.distributed.checkpoint import _disk, _manifest, _series, _shard
from dtrain.distributed.checkpoint._draft import Draft, discard
from dtrain.distributed.checkpoint.api import DamagedCheckpoint
from dtrain.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from dtrain.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from dtrain.distributed.checkpoint.staging import BlockingAsyncStager
from dtrain.distributed.checkpoint.storage import (
    CheckpointId,
    StorageReader,
    StorageWriter,
    WriteResult,
)
from dtrain.futures import Future

T = TypeVar("T")


class SerializationFormat(Enum):
    """torch's formats. Both are accepted; what is written is always safetensors."""

    TORCH_SAVE = "torch_save"
    SAFETENSORS = "safetensors"


class _Folder:
    """What reader and writer share: a path that each save or load may change."""

    def __init__(self, path: CheckpointId) -> None:
        self.path = Path("." if path is None else path).absolute()

    def reset(self, checkpoint_id: CheckpointId = None) -> None:
        """A new save or load: at `checkpoint_id`, or where the last one was."""
        if checkpoint_id is not None:
            self.path = Path(checkpoint_id).absolute()

    @property
    def checkpoint_id(self) -> Path:
        """The folder."""
        return self.path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: CheckpointId) -> bool:
        """Whether it is a path, and no URL."""
        return checkpoint_id is not None and "://" not in os.fspath(checkpoint_id)


class FileSystemWriter(_Folder, BlockingAsyncStager, StorageWriter):
    """Saves checkpoints into folders.

    `path`: the folder, unless `save` has a `checkpoint_id`. `thread_count`: files a rank writes at
    once; one thread hashes about 1.5 GB/s. `sync_files=False` does not wait for the disk: after a
    power cut the checkpoint may be damaged, which loading notices. `overwrite=False` refuses a
    folder that has a checkpoint. `keep` (not in torch): after a save that many checkpoints of the
    series remain (`step-100`, `step-90`, ...: names that end in numbers), older ones are deleted.
    `cache_staged_state_dict`: `async_save` keeps its copy's memory for the next save.
    Accepted and ignored: `single_file_per_rank` (it is one file a thread), `per_thread_copy_ahead`,
    `_extensions` and `serialization_format` (safetensors).
    """

    def __init__(
        self,
        path: CheckpointId = None,
        single_file_per_rank: bool = True,
        sync_files: bool = True,
        thread_count: int = 1,
        per_thread_copy_ahead: int = 10_000_000,
        cache_staged_state_dict: bool = False,
        overwrite: bool = True,
        _extensions: Any = None,
        serialization_format: SerializationFormat = SerializationFormat.TORCH_SAVE,
        *,
        keep: int | None = None,
    ) -> None:
        super().__init__(path)
        BlockingAsyncStager.__init__(self, cache_staged_state_dict)
        if thread_count < 1 or (keep is not None and keep < 1):
            raise ValueError(f"thread_count={thread_count} and keep={keep} must be 1 or more")
        self.sync_files, self.thread_count = sync_files, thread_count
        self.overwrite, self.keep = overwrite, keep
        self._draft: Draft | None = None

    def storage_meta(self) -> StorageMeta:
        """The checkpoint's folder."""
        return StorageMeta(checkpoint_id=str(self.path))

    def set_up_storage_writer(self, is_coordinator: bool) -> None:
        """The coordinator refuses, before anything is written, a folder that it may not replace."""
        self._draft = None
        if is_coordinator:
            _check_replaceable(self.path, self.overwrite)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the folder, under its first name, and tell the ranks."""
        self._draft = Draft(self.path)
        return [
            SavePlan(plan.items, (str(self._draft.path), rank), plan.planner_data)
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's tensors; returns when they are on the disk."""
        folder, rank = Path(plan.storage_data[0]), plan.storage_data[1]
        values = [i for i in plan.items if i.type is WriteItemType.BYTE_IO]
        tensors = [i for i in plan.items if i.type is not WriteItemType.BYTE_IO]
        shares = _shares(tensors, self.thread_count)

        def write(number: int) -> list[WriteResult]:
            part = "" if len(shares) == 1 else f"-{number}"
            path = folder / f"rank-{rank}{part}.safetensors"
            return _write_file(path, shares[number], planner, self.sync_files)

        texts: list[Any] = [(item, planner.resolve_data(item)) for item in values]
        results = [WriteResult(i.index, i.nbytes, {"value": t.read().decode()}) for i, t in texts]
        for part in _all(write, range(len(shares)), self.thread_count):
            results += part
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the manifest, give the folder its name, delete what it replaces."""
        draft = self._draft
        assert draft is not None
        metadata.storage_data = _gathered(metadata, results)
        for name, file in metadata.storage_data["files"].items():
            _check_visible(draft.path / name, file["size"])
        with _disk.NewFile(draft.path / _manifest.NAME, self.sync_files) as file:
            file.write(_manifest.build(metadata))
        replaced = draft.publish(self.sync_files)
        self._draft = None
        excess = [] if self.keep is None else _series.series_of(self.path)[self.keep :]
        for old in (replaced, *excess):
            if old not in (None, self.path):
                discard(old)

    def give_up(self) -> None:
        """Delete what was written of a save that failed."""
        draft, self._draft = self._draft, None
        if draft is not None:
            draft.give_up()


def _all(work: Callable[[Any], T], things: Sequence[Any], threads: int) -> list[T]:
    """The results of `work` on all things, so many at once."""
    if threads == 1 or len(things) < 2:
        return [work(thing) for thing in things]
    with ThreadPoolExecutor(threads, "checkpoint-files") as pool:
        return list(pool.map(work, things))


def _check_replaceable(folder: Path, overwrite: bool) -> None:
    """Refuse what is there and is no checkpoint, or is one that must stay."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: a checkpoint is a folder")
    entries = {path.name for path in folder.iterdir()}
    if entries and not overwrite:
        raise FileExistsError(f"Checkpoint already exists at {folder} and overwrite=False.")
    other = {n for n in entries if n != _manifest.NAME and not n.endswith(".safetensors")}
    if other or (entries and _manifest.NAME not in entries):
        raise FileExistsError(
            f"{folder} has files that are no part of a checkpoint ({', '.join(sorted(entries)[:5])}"
            "): saving there would delete them. Save to a folder of its own."
        )


def _shares(items: Sequence[WriteItem], count: int) -> list[list[WriteItem]]:
    """Items in at most `count` lists of about the same number of bytes, none empty."""
    shares: list[list[WriteItem]] = [[] for _ in range(count)]
    loads = [0] * count
    for item in sorted(items, key=lambda i: -i.nbytes) if count > 1 else items:
        least = loads.index(min(loads))
        shares[least].append(item)
        loads[least] += item.nbytes
    return [share for share in shares if share]


def _write_file(
    path: Path, items: list[WriteItem], planner: SavePlanner, sync: bool
) -> list[WriteResult]:
    # Larger numbers first, so that all data are aligned in the file.
    items = sorted(items, key=lambda i: -_itemsize(i))
    tensors: list[Any] = [planner.resolve_data(item) for item in items]
    arrays = [(_name_of(i), tensor._data) for i, tensor in zip(items, tensors, strict=True)]
    written = _shard.write_shard(path, arrays, sync)
    begins = written.pop("begins")
    return [
        WriteResult(item.index, item.nbytes, {"file": path.name, "begin": begin, **written})
        for item, begin in zip(items, begins, strict=True)
    ]


def _itemsize(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return item.tensor_data.properties.dtype.itemsize


def _name_of(item: WriteItem) -> str:
    """The name of a piece in its file: the tensor's, with the box where it is a part."""
    data = item.tensor_data
    assert data is not None
    return item.index.fqn + (str(data.chunk) if data.chunk.sizes != data.size else "")


def _gathered(metadata: Metadata, results: list[list[WriteResult]]) -> dict[str, Any]:
    """What the manifest says of files, chunks and values, from all ranks' results."""
    found = {result.index: result.storage_data for part in results for result in part}
    files, chunks, values = {}, {}, {}
    for data in found.values():
        if "file" in data:
            files[data["file"]] = {"size": data["size"], "sha256": data["sha256"]}
    for fqn, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            places = [found[MetadataIndex(fqn, c.offsets)] for c in entry.chunks]
            chunks[fqn] = [(place["file"], place["begin"]) for place in places]
        else:
            values[fqn] = json.loads(found[MetadataIndex(fqn)]["value"])
    return {"files": files, "chunks": chunks, "values": values}


def _check_visible(path: Path, size: int) -> None:
    if not path.is_file() or path.stat().st_size != size:
        raise OSError(
            f"{path}, which a rank has written, is not here on the coordinator: all ranks must "
            "save to one file system that all of them see"
        )


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


class FileSystemReader(_Folder, StorageReader):
    """Loads checkpoints from folders.

    `fallback` (not in torch): where the checkpoint is damaged, the newest undamaged one before it
    is loaded instead, with a warning: folders beside it whose names differ in the number at the
    end only (`step-90` for `step-100`). `thread_count`: files that are verified at once.
    """

    def __init__(
        self,
        path: CheckpointId = None,
        _extension_registry: Any = None,
        *,
        fallback: bool = True,
        thread_count: int = 1,
    ) -> None:
        super().__init__(path)
        self.fallback, self.thread_count = fallback, thread_count
        self.metadata: Metadata | None = None

    def read_metadata(self) -> Metadata:
        """The manifest's content."""
        return _manifest.read(self.path)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        """Keep the manifest's content."""
        self.metadata = metadata

    def verify(self, rank: int, size: int) -> None:
        """Check size and SHA-256 of every file; the ranks share them. DamagedCheckpoint."""
        files = sorted(self._held["files"].items())[rank::size]

        def check(entry: tuple[str, dict[str, Any]]) -> None:
            name, file = entry
            _shard.check_file(self._place(name), file["size"], file["sha256"])

        _all(check, files, self.thread_count)

    def older(self) -> list[str]:
        """The checkpoints before this one."""
        return [str(path) for path in _series.older_than(self.path)] if self.fallback else []

    @property
    def _held(self) -> dict[str, Any]:
        assert self.metadata is not None
        return self.metadata.storage_data  # type: ignore[no-any-return]

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read this rank's pieces into what the planner gives, straight where memory allows it."""
        pieces: dict[str, list[Any]] = {}
        for item in plan.items:
            fqn = item.storage_index.fqn
            if item.type is LoadItemType.BYTE_IO:
                text = json.dumps(self._held["values"][fqn]).encode()
                planner.load_bytes(item, io.BytesIO(text))
            else:
                index = item.storage_index.index
                name, begin = self._held["chunks"][fqn][index]
                pieces.setdefault(name, []).append((begin, item))
        for name, items in pieces.items():
            with _opened(self._place(name)) as file:
                for begin, item in sorted(items, key=lambda piece: piece[0]):
                    self._read_piece(file, begin, item, planner)
        return _done(None)

    def _place(self, name: str) -> Path:
        return self.path / name

    def _read_piece(self, file: int, begin: int, item: Any, planner: LoadPlanner) -> None:
        assert self.metadata is not None
        stored: Any = self.metadata.state_dict_metadata[item.storage_index.fqn]
        chunk, dtype = stored.chunks[item.storage_index.index], stored.properties.dtype.numpy
        target = planner.resolve_tensor(item)
        _shard.read_box(file, begin, chunk.sizes, item.storage_offsets, dtype, target._data)
        planner.commit_tensor(item, target)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path} is missing") from None
    try:
        yield file
    finally:
        os.close(file)
