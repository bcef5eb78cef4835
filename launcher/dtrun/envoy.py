"""The process through which a node talks to the head of its job, and the head's own loop.

`python -m dtrun.envoy` is a child of the launcher, which forks and so does without threads and
sockets of its own. Messages are lines of JSON: the launcher's go to the queue `head` of the store
at the job's endpoint, those for this node come from the queue `to/NAME`. On the head the envoy also
serves that store and runs the `Meeting`. Rules: 1. the store is dtrain's, so that nobody speaks
here who does not know the job's secret. 2. The envoy ends when its standard input does, however its
launcher ended, and tells the head; if it is killed too, its connection breaks, and the store tells
the head. 3. A head that is gone is told to the launcher at once: the connection breaks, or stays
silent for as long as its heartbeats take.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dtrun.membership import OVER, Meeting, Message, Terms
from dtrun.rendezvous import reserve_port

if TYPE_CHECKING:
    from dtrain.comm.store.tcp import TcpStore

HEAD = "head"
FAREWELL_SECONDS = 2.0  # of the head, after the end, for nodes that have not said good-bye
ASK_AGAIN_SECONDS = 0.5  # for a name that is not known
PATIENCE_SECONDS = 3600.0  # of one request for the next message, which is repeated

_printing = threading.Lock()


def main() -> None:
    """Carry messages until standard input ends; the first line says for whom and where."""
    given = json.loads(sys.stdin.readline())
    terms = Terms(*given["terms"])
    try:
        _carry(given, terms)
    except OSError as error:
        _tell_launcher(say="lost", why=str(error))


def _carry(given: Message, terms: Terms) -> None:
    from dtrain.errors import DistError

    name = secrets.token_hex(4)
    try:
        store, serves = _open(given, terms)
        meeting = _meeting(store, terms) if serves else contextlib.nullcontext()
        with store, meeting, _address(given) as holder:
            addr, port = holder.getsockname()[:2]
            join = {"addr": addr, "port": port, "head": serves, "terms": list(terms[:4])}
            if not serves:
                store.leave_last_word(HEAD, json.dumps({"say": "gone", "node": name}).encode())
            _send(store, name, given["join"] | join)
            for target in (_listen, _beat):
                threading.Thread(target=target, args=(store, name, terms), daemon=True).start()
            for line in sys.stdin:
                _send(store, name, json.loads(line))
            _send(store, name, {"say": "leave", "why": "its launcher has ended", "code": 1})
    except DistError as error:
        _tell_launcher(say="lost", why=str(error))


def _open(given: Message, terms: Terms) -> tuple[TcpStore, bool]:
    """The job's store, and whether it is served here."""
    from dtrain.comm.store.tcp import TcpStore
    from dtrain.errors import DistNetworkError

    host, port, is_host = given["host"], given["port"], given["is_host"]
    _await_name(host, terms.join_timeout)
    if is_host or (is_host is None and _is_here(host)):
        try:
            return TcpStore(host, port, is_master=True, timeout=terms.join_timeout), True
        except DistNetworkError:
            if is_host:
                raise  # otherwise another node on this host is the head already
    return TcpStore(host, port, timeout=terms.join_timeout), False


def _await_name(host: str, seconds: float) -> None:
    """Wait until the head's name is known: a cluster's DNS learns it when the head's pod is there.

    OSError when it is not after all that time.
    """
    deadline, told = time.monotonic() + seconds, False
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise
            if not told:
                why = f"{host}, where the nodes meet, is not known here: {error.strerror}"
                _tell_launcher(say="notice", why=f"{why}; asked again until it is")
                told = True
        time.sleep(ASK_AGAIN_SECONDS)


def _is_here(host: str) -> bool:
    try:
        with reserve_port(host if ":" in host else socket.gethostbyname(host)):
            return True
    except OSError:
        return False


def _address(given: Message) -> socket.socket:
    """Holds the port at which rank 0 will serve the ranks' store, if it comes to be here."""
    from dtrain.comm.security.addresses import local_address

    return reserve_port(given["local_addr"] or local_address(given["host"]))


def _send(store: TcpStore, name: str, message: Message) -> None:
    store.queue_push(HEAD, json.dumps(message | {"node": name}))


def _listen(store: TcpStore, name: str, terms: Terms) -> None:
    """Pass on what the head says, as soon as it does."""
    from dtrain.errors import DistError, StoreTimeout

    mailbox = store.clone()
    mailbox.set_timeout(PATIENCE_SECONDS)
    try:
        while True:
            with contextlib.suppress(StoreTimeout):
                _print(mailbox.queue_pop(f"to/{name}").decode())
    except DistError as error:
        _tell_launcher(say="lost", why=str(error))


def _beat(store: TcpStore, name: str, terms: Terms) -> None:
    """Say that this node is there, until the head is not."""
    from dtrain.errors import DistError

    line = store.clone()
    line.set_timeout(terms.dead_after)
    try:
        while True:
            time.sleep(terms.alive_every)
            _send(line, name, {"say": "alive"})
    except DistError as error:
        _tell_launcher(say="lost", why=str(error))


def _tell_launcher(**message: Any) -> None:
    _print(json.dumps(message))


def _print(line: str) -> None:
    with _printing, contextlib.suppress(BrokenPipeError):  # the launcher is gone
        print(line, flush=True)


# ---- the head


@contextlib.contextmanager
def _meeting(store: TcpStore, terms: Terms) -> Iterator[None]:
    """Run the head's side in a thread; at the end wait for the good-byes of the others."""
    over = threading.Event()
    thread = threading.Thread(target=_preside, args=(store.clone(), terms, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.wait(FAREWELL_SECONDS)


def _preside(store: TcpStore, terms: Terms, over: threading.Event) -> None:
    """Feed the meeting with what nodes say and with the time, and deliver what it answers."""
    from dtrain.errors import StoreTimeout

    meeting = Meeting(terms, lambda: secrets.token_hex(32), time.monotonic())
    while meeting.state != OVER or meeting.nodes:
        store.set_timeout(max(0.0, min(meeting.next_tick() - time.monotonic(), 60.0)))
        try:
            message = json.loads(store.queue_pop(HEAD))
            told = meeting.heard(message["node"], message, time.monotonic())
        except StoreTimeout:
            told = meeting.tick(time.monotonic())
        for node, answer in told:
            store.queue_push(f"to/{node}", json.dumps(answer))
    over.set()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # threads that wait for the head need not be waited for
