"""What the processes of tests/multiprocessing/test_spawn.py run: found by name, as spawn wants."""

from __future__ import annotations

import os
import signal
import sys
import time

import dtrain as torch
from dtrain.errors import PeerLost


def write_rank(index, folder, text):
    (folder / str(index)).write_text(f"{text} {os.getpid()}")


def all_reduce(index, meeting, size, folder):
    """Rank r brings r + 1: the sum over n ranks is n (n + 1) / 2."""
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=index, world_size=size)
    x = torch.tensor([index + 1.0])
    dist.all_reduce(x)
    dist.destroy_process_group()
    (folder / str(index)).write_text(f"{x.item()} {torch.get_num_threads()}")


def fail(index, how):
    if index != 1:
        time.sleep(60)
    if how == "raise":
        raise ValueError("no data for rank 1")
    if how == "long":
        raise ValueError("x" * 200_000 + " the end")
    if how == "exit":
        sys.exit(7)
    os.kill(os.getpid(), signal.SIGSEGV if how == "crash" else signal.SIGKILL)


def lose(index, started):
    """Process 0 fails first, but only because of process 1, which fails a little later."""
    if index == 0:
        raise RuntimeError("step 3 failed") from PeerLost(1)
    while not started.is_set():
        time.sleep(0.01)
    time.sleep(0.2)
    raise ValueError("the reason")


def stubborn(index):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if index == 1:
        raise ValueError("no data for rank 1")
    time.sleep(60)


def interrupted(index):
    raise KeyboardInterrupt


def start_and_wait(method, folder, threaded):
    """A parent for tests that kill it: starts two sleepers, says so, and waits."""
    import threading

    def start():
        context = torch.multiprocessing.start_processes(
            sleep, (folder,), 2, join=False, start_method=method
        )
        context.join()

    if threaded:
        threading.Thread(target=start).start()
    else:
        start()


def sleep(index, folder):
    (folder / f"{index}.part").write_text(str(os.getpid()))
    (folder / f"{index}.part").rename(folder / f"{index}.pid")
    time.sleep(60)


def second_time():
    """Rank 1 of the first attempt fails; every rank returns the number of its attempt."""
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if attempt == 0 and os.environ["RANK"] == "1":
        raise ValueError("the first time")
    return attempt


def lock():
    import threading

    return threading.Lock()


def answer(index, questions, answers):
    """Twice what is asked, as a tensor, with the gradient flag that it came with."""
    x = questions.get()
    answers.put((2 * x.detach()).requires_grad_(x.requires_grad))
