"""Pipeline parallelism, at torch.distributed.pipelining's names: each rank has some of the layers.

orders.py says which rank computes what after what, as data, and judges it; microbatch.py cuts a
batch; boundary.py carries activations and gradients between neighbouring stages; stage.py computes;
schedules.py follows an order. A model is cut by hand: there is no tracer, hence no `pipeline()`.
"""

from __future__ import annotations

from dtrain.distributed.pipelining.schedules import (
    Schedule1F1B as Schedule1F1B,
    ScheduleGPipe as ScheduleGPipe,
    ScheduleInterleaved1F1B as ScheduleInterleaved1F1B,
    ScheduleLoopedBFS as ScheduleLoopedBFS,
)
from dtrain.distributed.pipelining.stage import PipelineStage as PipelineStage
