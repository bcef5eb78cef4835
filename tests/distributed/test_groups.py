"""Joining, leaving, sub-groups, and the sentences for doing it wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading

import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.comm.transports import futex
from dtrain.distributed.world import own_world
from dtrain.testing.distributed import run_distributed


def in_threads(size, fn):
    """Run fn(rank) in `size` threads, each with a world of its own; raise what they raise."""
    errors = []

    def main(rank):
        try:
            with own_world():
                fn(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=main, args=(r,)) for r in range(size)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(20)
        assert not t.is_alive()
    if errors:
        raise errors[0]


def test_nothing_works_before_init():
    with own_world():
        assert dist.is_available()
        assert not dist.is_initialized()
        with pytest.raises(ValueError, match="Default process group has not been initialized"):
            dist.all_reduce(torch.ones(1))
        with pytest.raises(ValueError, match="please make sure to call init_process_group"):
            dist.get_rank()
        dist.destroy_process_group()  # harmless


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_env_names_the_missing_variable(monkeypatch, name):
    for key, value in {
        "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
    }.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    monkeypatch.delenv(name)
    with own_world(), pytest.raises(ValueError, match=f"environment variable {name} expected"):
        dist.init_process_group()


def test_processes_of_one_host_share_memory_by_default(tmp_path):
    """As separate processes would meet: in a file, without a backend's name."""

    def rank(r):
        dist.init_process_group(init_method=f"file://{tmp_path}/m", rank=r, world_size=2, timeout=9)
        ours = "shm" if futex.AVAILABLE else "zmq"
        assert dist.get_backend() == ours
        assert dist.get_backend(dist.new_group([1, 0])) == ours
        dist.destroy_process_group()

    in_threads(2, rank)


def test_store_init_and_twice():
    store = dist.HashStore()

    def rank(r):
        dist.init_process_group(store=store, rank=r, world_size=2, timeout=10)
        assert (dist.get_rank(), dist.get_world_size()) == (r, 2)
        assert dist.get_backend() == "local"
        with pytest.raises(ValueError, match="initialize the default process group twice"):
            dist.init_process_group(store=store, rank=r, world_size=2)
        dist.destroy_process_group()
        dist.destroy_process_group()
        assert not dist.is_initialized()

    in_threads(2, rank)


def test_tcp_and_file_urls(tmp_path):
    with dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) as holder:
        port = holder.port  # free again when the holder closes; only this test binds it

    def over(url):
        def rank(r):
            dist.init_process_group("gloo", init_method=url, rank=r, world_size=2, timeout=10)
            assert dist.get_backend() == "gloo"
            t = torch.ones(2)
            dist.all_reduce(t)
            assert t.tolist() == [2.0, 2.0]
            dist.destroy_process_group()

        in_threads(2, rank)

    over(f"tcp://127.0.0.1:{port}")
    over(f"file://{tmp_path}/meeting")
    over(f"file://{tmp_path}/meeting")  # a used file is no trap


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"init_method": "carrier://pigeon"}, RuntimeError, "No rendezvous handler for carrier://"),
        ({"init_method": "tcp://127.0.0.1:1"}, ValueError, "rank parameter missing"),
        ({"init_method": "tcp://h", "rank": 0, "world_size": 1}, ValueError, "port number missing"),
        ({"init_method": "file://", "rank": 0, "world_size": 1}, ValueError, "path missing"),
        ({"backend": "smoke"}, ValueError, "Invalid backend: 'smoke'"),
        ({"backend": "cuda:nccl"}, ValueError, "no backend for device cpu in cuda:nccl"),
        ({"init_method": "env://"}, ValueError, "Cannot specify both init_method and store"),
        ({"rank": -1}, ValueError, "store needs rank and world_size"),
        ({"timeout": -1}, ValueError, "a timeout must be positive"),
    ],
)
def test_wrong_arguments(arguments, error, sentence):
    with own_world():
        if "://" not in arguments.get("init_method", "") or "env" in arguments["init_method"]:
            arguments = {"store": dist.HashStore(), "rank": 0, "world_size": 1, **arguments}
        with pytest.raises(error, match=sentence):
            dist.init_process_group(**arguments)
        assert not dist.is_initialized()


def check_new_group():
    """Ranks 1 and 3 of 4: only members take part, others get NON_GROUP_MEMBER and rank -1."""
    rank = dist.get_rank()
    pair = dist.new_group([3, 1])
    if rank in (1, 3):
        assert dist.get_rank(pair) == (1, 3).index(rank)
        assert dist.get_process_group_ranks(pair) == [1, 3]
        assert dist.get_group_rank(pair, 3) == 1
        assert dist.get_global_rank(pair, 0) == 1
        t = torch.tensor([float(rank)])
        dist.all_reduce(t, group=pair)
        assert t.item() == 4.0
        dist.broadcast(t, src=3, group=pair)  # src is a global rank
        dist.broadcast(t, group_src=0, group=pair)
        with pytest.raises(ValueError, match="Global rank 0 is not part of group"):
            dist.broadcast(t, src=0, group=pair)
        dist.destroy_process_group(pair)
    else:
        assert pair is dist.GroupMember.NON_GROUP_MEMBER
        assert dist.get_rank(pair) == -1
        with pytest.warns(UserWarning, match="does not belong to the given group"):
            dist.all_reduce(torch.ones(1), group=pair)
    everyone = dist.new_group()
    assert dist.get_world_size(everyone) == 4
    with pytest.raises(ValueError, match="should be within the world_size"):
        dist.new_group([0, 7])
    with pytest.raises(ValueError, match="less or equal to the world size"):
        dist.new_group([0, 1, 2, 3, 3])
    dist.barrier()


@pytest.mark.parametrize("transport", ["local", "zmq"])
def test_new_group(transport):
    run_distributed(4, check_new_group, transport=transport)


def test_a_process_that_forgets_to_destroy_ends_silently(tmp_path):
    script = tmp_path / "forgets.py"
    script.write_text(
        textwrap.dedent(
            """
            import dtrain as torch
            import dtrain.distributed as dist
            dist.init_process_group(init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
            """
        )
        .replace("127.0.0.1:0", f"{tmp_path}/f")
        .replace("tcp://", "file://")
    )
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=30, env=os.environ
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def check_sampler():
    from dtrain.utils.data import DistributedSampler

    sampler = DistributedSampler(range(6), shuffle=False)
    assert list(sampler) == [dist.get_rank(), dist.get_rank() + 3]


def test_a_distributed_sampler_knows_the_default_group():
    run_distributed(3, check_sampler)
