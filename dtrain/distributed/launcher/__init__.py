"""Launching a function on ranks from a program, under torch.distributed.launcher's names.

`api` has them; the launcher itself is the program `dtrun`.
"""

from __future__ import annotations

from dtrain.distributed.launcher.api import (
    LaunchConfig as LaunchConfig,
    elastic_launch as elastic_launch,
    launch_agent as launch_agent,
)

__all__ = ["LaunchConfig", "elastic_launch", "launch_agent"]
