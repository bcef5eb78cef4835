"""A store that is a part of another one: every key gets a prefix.

Owns: `PrefixStore`. It gives every group a name space of its own inside the store of the job, so
that two groups may use the same keys. Errors show the keys with their prefix.
"""

from __future__ import annotations

from typing import Any

from dtrain.comm.store.base import Store

__all__ = ["PrefixStore"]


class PrefixStore(Store):
    """`PrefixStore("a", store)` keeps `key` as "a/key" in `store`; it owns nothing, so `close` does
    nothing.

    `num_keys` counts the keys of the whole underlying store, as in torch; `list_keys` lists those
    of this part.
    """

    def __init__(self, prefix: str, store: Store) -> None:
        super().__init__(store.timeout)
        self.prefix = prefix
        self.underlying_store = store

    def _call(self, command: str, args: list[Any], timeout: float) -> Any:
        if args:
            first, *rest = args
            keys = [self._key(k) for k in first] if isinstance(first, list) else self._key(first)
            args = [keys, *rest]
        result = self.underlying_store._call(command, args, timeout)
        if command == "list_keys":
            return [key.removeprefix(self._key("")) for key in result]
        return result

    def _gather(self, key: str, rank: int, size: int, value: bytes, timeout: float) -> list[bytes]:
        return self.underlying_store._gather(self._key(key), rank, size, value, timeout)

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}"

    def clone(self) -> PrefixStore:
        """The same part of the same underlying store object, which is not cloned."""
        return PrefixStore(self.prefix, self.underlying_store)

    def network_host(self) -> str | None:
        """That of the underlying store."""
        return self.underlying_store.network_host()

    def close(self) -> None:
        """Nothing to give back: the underlying store is its owner's."""
