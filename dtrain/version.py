"""The version, stated once.

`pyproject.toml` reads it for the wheel, `dtrain.__version__` repeats it. Semantic versioning; while
the major number is 0, a minor release may break (see CHANGELOG.md).
"""

from __future__ import annotations

__version__ = "0.1.0.dev0"
