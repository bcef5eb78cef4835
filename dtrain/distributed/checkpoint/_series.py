"""Checkpoints that follow each other: folders side by side whose names end in a number.

"runs/step-100" and "runs/step-90" are of one series, "runs/step-": the same name up to the number.
The one before a checkpoint is that with the largest smaller number; only folders with a manifest
count, so an unfinished save never does.
"""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path

from dtrain.distributed.checkpoint import _manifest

_NUMBERED = re.compile(r"(.*?)(\d+)", re.DOTALL)


def _parts(name: str) -> tuple[str, int] | None:
    found = _NUMBERED.fullmatch(name)
    return None if found is None else (found[1], int(found[2]))


def are_kin(name: str, other: str) -> bool:
    """Whether two names are of one series, or the same."""
    one, two = _parts(name), _parts(other)
    return name == other or (one is not None and two is not None and one[0] == two[0])


def series_of(target: Path) -> list[Path]:
    """The checkpoints of `target`'s series, newest (largest number) first."""
    own = _parts(target.name)
    if own is None or not target.parent.is_dir():
        return []
    found = []
    for folder in target.parent.iterdir():
        parts = _parts(folder.name)
        if parts is not None and parts[0] == own[0] and (folder / _manifest.NAME).is_file():
            found.append((parts[1], folder))
    return [folder for _, folder in sorted(found, reverse=True)]


def older_than(target: Path) -> list[Path]:
    """The checkpoints of the series with smaller numbers, newest first."""
    own = _parts(target.name)
    if own is None:
        return []
    return [f for f in series_of(target) if (_parts(f.name) or own)[1] < own[1]]


def latest(folder: str | PathLike[str], prefix: str = "step-") -> Path | None:
    """The newest checkpoint `folder`/`prefix`NUMBER, None when there is none. Not in torch.

    What a killed save left behind never counts. `load` verifies it, and takes the one before
    where it is damaged.
    """
    return next(iter(series_of(Path(folder) / f"{prefix}0")), None)
