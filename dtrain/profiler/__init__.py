"""A timeline of training, opened in Perfetto: torch.profiler's everyday names.

What is recorded: DDP's forward and backward passes and their buckets, every call of every group,
and what `record_function` surrounds. Without a profile each of these costs one look at an
attribute. With DTRAIN_TRACE=DIR the whole run is recorded (`dtrain.tape`), and nothing needs to be
called. profiler.py says when, averages.py puts events together by name. Source: torch.profiler.
"""

from dtrain.profiler.profiler import (
    ProfilerAction,
    ProfilerActivity,
    profile,
    record_function,
    schedule,
    tensorboard_trace_handler,
)
from dtrain.tape import merge

__all__ = [
    "ProfilerAction",
    "ProfilerActivity",
    "merge",
    "profile",
    "record_function",
    "schedule",
    "tensorboard_trace_handler",
]
