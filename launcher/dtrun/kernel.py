"""What the kernel tells in files of /proc and /sys.

Owns: reading one. Not every kernel has every file, and a container may hide some: what cannot be
read says nothing, and the caller goes on without.
"""

from __future__ import annotations

from pathlib import Path


def told(path: Path) -> str:
    """The content of a file without the space around it, "" where it cannot be read."""
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
