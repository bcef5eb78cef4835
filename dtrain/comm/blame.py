"""What became of a rank that is gone: the one sentence that all its survivors say.

Owns: `explained`, which makes a `PeerLost` of what the kernel, the launcher and the flight record
of the dead say. Rule: only facts that every survivor of a host finds in the same words; what this
rank itself was doing is a note. Blocks at most `_EXIT_FILE` seconds, for a launcher that has still
to say how the process ended.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from pathlib import Path

from dtrain import flight
from dtrain.comm import security
from dtrain.comm.topology import host_id
from dtrain.comm.transports.base import Peer
from dtrain.errors import PeerLost
from dtrain.processes import has_ended, is_stopped, signal_name

__all__ = ["explained", "words_of"]

# dtrun sees the end of a rank at once and needs a millisecond to write it down.
_EXIT_FILE = 0.15
_LOOK = 0.001


def explained(loss: PeerLost, group: str, peer: Peer | None, reason: str) -> PeerLost:
    """The loss of `peer` as every survivor tells it; None: of whom nothing is known.

    `reason`: why it left in good order, if it has said so.
    """
    where = f"group {group!r}"
    if loss.orderly and reason:
        return PeerLost(loss.rank, where=where, orderly=True, how=reason)
    if loss.orderly or peer is None or peer.pid == os.getpid():
        return loss.at(where)
    process = f"its process (pid {peer.pid} on {peer.host_name})"
    if peer.host != host_id():
        how = f"the connection to {process} broke: see the output of that rank for the reason"
    elif has_ended(peer.pid):
        how = f"{process} {_end_of(peer.pid)}"
    elif is_stopped(peer.pid):
        how = f"{process} has been stopped (SIGSTOP) for {security.silence():g} s"
    else:
        how = f"{process} still runs, but the connection to it broke"
    return PeerLost(
        loss.rank,
        where=where,
        how=how,
        last=_last_call(peer),
        pid=peer.pid,
        host=peer.host_name,
    )


def words_of(error: BaseException) -> str:
    """An exception that ends a rank, with the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    at = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"it ended with {type(error).__name__}: {error}{at}"


def _end_of(pid: int) -> str:
    """How a process ended, as far as its launcher says."""
    directory = os.environ.get("DTRAIN_RUN_DIR")
    deadline = time.monotonic() + _EXIT_FILE
    while directory is not None:
        code = _exit_code(Path(directory), pid)
        if code is not None:
            return (
                f"was ended by {signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
            )
        if time.monotonic() >= deadline:
            break
        time.sleep(_LOOK)
    return "has ended"


def _exit_code(directory: Path, pid: int) -> int | None:
    for path in directory.glob("exit-*[0-9]"):
        told = json.loads(path.read_text(encoding="utf-8"))
        if told["pid"] == pid:
            return int(told["code"])
    return None


def _last_call(peer: Peer) -> str:
    """What the flight record of a rank on this host says that it did last; "" without one."""
    if peer.host != host_id():
        return ""
    record = flight.of_process(peer.pid)
    found = None if record is None else record.last_call()
    if found is None:
        return ""
    group, call = found
    return f"{call} in group {group.name!r}{' (unfinished)' if call.unfinished else ''}"
