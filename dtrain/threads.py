"""How many threads NumPy's BLAS uses: `set_num_threads`, `get_num_threads`.

N ranks on one host must share its cores; dtrun sets the environment for that before the ranks
start, these functions change it afterwards.
"""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def _pools() -> Any:
    from threadpoolctl import ThreadpoolController  # 10 ms: only for those who ask

    return ThreadpoolController()


def set_num_threads(num: int) -> None:
    """Use at most `num` threads for matrix products, in this process. Source: torch."""
    if num <= 0:
        raise RuntimeError("set_num_threads expects a positive integer")
    _pools().limit(limits=num)


def get_num_threads() -> int:
    """The number of threads that matrix products may use. Source: torch.get_num_threads."""
    return max((pool.num_threads for pool in _pools().lib_controllers), default=1)
