"""A rank that dies in the middle of a training step: who is blamed, how soon, what is left."""

from __future__ import annotations

import textwrap
import time

import psutil
import pytest

from tests.end_to_end.launch import dtrun

TRAIN = textwrap.dedent(
    """
    import os, signal, sys, threading, time
    from pathlib import Path
    import dtrain as torch

    dist, nn = torch.distributed, torch.nn
    dist.init_process_group()
    rank = dist.get_rank()
    notes = Path(sys.argv[1])
    (notes / f"pid{rank}").write_text(str(os.getpid()))
    model = nn.parallel.DistributedDataParallel(
        nn.Sequential(*[nn.Linear(256, 256) for _ in range(8)]), bucket_cap_mb=0.2)
    hook_at = {"backward": 3, "forward": None}[sys.argv[2]]

    def die(*_):
        (notes / "died").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)

    for step in range(1000):
        if rank == 1 and step == 5:
            if hook_at is None:
                die()
            model.module[hook_at].weight.register_post_accumulate_grad_hook(die)
        model.zero_grad()
        model(torch.ones(64, 256)).sum().backward()
    """
)


@pytest.mark.parametrize("where", ["backward", "forward"])
def test_sigkill_in_mid_step(tmp_path, where):
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    ended = dtrun(3, script, tmp_path, where)
    died = float((tmp_path / "died").read_text())
    assert time.time() - died < 2.0 + 0.5  # 2 s is the promise; the rest is reading the output
    assert ended.code == 128 + 9
    assert "SIGKILL" in ended.err
    assert "rank 1" in ended.err
    for rank in (0, 2):
        pid = int((tmp_path / f"pid{rank}").read_text())
        assert not psutil.pid_exists(pid)
