"""Eighteen phases of a training job, each a place in the code where a rank can be killed.

`PHASES` names the places, `arm` makes this process strike there: at the `nth` time it comes by,
from outside, by wrapping a function of the product, which knows nothing of it. `mark` is called
first, to note when that was.
"""

from __future__ import annotations

import os
import pkgutil
import signal
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

_first = threading.Lock()


class Phase(NamedTuple):
    """A function, and whether the strike comes before its call or behind it; the `nth` time."""

    target: str
    behind: bool = False
    nth: int = 1
    only_rank_0: bool = False


_DRAFT = "dtrain.distributed.checkpoint._draft"
_DISK = "dtrain.distributed.checkpoint._disk:NewFile"
PHASES = {
    "rdzv.join": Phase("dtrain.comm.store.tcp:TcpStore._gather"),
    "rdzv.published": Phase("dtrain.comm.store.tcp:TcpStore._gather", behind=True),
    "pg.connect": Phase("dtrain.comm.transports.zmq:ZmqTransport.__init__", behind=True),
    "shm.attach": Phase("dtrain.comm.transports.shm:ShmTransport._join", behind=True),
    "data.next": Phase("dtrain.utils.data.dataloader:DataLoader._batches", nth=3),
    "fwd": Phase("dtrain.nn.parallel.distributed:DistributedDataParallel.forward", nth=3),
    "bwd.bucket": Phase("dtrain.nn.parallel.reducer:Reducer._submit", nth=5),
    "ar.sent_k": Phase("dtrain.comm.channel:Channel.meet", nth=40),
    "ar.recv_k": Phase("dtrain.comm.channel:Channel.meet", behind=True, nth=40),
    "ar.before_return": Phase("dtrain.comm.collectives:AllReduce.run", behind=True, nth=8),
    "opt.step": Phase("dtrain.optim.adam:Adam.step", nth=3),
    "ckpt.stage": Phase("dtrain.distributed.checkpoint.filesystem:FileSystemWriter.write_data"),
    "ckpt.mid_write": Phase(f"{_DISK}.write", behind=True),
    "ckpt.before_fsync": Phase(f"{_DISK}.__exit__"),
    "ckpt.before_rename": Phase(f"{_DRAFT}:Draft.publish", only_rank_0=True),
    "ckpt.after_rename": Phase(f"{_DRAFT}:sync_directory", only_rank_0=True),
    "rpc.in_flight": Phase("dtrain.distributed.rpc.agent:Agent._send", behind=True, nth=3),
    "pg.destroy": Phase("dtrain.comm.group:ProcessGroup.close"),
}


def kills(world: int) -> list[tuple[str, int]]:
    """Each phase with two victims: the first rank and the last, where both pass by."""
    return [
        (name, 0 if phase.only_rank_0 else victim)
        for name, phase in PHASES.items()
        for victim in (0, world - 1)
    ]


def place_of(name: str) -> tuple[Any, str]:
    """The class or module, and the name of the function in it."""
    target = PHASES[name].target
    owner, _, attribute = target.rpartition("." if "." in target.partition(":")[2] else ":")
    return pkgutil.resolve_name(owner), attribute


def arm(name: str, mark: Callable[[], Any], nth: int = 0) -> None:
    """From now on this process kills itself in that phase, the `nth` time if not the phase's."""
    phase = PHASES[name]
    nth = nth or phase.nth
    place, attribute = place_of(name)
    function = getattr(place, attribute)
    come_by = 0

    def struck(*args: Any, **options: Any) -> Any:
        nonlocal come_by
        come_by += 1
        due = come_by >= nth
        if due and not phase.behind:
            strike(mark)
        result = function(*args, **options)
        if due:
            strike(mark)
        return result

    setattr(place, attribute, struck)


def strike(mark: Callable[[], Any]) -> None:
    """The end of this process; of several threads that come by at once, one says so and strikes."""
    with _first:  # the others wait here for the end
        mark()
        os.kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait()
