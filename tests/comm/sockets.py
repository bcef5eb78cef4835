"""A socket for the length of a block, with the context it is made in."""

from __future__ import annotations

from contextlib import contextmanager

import zmq

from dtrain.comm import security


@contextmanager
def a_socket(kind=zmq.DEALER):
    context = security.context()
    try:
        yield context, security.open_socket(context, kind)
    finally:
        context.destroy(linger=0)
