"""`elastic_launch(config, function)(*args)`: a function as the program of ranks, run by dtrun.

Owns: `LaunchConfig`, torch's settings in dtrun's flags, and what a failed run raises. Every node
calls it, as every node runs dtrun. Source of the names: torch.distributed.launcher.api.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dtrain.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from dtrain.multiprocessing.launched import Told, call_in_ranks, run_dtrun, value_of

__all__ = ["LaunchConfig", "elastic_launch", "launch_agent"]


@dataclass
class LaunchConfig:
    """How to launch: the flags of dtrun of the same names, with torch's defaults but one.

    `rdzv_backend` is "c10d" (torch: "etcd", which dtrain does not have), or "static". An empty
    `rdzv_endpoint`, on one node, means a free port. `signals_to_handle` and the `duplicate_*`
    filters are lists in words, as in the flags. `start_method`, `metrics_cfg`, `event_log_handler`,
    `monitor_interval` and `rdzv_timeout` are accepted and change nothing.
    """

    min_nodes: int
    max_nodes: int
    nproc_per_node: int
    logs_specs: Any = None
    run_id: str = ""
    role: str = "default_role"
    rdzv_endpoint: str = ""
    rdzv_backend: str = "c10d"
    rdzv_configs: dict[str, Any] = field(default_factory=dict)
    rdzv_timeout: int = -1
    max_restarts: int = 3
    monitor_interval: float = 0.1
    start_method: str = "spawn"
    log_line_prefix_template: str | None = None
    metrics_cfg: dict[str, str] = field(default_factory=dict)
    local_addr: str | None = None
    event_log_handler: str = "null"
    numa_options: Any = None
    signals_to_handle: str = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"
    duplicate_stdout_filters: list[str] | None = None
    duplicate_stderr_filters: list[str] | None = None
    virtual_local_rank: bool = False
    shutdown_timeout: int | None = None

    def flags(self) -> list[str]:
        """The same for dtrun. ValueError for what dtrun has no flag for."""
        for name in ("logs_specs", "numa_options"):
            if getattr(self, name) is not None:
                raise ValueError(f"LaunchConfig.{name} is not supported: use dtrun's own flags")
        several = self.max_nodes > 1 or self.rdzv_endpoint
        given = {
            "nnodes": f"{self.min_nodes}:{self.max_nodes}",
            "nproc-per-node": self.nproc_per_node,
            "role": self.role,
            "max-restarts": self.max_restarts,
            "signals-to-handle": self.signals_to_handle,
            "rdzv-backend": self.rdzv_backend if several else None,
            "rdzv-endpoint": self.rdzv_endpoint,
            "rdzv-id": self.run_id,
            "rdzv-conf": ",".join(f"{key}={value}" for key, value in self.rdzv_configs.items()),
            "log-line-prefix-template": self.log_line_prefix_template,
            "local-addr": self.local_addr,
            "duplicate-stdout-filters": _words(self.duplicate_stdout_filters),
            "duplicate-stderr-filters": _words(self.duplicate_stderr_filters),
            "shutdown-timeout": self.shutdown_timeout,
        }
        flags = [f"--{name}={value}" for name, value in given.items() if value not in (None, "")]
        return [*flags, *["--virtual-local-rank"] * self.virtual_local_rank]


def _words(filters: Sequence[str] | None) -> str:
    return ",".join(word.replace(",", ",,") for word in filters or ())


class elastic_launch:
    """`elastic_launch(config, entrypoint)(*args)`: {global rank: what it returned} of this node.

    `entrypoint`: a function, which is copied to the ranks with its arguments and what it uses, or
    the name of a program, whose ranks return None. Blocks until all ranks of this node have ended.
    Raises `ChildFailedError`, whose `failures` say for each rank how it failed, and TypeError for
    what cannot be copied.
    """

    def __init__(self, config: LaunchConfig, entrypoint: Callable[..., Any] | str | None) -> None:
        self._config, self._entrypoint = config, entrypoint

    def __call__(self, *args: Any) -> dict[int, Any]:
        return launch_agent(self._config, self._entrypoint, list(args))


def launch_agent(
    config: LaunchConfig, entrypoint: Callable[..., Any] | str | None, args: list[Any]
) -> dict[int, Any]:
    """What `elastic_launch` does, as a function."""
    count, flags = config.nproc_per_node, config.flags()
    if entrypoint is None:
        raise ValueError("elastic_launch needs a function or the name of a program, got None")
    if isinstance(entrypoint, str):
        if shutil.which(entrypoint) is None:
            raise ValueError(f"no such program: {entrypoint}")
        code = run_dtrun([*flags, "--no-python", entrypoint, *map(str, args)])
        told: list[Told] = []
    else:
        code, told = call_in_ranks(entrypoint, tuple(args), flags, count, everyone=True)
    if code:
        name = entrypoint if isinstance(entrypoint, str) else entrypoint.__qualname__
        raise ChildFailedError(name, _failures(code, told))
    return {one["rank"]: value_of(one) for one in told} or dict.fromkeys(range(count))


def _failures(code: int, told: Sequence[Told]) -> dict[int, ProcessFailure]:
    """Of ranks that said how they failed; of one that said nothing, as dtrun's code has it."""
    failed = {
        one["rank"]: ProcessFailure(local, one["pid"], 1, message=one["message"], time=one["time"])
        for local, one in enumerate(told)
        if "message" in one
    }
    return failed or {-1: ProcessFailure(-1, -1, code)}
