"""Who is blamed: every survivor says the same of the rank that is the reason, and only of that."""

from __future__ import annotations

import textwrap

import pytest

from tests.end_to_end.launch import dtrun

HEAD = textwrap.dedent(
    """
    import os, signal, sys, threading, time
    import dtrain as torch
    from dtrain.comm.security import sockets

    dist = torch.distributed
    sockets.HEARTBEAT = sockets.Heartbeat(200, 700)
    dist.init_process_group(sys.argv[1])
    rank = dist.get_rank()
    x = torch.ones(4)

    def blame(group=None):
        started = time.monotonic()
        try:
            while True:
                dist.all_reduce(x, group=group)
        except dist.DistError as error:
            seconds = time.monotonic() - started
            print(f"blame|{type(error).__name__}|{error}|{seconds}", flush=True)
            raise
    """
)


def _blames(tmp_path, ranks, body, *arguments):
    """What the survivors say, and how the run ended."""
    script = tmp_path / "train.py"
    script.write_text(HEAD + textwrap.dedent(body))
    ended = dtrun(ranks, script, *arguments)
    lines = [line.split("blame|")[1] for line in ended.out.splitlines() if "blame|" in line]
    kinds, sentences, seconds = zip(*[line.split("|") for line in lines], strict=True)
    return ended, set(kinds), list(sentences), [float(s) for s in seconds]


@pytest.mark.parametrize("backend", ["shm", "zmq"])
def test_sigkill(tmp_path, backend):
    """Rank 1 dies in its user's code; all others wait for it in a small all_reduce."""
    body = """
        if rank == 1:
            for _ in range(3):
                dist.all_reduce(x)
            os.kill(os.getpid(), signal.SIGKILL)
        blame()
        """
    ended, kinds, sentences, seconds = _blames(tmp_path, 3, body, backend)
    assert kinds == {"PeerLost"}
    assert len(sentences) == 2
    assert len(set(sentences)) == 1, sentences
    assert sentences[0].startswith("group 'default': rank 1 is lost: its process (pid ")
    assert (
        ") was ended by SIGKILL. Its last call was #2 all_reduce(float32[4], op=SUM) at "
        in (sentences[0])
    )
    assert sentences[0].endswith("train.py:24 in group 'default'")
    assert max(seconds) < 0.5  # 0.03 s on an idle machine
    assert ended.code == 128 + 9


@pytest.mark.parametrize("backend", ["shm", "zmq"])
def test_sigstop(tmp_path, backend):
    """A rank that is stopped for longer than it may be silent; dtrun ends it in the end."""
    body = """
        if rank == 1:
            dist.all_reduce(x)
            os.kill(os.getpid(), signal.SIGSTOP)
        blame()
        """
    _, kinds, sentences, seconds = _blames(tmp_path, 3, body, backend)
    assert kinds == {"PeerLost"}
    assert len(sentences) == 2
    assert len(set(sentences)) == 1, sentences
    assert "rank 1 is lost: its process (pid " in sentences[0]
    assert "has been stopped (SIGSTOP) for 0.5 s. Its last call was #0 all_reduce(" in sentences[0]
    assert max(seconds) < 2.0


def test_a_short_stop_is_no_error(tmp_path):
    body = """
        dist.barrier()
        if rank == 1:
            if os.fork() == 0:
                time.sleep(0.15)
                os.kill(os.getppid(), signal.SIGCONT)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.all_reduce(x)
        print("blame|none||0", flush=True)
        """
    ended, kinds, sentences, _ = _blames(tmp_path, 3, body, "shm")
    assert (ended.code, kinds, len(sentences)) == (0, {"none"}, 3)


def test_an_exception_is_told_to_the_others(tmp_path):
    body = """
        if rank == 1:
            dist.all_reduce(x)
            raise ValueError("no data")
        blame()
        """
    ended, kinds, sentences, _ = _blames(tmp_path, 3, body, "shm")
    assert kinds == {"PeerLost"}
    assert len(set(sentences)) == 1, sentences
    assert (
        "rank 1 has closed its side of the group: it makes no more calls here (it ended with"
        in (sentences[0])
    )
    assert "ValueError: no data at " in sentences[0]
    assert sentences[0].endswith("train.py:24)")
    assert "ValueError: no data" in ended.err


def test_who_raised_and_left_is_not_blamed_by_a_third(tmp_path):
    """Rank 2 dies. Rank 0 waits for it; rank 1 waits for rank 0, in a group without rank 2."""
    body = """
        pair = dist.new_group([0, 1])
        dist.all_reduce(x)
        if rank == 2:
            for survivor in (0, 1):
                dist.recv(x, survivor)
            os.kill(os.getpid(), signal.SIGKILL)
        dist.send(x, 2)
        blame(None if rank == 0 else pair)
        """
    _, kinds, sentences, _ = _blames(tmp_path, 3, body, "zmq")
    assert kinds == {"PeerLost"}
    assert len(sentences) == 2
    assert len(set(sentences)) == 1, sentences
    assert sentences[0].startswith("group 'default': rank 2 is lost: its process (pid ")


def test_a_rank_that_ends_without_leaving_still_says_goodbye(dtrun):
    """Large messages have started pyzmq's collector: its exit handler must not run before ours."""
    dtrun.script("""
        import dtrain as torch
        dist = torch.distributed
        dist.init_process_group("zmq")
        dist.all_reduce(torch.ones(300_000))
        if rank == 1:
            raise ValueError("no data")
        dist.barrier()
        """)
    run = dtrun.run("--nproc-per-node", "2", "train.py")
    assert run.returncode == 1
    assert "rank 1 has closed its side" in run.stderr
    assert "Exception ignored" not in run.stderr


def test_a_rank_that_is_stuck_in_c_is_named_with_its_line(tmp_path):
    """It holds the interpreter: its connections are answered all the same, and so is who asks."""
    body = """
        from collections import deque
        from datetime import timedelta
        from itertools import repeat
        group = dist.new_group(timeout=timedelta(seconds=0.5))
        if rank == 1:
            deque(repeat(0), maxlen=0)
        dist.all_reduce(x, group=group)
        """
    script = tmp_path / "train.py"
    script.write_text(HEAD + textwrap.dedent(body))
    ended = dtrun(2, script, "shm")
    assert ended.code == 1
    assert "no data from rank 1 for 0.5 s" in ended.err
    assert 'train.py", line 27, in <module>\n        deque(repeat(0), maxlen=0)\n' in ended.err
