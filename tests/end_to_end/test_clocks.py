"""Two hosts with clocks a day apart: nobody is taken for dead, no deadline comes early or late."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.end_to_end.hosts import ADDRESSES, ended, two_hosts, why_not

SHIFT = ["unshare", "--time", "--monotonic", "86400", "--boottime", "86400", "--fork"]


def why_no_shift() -> str:
    """Why the clock of a host cannot be shifted here; "" when it can."""
    if reason := why_not():
        return reason
    tried = subprocess.run([*SHIFT, "true"], capture_output=True, text=True, check=False)
    return f"not run: {tried.stderr.strip()}" if tried.returncode else ""


pytestmark = pytest.mark.skipif(bool(why_no_shift()), reason=why_no_shift() or "-")

TRAIN = """
import time
from datetime import timedelta
import dtrain as torch
dist = torch.distributed
dist.init_process_group()
clocks = [None, None]
dist.all_gather_object(clocks, time.monotonic())
for step in range(50):
    total = torch.ones(10)
    dist.all_reduce(total)
    assert total.tolist() == [2.0] * 10
    time.sleep(0.01)
waited = time.monotonic()
try:  # its deadline is one of the host of rank 0
    dist.distributed_c10d._get_default_store().wait(["nobody sets this"], timedelta(seconds=0.5))
except dist.DistStoreError:
    waited = time.monotonic() - waited
assert 0.45 < waited < 5.0, waited
dist.barrier()
print("apart", round(clocks[1] - clocks[0], -3), flush=True)
"""


def test_clocks_that_are_a_day_apart_change_nothing(tmp_path):
    made = [sys.executable, "-m", "dtrun", "keygen"]
    key, script = tmp_path / "job.key", tmp_path / "train.py"
    key.write_bytes(subprocess.run(made, capture_output=True, check=True).stdout)
    key.chmod(0o600)
    script.write_text(TRAIN)
    conf = ("--rdzv-conf", "keep_alive_interval=0.2,keep_alive_max_attempt=15")
    meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:29500", *conf)
    flags = ("--nnodes", "2", "--secret-file", key, script)
    command = (sys.executable, "-m", "dtrun", *meeting, *flags)
    with two_hosts() as hosts:
        nodes = [hosts.start(0, *command), hosts.start(1, *SHIFT, "--kill-child", *command)]
        for code, out, err in ended(*nodes):
            assert code == 0, err
            assert "apart 86000.0" in out
            assert "lost" not in err
