"""Nested state dicts as flat ones: {"a": {"b": [t]}} is {"a.b.0": t}, and back.

Dicts are always entered, lists where there is a tensor or a dict in them; what remains is a leaf.
In a path a list's index is a tuple of one int, so that a dict with int keys stays a dict.
Source: torch.distributed.checkpoint._nested_dict, whose keys these are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dtrain.tensor import Tensor

Step = Any  # a dict's key, or (index,) of a list
Path = tuple[Step, ...]


def is_tensor(value: Any) -> bool:
    """Whether it is stored as numbers: a Tensor, a DTensor, or a NumPy array."""
    return isinstance(value, (Tensor, np.ndarray))


def _entered(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value)
    return isinstance(value, list) and any(is_tensor(v) or _entered(v) for v in value)


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """(path, leaf) for everything in a nested state dict."""
    if not _entered(value):
        yield path, value
        return
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if type(key) not in (str, int):
                where = key_of(path) or "the state dict"
                raise TypeError(f"{where}: keys of a state dict are str or int, got {key!r}")
            yield from leaves(entry, (*path, key))
    else:
        for index, entry in enumerate(value):
            yield from leaves(entry, (*path, (index,)))


def key_of(path: Path) -> str:
    """The flat key: a path's steps joined by dots."""
    return ".".join(str(step[0] if type(step) is tuple else step) for step in path)


def flatten_state_dict(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Path]]:
    """({flat key: leaf}, {flat key: path}); ValueError when two paths have one key.

    TypeError for keys that are neither str nor int.
    """
    flat: dict[str, Any] = {}
    paths: dict[str, Path] = {}
    for path, leaf in leaves(state_dict) if state_dict else ():
        key = key_of(path)
        if key in flat:
            raise ValueError(f"duplicated flatten key {key}: {paths[key]} and {path}")
        flat[key], paths[key] = leaf, path
    return flat, paths


def set_element(root: Any, path: Path, value: Any) -> None:
    """Put `value` at `path` of nested dicts and lists, which must have its place already."""
    steps = [step[0] if type(step) is tuple else step for step in path]
    for step in steps[:-1]:
        root = root[step]
    root[steps[-1]] = value


def unflatten_state_dict(flat: Mapping[str, Any], paths: Mapping[str, Path]) -> dict[str, Any]:
    """The nested dicts and lists of which `flat` has the leaves; lists in the order of indices."""
    tree: dict[Any, Any] = {}
    for key, value in flat.items():
        node, path = tree, tuple(paths[key])
        for step in path[:-1]:
            node = node.setdefault(step, {})
        node[path[-1]] = value
    return _with_lists(tree)  # type: ignore[no-any-return]


def _with_lists(node: Any) -> Any:
    """Dicts whose keys are indices become lists. Leaves are told by where they stand: below."""
    inner = {step: _with_lists(v) if type(v) is dict and v else v for step, v in node.items()}
    if inner and all(type(step) is tuple for step in inner):
        return [inner[step] for step in sorted(inner)]
    return inner
