"""Training that survives ranks and nodes: `State`, `run`, `should_stop`, `request_stop`.

The names of `dtrain.distributed.elastic.state` and `dtrain.distributed.notice` in one place; there
is nothing else here. PyTorch has no such module.
"""

from __future__ import annotations

from dtrain.distributed.elastic.state import (
    State as State,
    run as run,
)
from dtrain.distributed.notice import (
    request_stop as request_stop,
    should_stop as should_stop,
)
