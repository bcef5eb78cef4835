"""Code and objects of any class, pickled: only to and from workers that said `accept_code=True`.

The one file of rpc that pickles. Rule: `opened` is called by a worker that accepts code, and by
nobody else; `payload` sees to that.
"""

from __future__ import annotations

import pickle
from typing import Any


def sealed(value: Any, path: str) -> bytes:
    """The bytes of `value`, lambdas and closures too; TypeError names its `path`."""
    import cloudpickle

    try:
        return bytes(cloudpickle.dumps(value))
    except Exception as error:
        raise TypeError(f"{path}: cannot be pickled: {error}") from error


def opened(data: bytes) -> Any:
    """The value of `sealed`'s bytes. Runs whatever the sender put into them."""
    return pickle.loads(data)
