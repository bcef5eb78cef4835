"""`notebook_launcher`: ranks for a function of a notebook's cell, with their output in the cell.

Owns: the call, and what it raises. The run is `launched`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dtrain import machine
from dtrain.multiprocessing.launched import Told, call_in_ranks, first_failure, value_of
from dtrain.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

__all__ = ["notebook_launcher"]


def notebook_launcher(
    function: Callable[..., Any],
    args: tuple[Any, ...] = (),
    num_processes: int | None = None,
    *,
    max_restarts: int = 0,
    log_line_prefix_template: str | None = None,
) -> Any:
    """Run `function(*args)` in `num_processes` ranks (None: one a core); what rank 0 returned.

    `function` may be of a cell: it, its arguments and the globals it uses are copied to new
    processes, in which `torch.distributed.init_process_group()` finds the others. What the ranks
    print appears as it comes, with their numbers. Blocks until all have ended.

    Raises `ProcessRaisedException` when a rank raised, after dtrun's report with the traceback, and
    `ProcessExitedException` when one ended otherwise; TypeError for what cannot be copied. An
    interrupt ends all ranks and is raised. Source: Accelerate's function of this name.
    """
    count = machine.cores() if num_processes is None else num_processes
    if count < 1:
        raise ValueError(f"num_processes must be at least 1, got {num_processes}")
    flags = ["--standalone", f"--nproc-per-node={count}", f"--max-restarts={max_restarts}"]
    if log_line_prefix_template is not None:
        flags.append(f"--log-line-prefix-template={log_line_prefix_template}")
    code, told = call_in_ranks(function, args, flags, count)
    if code:
        raise _failure(code, told)
    return value_of(told[0])


def _failure(code: int, told: Sequence[Told]) -> Exception:
    """The exception of a run: of its first failure that is not the loss of another rank."""
    first = first_failure(told)
    if first is None:
        return ProcessExitedException(
            f"the ranks ended with exit code {code}: see the report above for which, and why",
            error_index=-1,
            error_pid=-1,
            exit_code=code,
        )
    rank = int(first["rank"])
    return ProcessRaisedException(
        f"process {rank} terminated with {first['message']} (its traceback is in the report above)",
        rank,
        int(first["pid"]),
    )
