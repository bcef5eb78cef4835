"""What DDP tells of itself: `logging_data`, under torch's names, and `step_report`, in words.

Rules: 1. Both read what `meter` has kept: they may be called at any time between passes, by one
rank alone, and send nothing. 2. A bucket that backward had to wait for gets the reason that the
timestamps show; `why_exposed` says how it is told.
Source of the names: torch's DDPLoggingData.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dtrain.dtypes import from_numpy
from dtrain.nn.modules.batchnorm import SyncBatchNorm
from dtrain.nn.parallel.meter import BucketTimes, Step
from dtrain.nn.parallel.reducer import Reducer

# Below this share of what was exposed something is not its reason.
MAIN = 0.5


def why_exposed(step: Step, bucket: BucketTimes, aside: bool, memory: bool) -> str | None:
    """Why the end of backward waited for `bucket`; None when it did not.

    In this order: another rank came late, for more than half of the time (where ranks share
    `memory`: by messages, waiting for a rank is also waiting for bytes under way); it was never
    meant to run beside backward (`aside` is False); it was submitted only when an earlier bucket
    was full, or was not full before the end; the one before was still running when it could have
    begun, or the thread that reduces came late to it; else no computation was left to hide it.
    """
    exposed = step.exposed(bucket)
    if exposed <= 0.0:
        return None
    if memory and (late := came_late(bucket.waits, exposed)):
        return late
    if not aside:
        return "reduced after backward: beside it, it would have taken the core that computes"
    if not bucket.filled:
        return "filled late: some of its parameters got no gradient, known at the end only"
    return _why_late(step, bucket, exposed)


def _why_late(step: Step, bucket: BucketTimes, exposed: float) -> str:
    held, queued = bucket.submitted - bucket.filled, bucket.begun - bucket.submitted
    if held > MAIN * exposed:
        first = min((b for b in step.buckets[: bucket.index]), key=lambda b: -b.filled)
        return (
            f"filled late: it was full {ms(held)} before bucket {first.index}, and buckets are "
            "reduced in order"
        )
    before = step.buckets[bucket.index - 1].done if bucket.index else bucket.submitted
    blocked = min(before, bucket.begun) - bucket.submitted
    if blocked > MAIN * exposed:
        return f"previous still running: it waited {ms(blocked)} for bucket {bucket.index - 1}"
    if queued > MAIN * exposed:
        return f"started late: the thread that reduces came to it {ms(queued)} after it was full"
    left, took = max(0.0, step.computed - bucket.begun), bucket.done - bucket.begun
    return f"nothing left to compute: it took {ms(took)}, {ms(left)} before backward's end"


def words(step: Step, reducer: Reducer) -> str:
    """The report of one pass, for people."""
    rank, size = reducer.group.rank(), reducer.group.size()
    began, ended = step.forward
    exposed = step.ended - step.computed
    lines = [
        f"pass {step.number} on rank {rank} of {size}"
        f"{' (without input: it has joined)' if step.shadow else ''}: forward "
        f"{ms(ended - began)}, backward {ms(step.computed - step.began)}, then "
        f"{ms(exposed)} until all gradients were there",
    ]
    if step.previous_end:
        lines.append(f"between the passes {ms(max(0.0, began - step.previous_end))}")
    lines.append(
        f"communication {ms(step.communication)} in {len(step.buckets)} buckets, "
        f"{ms(step.overlap)} of it beside backward"
    )
    lines += [_bucket_words(step, b, reducer) for b in step.buckets]
    if reducer.tuner is not None:
        lines.append(f"bucket_cap_mb='auto': {reducer.tuner.words()}")
    lines += wait_words((b.waits for b in step.buckets), reducer.group.shares_memory)
    if step.unused:
        lines.append(f"no gradient here: {_names(step.unused, reducer)}")
    if step.nowhere:
        lines.append(f"no gradient on any rank: {_names(step.nowhere, reducer)}")
    return "\n  ".join(lines)


def _bucket_words(step: Step, bucket: BucketTimes, reducer: Reducer) -> str:
    why = why_exposed(step, bucket, reducer.runs_aside, reducer.group.shares_memory)
    hidden = "hidden" if why is None else f"exposed {ms(step.exposed(bucket))}: {why}"
    return f"bucket {bucket.index} ({bucket.nbytes / 2**20:.2f} MiB, #{bucket.seq}): {hidden}"


def came_late(waits: Mapping[int, float], exposed: float) -> str | None:
    """That a rank was waited for, if that is the larger part of what was exposed."""
    late = max(waits, key=waits.__getitem__, default=None)
    if late is None or waits[late] <= MAIN * exposed:
        return None
    return f"rank {late} came late: {ms(waits[late])} of it waited for that rank"


def wait_words(all_waits: Iterable[Mapping[int, float]], memory: bool) -> list[str]:
    """A line for each rank that was waited for, of all calls together."""
    sums: dict[int, float] = {}
    for waits in all_waits:
        for rank, seconds in waits.items():
            sums[rank] = sums.get(rank, 0.0) + seconds
    sent = "" if memory else ", or for what it sent"
    return [f"waited {ms(s)} for rank {rank}{sent}" for rank, s in sorted(sums.items())]


def _names(numbers: Sequence[int], reducer: Reducer) -> str:
    return ", ".join(reducer.names[number] for number in numbers)


def ms(seconds: float) -> str:
    """A time as reports have it."""
    return f"{seconds * 1e3:.2f} ms"


class ReportingModel:
    """The part of DistributedDataParallel that tells what it does."""

    def logging_data(self: Any) -> dict[str, Any]:
        """What this wrapper is and how its passes went on this rank, under torch's names.

        Times are in nanoseconds, of the monotonic clock: `avg_*` are means over all passes that
        reduced, the others are of the last one; there are none before the first.
        `bucket_cap_bytes` is sys.maxsize where all gradients of a dtype are one bucket.
        `backward_comm_time` is the sum of what the buckets' calls took, and
        `backward_compute_comm_overlap_time` the part of it beside backward. Not in torch:
        `avg_exposed_comm_time`, from the last gradient to the end of backward;
        `unused_parameter_names`, those without a gradient here in the last pass; `waited_for`,
        {rank: ns}; `bucket_cap_auto`, in words, with bucket_cap_mb="auto".
        """
        return {**_what(self), **_arrangement(self.reducer), **_times(self.reducer)}

    def _get_ddp_logging_data(self) -> dict[str, Any]:
        """`logging_data()` with torch's types: numbers, and text for everything else."""
        return {name: _as_torch(value) for name, value in self.logging_data().items()}

    def step_report(self: Any) -> str:
        """The last pass that reduced, in words: computing, communication, what was exposed and why.

        A bucket is exposed for the time by which it keeps backward from ending. Every rank has its
        own view. RuntimeError before the first pass.
        """
        last = self.reducer.meter.last
        if last is None:
            raise RuntimeError("no backward pass has been reduced yet: there is nothing to report")
        return words(last, self.reducer)


def _as_torch(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value) if isinstance(value, dict) else value


def _what(model: Any) -> dict[str, Any]:
    group, parameters = model.process_group, model.reducer.parameters
    hook = model.reducer.hook_name
    return {
        "world_size": group.size(),
        "rank": group.rank(),
        "backend_name": group.name(),
        "module_name": type(model.module).__name__,
        "dtypes": sorted({from_numpy(p._data.dtype).scalar_type.lower() for p in parameters}),
        "num_parameter_tensors": len(parameters),
        "total_parameter_size_bytes": sum(p._data.nbytes for p in parameters),
        "broadcast_buffers": bool(model.broadcast_buffers),
        "has_sync_bn": any(isinstance(m, SyncBatchNorm) for m in model.module.modules()),
        "find_unused_parameters": True,  # they always are
        "gradient_as_bucket_view": True,  # they always are
        "is_multi_device_module": False,
        "device_ids": [],
        "output_device": -1,
        **({} if hook is None else {"comm_hook": hook}),
    }


def _arrangement(reducer: Reducer) -> dict[str, Any]:
    sizes = [b.gradients.nbytes for b in reducer.buckets]
    data = {
        "bucket_cap_bytes": reducer.caps[-1],
        "bucket_sizes": reducer.first_sizes,
        "has_rebuilt_buckets": reducer.rebuilt,
    }
    if reducer.rebuilt:
        data["rebuilt_bucket_sizes"] = sizes
        members = [" ".join(map(str, b.members)) for b in reducer.buckets]
        data["rebuilt_per_bucket_param_indices"] = members
    if reducer.tuner is not None:
        data["bucket_cap_auto"] = reducer.tuner.words()
    return data


def _times(reducer: Reducer) -> dict[str, Any]:
    meter, last, n = reducer.meter, reducer.meter.last, reducer.meter.totals.passes
    if last is None:
        return {"iteration": 0}
    sums, unused = meter.totals, [reducer.parameters[i] for i in last.unused]
    return {
        "iteration": n,
        "num_buckets_reduced": len(last.buckets),
        "prev_iteration_grad_ready_order_indices": reducer.order,
        "unused_parameter_size": sum(p._data.nbytes for p in unused),
        "unused_parameter_names": [reducer.names[i] for i in last.unused],
        "can_set_static_graph": not meter.changed,
        "forward_compute_time": _ns(last.forward[1] - last.forward[0]),
        "forward_compute_time_start": _ns(last.forward[0]),
        "backward_compute_time": _ns(last.computed - last.began),
        "backward_compute_time_start": _ns(last.began),
        "backward_compute_time_end": _ns(last.computed),
        "backward_comm_time": _ns(last.communication),
        "backward_comm_time_start": _ns(last.buckets[0].begun),
        "backward_comm_time_end": _ns(last.buckets[-1].done),
        "backward_compute_comm_overlap_time": _ns(last.overlap),
        "exposed_comm_time": _ns(last.ended - last.computed),
        "avg_forward_compute_time": _ns(sums.forward / n),
        "avg_backward_compute_time": _ns(sums.backward / n),
        "avg_backward_comm_time": _ns(sums.communication / n),
        "avg_backward_compute_comm_overlap_time": _ns(sums.overlap / n),
        "avg_exposed_comm_time": _ns(sums.exposed / n),
        "waited_for": {rank: _ns(seconds) for rank, seconds in sorted(sums.waits.items())},
    }


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
