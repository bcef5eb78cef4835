"""Values that have a name of their own in torch.

Owns: `default_pg_timeout`; the number itself is the comm tower's.
Source: torch.distributed.constants.
"""

from __future__ import annotations

from datetime import timedelta

from dtrain.comm.group import DEFAULT_TIMEOUT

default_pg_timeout = timedelta(seconds=DEFAULT_TIMEOUT)
"""What `init_process_group` takes when it is given no timeout."""
