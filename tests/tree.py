"""The source tree as data, for the tests that read code instead of running it.

`sources()` maps module names to files for everything the wheel ships; `python_files()` lists every
Python file a rule of style applies to. Nothing here imports what it describes.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = {"dtrain": ROOT / "dtrain", "dtrun": ROOT / "launcher" / "dtrun"}
FOLDERS = ("dtrain", "launcher", "examples", "benchmarks", "configs", "tests")


def python_files(*folders: str) -> list[Path]:
    """Every Python file below the named folders of the repository (default: all of them)."""
    return sorted(path for name in folders or FOLDERS for path in (ROOT / name).rglob("*.py"))


def sources() -> dict[str, Path]:
    """Module name -> file, for both shipped packages; a package stands for its `__init__.py`."""
    return {
        ".".join((package, *_parts(path.relative_to(folder)))): path
        for package, folder in SHIPPED.items()
        for path in sorted(folder.rglob("*.py"))
    }


def _parts(relative: Path) -> tuple[str, ...]:
    parts = relative.with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts
