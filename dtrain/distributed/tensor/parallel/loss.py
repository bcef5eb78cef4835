"""`loss_parallel`: cross entropy of scores whose classes are cut.

Here F.cross_entropy of such scores never gathers them (`_loss`), so that the context only marks
where a script for torch says so. Source: torch.distributed.tensor.parallel.loss_parallel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def loss_parallel() -> Iterator[None]:
    """Accepted, and changes nothing: the loss of scores that are cut along their classes is
    computed so with and without it.
    """
    yield
