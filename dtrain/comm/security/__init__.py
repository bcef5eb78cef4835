"""Who may be heard: the sockets of the project, their keys, and the secret behind those.

Owns: every option of a ZeroMQ socket (`sockets`), every bind (`listening`), the table of keys that
a listening TCP socket accepts (`gate`), key pairs (`keys`) and where a job's secret is found
(`secret`). Rules: 1. a TCP socket listens behind a `Gate`, or not at all; the one exception is the
data plane of a job that asks for plain text, on private addresses. 2. A secret is never an
argument, an environment variable, or part of a text.
"""

from dtrain.comm.security.gate import Gate
from dtrain.comm.security.keys import Keys, StoreKeys, fresh_keys, member_keys, store_keys
from dtrain.comm.security.listening import (
    Listener,
    listen,
    listen_nameless,
    process_of,
    remove_leftover,
    same_user,
)
from dtrain.comm.security.sockets import (
    BROKEN,
    MAX_FRAME,
    MAX_STORE_FRAME,
    REFUSED,
    connect,
    context,
    open_socket,
    silence,
    user_of,
)

__all__ = [
    "BROKEN",
    "MAX_FRAME",
    "MAX_STORE_FRAME",
    "REFUSED",
    "Gate",
    "Keys",
    "Listener",
    "StoreKeys",
    "connect",
    "context",
    "fresh_keys",
    "listen",
    "listen_nameless",
    "member_keys",
    "open_socket",
    "process_of",
    "remove_leftover",
    "same_user",
    "silence",
    "store_keys",
    "user_of",
]
