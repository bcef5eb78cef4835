"""Names of backends, and backends that a program registers: here one that injects faults."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.comm.transports import base
from dtrain.comm.transports.local import LocalTransport
from dtrain.distributed.backend import BackendOptions
from dtrain.distributed.world import own_world
from dtrain.errors import CollectiveTimeout
from dtrain.testing.distributed import run_distributed


def test_names():
    assert dist.Backend("GLOO") == dist.Backend.GLOO == "gloo"
    assert isinstance(dist.Backend("zmq"), str)
    with pytest.raises(ValueError, match="Invalid backend: 'smoke'"):
        dist.Backend("smoke")
    with pytest.raises(ValueError, match="must be string-ish"):
        dist.Backend(None)
    config = dist.BackendConfig("cpu:gloo,cuda:nccl")
    assert config.get_device_backend_map() == {"cpu": "gloo", "cuda": "nccl"}
    assert (repr(config), repr(dist.BackendConfig("zmq"))) == ("cpu:gloo,cuda:nccl", "cpu:zmq")


def test_what_is_available():
    assert dist.is_gloo_available()
    assert not dist.is_nccl_available()
    assert [dist.is_backend_available(n) for n in ("gloo", "ZMQ", "local", "nccl", "ucc")] == [
        *(True, True, True, False, False),
    ]
    assert dist.get_default_backend_for_device("cpu") == "gloo"
    assert dist.get_default_backend_for_device(torch.device("cpu")) == "gloo"
    with pytest.raises(ValueError, match="not registered for device : cuda"):
        dist.get_default_backend_for_device("cuda:0")
    assert dist.is_backend_available("mpi") == dist.is_mpi_available()


@pytest.fixture
def registered(monkeypatch):
    """Registers backends, and forgets them after the test."""
    monkeypatch.setattr(base, "_factories", dict(base._factories))
    names = []

    def register(name, func, **options):
        dist.Backend.register_backend(name, func, **options)
        names.append(name)

    yield register
    for name in names:
        delattr(dist.Backend, name.upper())


class Lossy(LocalTransport):
    """Loses the second message of rank 0."""

    sent = 0

    def _send(self, dst, tag, buf, note):
        self.sent += 1
        if self.rank or self.sent != 2:
            super()._send(dst, tag, buf, note)


def test_a_backend_that_loses_a_message(registered):
    registered("lossy", Lossy)
    assert dist.Backend.LOSSY == "lossy"
    with pytest.raises(RuntimeError, match="LOSSY c10d backend already exist"):
        dist.Backend.register_backend("lossy", Lossy)

    def main():
        group = dist.new_group(backend="lossy")
        assert dist.get_backend(group) == "lossy"
        x = torch.ones(2)
        dist.all_reduce(x, group=group)
        assert x.tolist() == [2.0, 2.0]
        dist.set_timeout(timedelta(seconds=0.1), group)
        if dist.get_rank() == 0:
            dist.all_reduce(x, group=group)  # has all it needs
        else:
            with pytest.raises(CollectiveTimeout, match="no data from rank 0"):
                dist.all_reduce(x, group=group)
        dist.barrier()  # rank 0 stays until then

    run_distributed(2, main)


def test_the_extended_interface(registered):
    seen = []

    def build(options, pg_options):
        seen.append((options, pg_options))
        return LocalTransport(
            options.store, options.group_rank, options.group_size, options.timeout.total_seconds()
        )

    registered("extended", build, extended_api=True, devices="cpu")
    store = dist.HashStore()

    def rank(r):
        with own_world():
            dist.init_process_group("cpu:extended", store=store, rank=r, world_size=2, timeout=20)
            assert dist.get_backend_config() == "cpu:extended"
            dist.barrier()

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    options = [o for o, extra in seen if isinstance(o, BackendOptions) and extra is None]
    assert {o.group_rank for o in options} == {0, 1}
    assert {o.timeout for o in options} == {timedelta(seconds=20)}
