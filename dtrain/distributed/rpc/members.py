"""Who the workers are: `Members`, a fixed list, or those who are on a `Board` in the store.

Rules: 1. a worker is known by its rank, which is used once; its name is given again when it is
gone. 2. Who joins writes its card, and its rank behind those of all before it, then connects to
those, and only then takes its name: whoever can find it can reach it. 3. The store is asked when a
name or a rank is new, or its worker is lost.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable
from typing import Any

from dtrain.comm.store.base import Store
from dtrain.comm.store.prefix import PrefixStore
from dtrain.comm.topology import host_id
from dtrain.distributed.rpc.options import WorkerInfo
from dtrain.errors import DistError
from dtrain.wire import dumps, loads

__all__ = ["Board", "Members"]


class Board:
    """Where workers that come and go find each other."""

    def __init__(self, store: Store) -> None:
        self._store = PrefixStore("rpc/open", store)

    def claim(self, wish: int) -> int:
        """A rank that nobody has had; ValueError if `wish` (-1: none) is taken."""
        me = secrets.token_hex(8)
        first = self._store.add("claims", 0)
        for rank in itertools.count(first) if wish < 0 else [wish]:
            if self._store.compare_set(f"rank/{rank}", "", me).decode() == me:
                self._store.add("claims", 1)
                return rank
        raise ValueError(f"rank {wish} is taken, or was by a worker that is gone: take another")

    def carrier(self, wish: str | None, default: str) -> str:
        """What carries the messages of this world, which the first worker says: "unix" or "tcp"."""
        wanted = default if wish is None else "unix" if wish == "unix" else "tcp"
        found = self._store.compare_set("carrier", "", wanted).decode()
        if wish is not None and found != wanted:
            raise ValueError(
                f"_transports must be the same on all workers: this one wants {wish!r}, and the "
                f"first one of this open world chose {found!r}"
            )
        return found

    def enter(
        self, rank: int, name: str, code: bool, address: bytes, carrier: str
    ) -> dict[int, bytes]:
        """Put up a card; the addresses of all who did so before."""
        self._store.set(f"card/{rank}", dumps([name, code, host_id(), address]))
        self._store.append("ranks", f"{rank} ")
        ranks = [int(r) for r in self._store.get("ranks").decode().split()]
        found = {}
        for other in ranks[: ranks.index(rank)]:
            _, _, host, where = self._card(other)
            if carrier == "unix" and host != host_id():
                raise DistError(
                    f"worker {other} is on host {host!r}, this one on {host_id()!r}: the workers of"
                    " this open world (world_size=None) use unix sockets and are on one host. For "
                    'several, give _transports=["tcp"] to the first worker, or a store on the '
                    "network"
                )
            found[other] = where
        return found

    def take_name(self, name: str, rank: int, lives: Callable[[int], bool]) -> None:
        """Let `name` mean `rank`; ValueError while a worker of that name `lives`."""
        key, before = f"name/{name}", b""
        while True:
            found = self._store.compare_set(key, before, str(rank))
            if found == str(rank).encode():
                return
            if lives(int(found)):
                raise ValueError(
                    f"RPC worker name {name!r} is not unique: rank {int(found)} has it"
                )
            before = found

    def rank_of(self, name: str) -> int | None:
        """Whom a name means now."""
        key = f"name/{name}"
        return int(self._store.get(key)) if self._store.check([key]) else None

    def about(self, rank: int) -> tuple[str, bool] | None:
        """Name of `rank` and whether it accepts code; None: there was no such worker."""
        if not self._store.check([f"card/{rank}"]):
            return None
        name, code, _, _ = self._card(rank)
        return name, code

    def _card(self, rank: int) -> list[Any]:
        card: list[Any] = loads(self._store.get(f"card/{rank}"))
        return card


class Members:
    """Names by rank: `members[rank]`. `lost(rank)`: whether that worker is known to be gone."""

    def __init__(
        self, about: dict[int, tuple[str, bool]], board: Board | None = None
    ) -> None:  # fmt: skip
        self._about, self.board = about, board
        self._ranks = {name: rank for rank, (name, _) in about.items()}
        self.lost: Callable[[int], bool] = lambda rank: False

    def __getitem__(self, rank: int) -> str:
        return self._known(rank)[0]

    def accepts(self, rank: int) -> bool:
        """Whether that worker accepts code."""
        return self._known(rank)[1]

    def ranks(self) -> list[int]:
        """All that are known here, in order."""
        return sorted(self._about.copy())

    def _known(self, rank: int) -> tuple[str, bool]:
        found = self._about.get(rank)
        if found is None and self.board is not None:
            found = self.board.about(rank)
            if found is not None:
                self._about[rank] = found
        if found is None:
            raise ValueError(f"Unknown destination worker {rank} (known: {self._shown()})")
        return found

    def _shown(self) -> str:
        return str([name for _, (name, _) in sorted(self._about.copy().items())])

    def find(self, to: Any) -> int:
        """The rank that `to` means: a name, a rank or a `WorkerInfo`; ValueError, as in torch."""
        rank = to.id if isinstance(to, WorkerInfo) else to
        if isinstance(rank, str):
            return self._find_name(rank)
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise ValueError(f"Cannot get WorkerInfo from name {to}")
        name = self._known(rank)[0]
        if isinstance(to, WorkerInfo) and to.name != name:
            raise ValueError(f"Unknown destination worker {to}: rank {rank} is {name!r}")
        return rank

    def _find_name(self, name: str) -> int:
        found = self._ranks.get(name)
        if self.board is not None and (found is None or self.lost(found)):
            found = self.board.rank_of(name)
            if found is not None:
                self._ranks[name] = found
        if found is None:
            raise ValueError(f"Unknown destination worker {name} (known: {self._shown()})")
        return found
