"""The manifest: one JSON file that makes a folder a checkpoint.

It lists the tensors with their chunks (which box, in which file, from which byte), the values, and
the files with size and SHA-256; and it has a digest of itself. Reading believes nothing: a text
that is not, to the byte, what `build` would write of its content is DamagedCheckpoint.
"""

from __future__ import annotations

import json
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

from dtrain import dtypes
from dtrain.distributed.checkpoint._values import from_json, to_json
from dtrain.distributed.checkpoint.api import DamagedCheckpoint
from dtrain.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from dtrain.distributed.checkpoint.planner_helpers import check_cover
from dtrain.tensor import Size

NAME = "manifest.json"
FORMAT = "dtrain checkpoint 1"
LIMIT = 64 << 20  # bytes; a larger one is an error, or an attack
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FILE_NAME = re.compile(r"[\w-]+(\.[\w-]+)*")
_WRONG = (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError)


def build(metadata: Metadata) -> bytes:
    """The text of a manifest. `metadata.storage_data` has "files", "chunks" and "values"."""
    held = metadata.storage_data
    tensors = {}
    for fqn, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            places = zip(entry.chunks, held["chunks"][fqn], strict=True)
            tensors[fqn] = {
                "dtype": entry.properties.dtype.name,
                "requires_grad": entry.properties.requires_grad,
                "shape": list(entry.size),
                "chunks": [[list(c.offsets), list(c.sizes), *place] for c, place in places],
            }
    document = {
        "format": FORMAT,
        "tensors": tensors,
        "values": held["values"],
        "paths": {
            k: to_json(list(p), k)
            for k, p in (metadata.planner_data or {}).items()
            if tuple(k.split(".")) != tuple(p)
        },
        "files": held["files"],
    }
    text = _sealed(document)
    if len(text) > LIMIT:
        raise ValueError(f"the manifest has {len(text)} bytes (limit {LIMIT}): make values tensors")
    return text


def _sealed(document: dict[str, Any]) -> bytes:
    document = {k: v for k, v in document.items() if k != "sha256"}
    digest = sha256(json.dumps(document).encode()).hexdigest()
    return _text({**document, "sha256": digest}).encode()


def _text(document: dict[str, Any]) -> str:
    """JSON with a line for each tensor, value and file."""
    parts = []
    for key, section in document.items():
        text = json.dumps(section)
        if type(section) is dict and section:
            lines = (f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in section.items())
            text = "{\n" + ",\n".join(lines) + "\n}"
        parts.append(f"{json.dumps(key)}: {text}")
    return "{" + ",\n".join(parts) + "}\n"


def read(folder: Path) -> Metadata:
    """The content of a checkpoint's manifest.

    FileNotFoundError when there is no such folder, DamagedCheckpoint when it is no checkpoint.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no checkpoint at {folder}: no such folder")
    path = folder / NAME
    try:
        with open(path, "rb") as file:
            text = file.read(LIMIT + 1)
    except FileNotFoundError:
        theirs = (folder / ".metadata").exists()
        hint = "; PyTorch wrote it, with pickle: dcp_to_torch_save reads it there" if theirs else ""
        raise DamagedCheckpoint(f"{folder} has no {NAME}: it is no checkpoint{hint}") from None
    try:
        return parse(text)
    except _WRONG as error:
        raise DamagedCheckpoint(f"{path} is damaged: {type(error).__name__}: {error}") from None


def parse(text: bytes) -> Metadata:
    """The content of a manifest's text; ValueError and its kin when anything is wrong with it."""
    if len(text) > LIMIT:
        raise ValueError(f"more than {LIMIT} bytes")
    document = json.loads(text)
    if document["format"] != FORMAT:
        raise ValueError(f"format {document['format']!r}, this version reads {FORMAT!r}")
    if _sealed(document) != text:
        raise ValueError("it does not have its own digest")
    files = document["files"]
    for name, file in files.items():
        if not _FILE_NAME.fullmatch(name):
            raise ValueError(f"the file name {name!r}")
        if not (_natural(file["size"]) and _DIGEST.fullmatch(file["sha256"])):
            raise ValueError(f"{name} has the size and digest {file}")
    content: dict[str, Any] = {fqn: BytesStorageMetadata() for fqn in document["values"]}
    chunks = {}
    for fqn, entry in document["tensors"].items():
        content[fqn], chunks[fqn] = _tensor(fqn, entry, files)
    for value in document["values"].values():
        from_json(value)  # raises
    paths = {key: tuple(key.split(".")) for key in content}
    paths |= {key: tuple(map(_step, path)) for key, path in document["paths"].items()}
    held = {"files": files, "chunks": chunks, "values": document["values"]}
    return Metadata(content, planner_data=paths, storage_data=held, version=FORMAT)


def _step(step: Any) -> Any:
    """A key, or (index,) of a list."""
    if type(step) is dict and len(step["!tuple"]) == 1 and _natural(step["!tuple"][0]):
        return tuple(step["!tuple"])
    if type(step) not in (str, int):
        raise ValueError(f"the step {step!r} of a path")
    return step


def _natural(number: Any) -> bool:
    return type(number) is int and number >= 0


def _tensor(fqn: str, entry: Any, files: Any) -> tuple[TensorStorageMetadata, list[Any]]:
    """A tensor's metadata and the places of its chunks; ValueError unless they are inside."""
    dtype, size = dtypes.BY_NAME[entry["dtype"]], Size(entry["shape"])
    chunks = [ChunkStorageMetadata(Size(c[0]), Size(c[1])) for c in entry["chunks"]]
    places = [(c[2], c[3]) for c in entry["chunks"]]
    check_cover(fqn, size, chunks)
    for chunk, (name, begin) in zip(chunks, places, strict=True):
        box = (*chunk.offsets, *chunk.sizes, begin)
        if (
            not all(map(_natural, box))
            or begin > files[name]["size"] - chunk.volume * dtype.itemsize
        ):
            raise ValueError(f"{fqn}: the chunk {chunk} is not inside {name}")
    properties = TensorProperties(dtype, bool(entry["requires_grad"]))
    return TensorStorageMetadata(properties, size, chunks), places
