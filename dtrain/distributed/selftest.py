"""`dtrun ... -m dtrain.distributed.selftest`: can these ranks work together? Seconds, no data.

Owns: that program. Every rank joins, checks sums and messages against their closed forms, and rank
0 prints who is where and how long a sum takes. What does not work is an error like in any other
program; `dtrun doctor` runs it with two ranks on this host, a cluster with as many as it has.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections import Counter

from dtrain import distributed as dist
from dtrain.ops.create import arange

ELEMENTS = 1 << 18  # 1 MiB of float32
ROUNDS = 10


def check() -> str:
    """One line about the group, on every rank. Raises RuntimeError when a result is wrong.

    The default group must have been joined. Collective: blocks until all ranks have called it.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    seconds = [_sum(rank, size) for _ in range(ROUNDS)]
    hosts: list[str] = [""] * size
    dist.all_gather_object(hosts, socket.gethostname())
    there = ", ".join(f"{name} {count}" for name, count in Counter(hosts).items())
    middle = statistics.median(seconds) * 1e3
    verb = "ranks work together" if size > 1 else "rank works"
    return (
        f"{size} {verb} ({there}): all_reduce of 1 MiB in {middle:.2f} ms by {dist.get_backend()}"
    )


def _sum(rank: int, size: int) -> float:
    """Rank r of n holds x + r; the sum is n x + n (n - 1) / 2, exact in float32. Its seconds."""
    x = (arange(ELEMENTS) % 1000).float()
    ours, wanted = x + rank, x * size + size * (size - 1) / 2
    begin = time.perf_counter()
    dist.all_reduce(ours)
    taken = time.perf_counter() - begin
    if not bool((ours == wanted).all()):
        raise RuntimeError(f"rank {rank} of {size}: the sum over the ranks is wrong")
    return taken


def main() -> None:
    """Join, check, print on rank 0, leave."""
    dist.init_process_group()
    line = check()
    if dist.get_rank() == 0:
        print(line)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
