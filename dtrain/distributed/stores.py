"""The key-value stores under torch's names and signatures.

Source: torch.distributed.{Store, TCPStore, FileStore, HashStore, PrefixStore}.
"""

from __future__ import annotations

from dtrain import env
from dtrain.comm.store.base import DEFAULT_TIMEOUT, Store, Timeout
from dtrain.comm.store.file import FileStore as _FileStore
from dtrain.comm.store.memory import MemoryStore
from dtrain.comm.store.prefix import PrefixStore as PrefixStore
from dtrain.comm.store.tcp import TcpStore
from dtrain.distributed.work import seconds

__all__ = ["FakeStore", "FileStore", "HashStore", "PrefixStore", "Store", "TCPStore"]


class TCPStore(TcpStore):
    """A store served over TCP by the process that says `is_master=True`.

    `port=0` takes a free port (see `.port`). `wait_for_workers` waits until `world_size` clients
    have come. `timeout` is a timedelta or seconds. `master_listen_fd`: the master serves on this
    socket, which listens on a loopback address already and stays the caller's to close; host and
    port are then its own. `multi_tenant` and `use_libuv` are accepted and change nothing.
    Source: torch.distributed.TCPStore.
    """

    def __init__(
        self,
        host_name: str,
        port: int,
        world_size: int | None = None,
        is_master: bool = False,
        timeout: Timeout = DEFAULT_TIMEOUT,
        wait_for_workers: bool = True,
        multi_tenant: bool = False,
        master_listen_fd: int | None = None,
        use_libuv: bool = True,
    ) -> None:
        patience = seconds(timeout) or DEFAULT_TIMEOUT
        super().__init__(
            host_name, port, is_master=is_master, timeout=patience, listen_fd=master_listen_fd
        )
        if world_size and wait_for_workers:
            try:
                self._await_workers(world_size)
            except BaseException:
                self.close()
                raise

    def _await_workers(self, world_size: int) -> None:
        if self.add("dtrain/workers", 1) >= world_size:
            self.set("dtrain/all_workers", b"1")
        self.wait(["dtrain/all_workers"])


class FileStore(_FileStore):
    """A store in a file that all ranks can reach. Source: torch.distributed.FileStore.

    A file that an earlier run of the launcher left behind is begun anew. `world_size` is accepted
    and not needed: nothing is counted in the file.
    """

    def __init__(
        self, file_name: str, world_size: int = -1, timeout: Timeout = DEFAULT_TIMEOUT
    ) -> None:
        patience = seconds(timeout) or DEFAULT_TIMEOUT
        super().__init__(file_name, run_id=env.run_identity(), timeout=patience)


class FakeStore(MemoryStore):
    """A store that nobody reads, for the backend "fake". Source: torch's FakeStore."""


class HashStore(MemoryStore):
    """A store in this process's memory, for ranks that are threads. Source: torch's HashStore."""
