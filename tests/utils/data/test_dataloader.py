"""DataLoader: options, and what worker processes promise."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import warnings

import numpy as np
import psutil
import pytest

import dtrain as torch
from dtrain.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, get_worker_info


class Echo(Dataset):
    """Sample i is i, or what `act(i)` says."""

    def __init__(self, length, act=lambda index: index):
        self.length, self.act = length, act

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return self.act(index)


class Endless(IterableDataset):
    def __iter__(self):
        return iter(range(10**9))


@pytest.fixture(autouse=True)
def no_worker_is_left():
    """Every process that a test started has ended, once its loaders are dropped."""
    before = set(psutil.Process().children())
    yield
    assert not set(psutil.Process().children()) - before


def test_batches_of_tensors():
    data = TensorDataset(torch.arange(10).view(5, 2), torch.arange(5))
    loader = DataLoader(data, batch_size=2)
    assert len(loader) == 3
    x, y = list(loader)[-1]
    assert (x.tolist(), y.tolist()) == ([[8, 9]], [4])
    assert list(DataLoader(data, batch_size=None))[1][0].tolist() == [2, 3]


def test_samplers_collate_and_accepted_options():
    loader = DataLoader(range(6), batch_sampler=[[5, 0], [3]], pin_memory=True, collate_fn=tuple)
    assert list(loader) == [(5, 0), (3,)]
    assert len(loader) == 2
    assert [b.item() for b in DataLoader(range(6), sampler=[4, 1], in_order=False)] == [4, 1]


def test_lengths_of_iterable_datasets():
    class Known(Endless):
        def __len__(self):
            return 10

    lengths = [len(DataLoader(Known(), n, drop_last=d)) for n, d in ((3, False), (3, True))]
    assert lengths == [4, 3]
    assert len(DataLoader(Known(), None)) == 10
    with pytest.raises(TypeError, match="len"):
        len(DataLoader(Endless()))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_workers": -1}, "num_workers option should be non-negative"),
        ({"timeout": -1}, "timeout option should be non-negative"),
        ({"timeout": 1}, "timeout needs num_workers > 0"),
        ({"prefetch_factor": 2}, "prefetch_factor option could only be specified in multiproc"),
        ({"persistent_workers": True}, "persistent_workers needs num_workers > 0"),
        ({"prefetch_factor": 0, "num_workers": 1}, "prefetch_factor option should be positive"),
        ({"sampler": [0], "shuffle": True}, "sampler option is mutually exclusive with shuffle"),
        ({"batch_sampler": [[0]], "batch_size": 2}, "batch_sampler option is mutually exclusive"),
        ({"batch_size": None, "drop_last": True}, "batch_size=None option disables auto-batching"),
        ({"batch_size": 0}, "batch_size should be a positive integer value"),
    ],
)
def test_what_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        DataLoader(range(3), **options)


def test_iterable_datasets_have_their_own_order_and_options_stay():
    for name, value in (("shuffle", True), ("sampler", [0]), ("batch_sampler", [[0]])):
        with pytest.raises(ValueError, match=f"expected unspecified {name} option"):
            DataLoader(Endless(), **{name: value})
    loader = DataLoader(range(3))
    with pytest.raises(ValueError, match="batch_size attribute should not be set after"):
        loader.batch_size = 2


# --- worker processes ----------------------------------------------------------------------------


def test_batches_come_in_order_although_workers_are_not_equally_fast():
    def act(index):
        if index % 4 == 0:
            threading.Event().wait(0.05)
        return index, np.full((2, 3), index), torch.zeros(0), f"s{index}"

    for index, numbers, empty, text in DataLoader(Echo(12, act), None, num_workers=2):
        assert text == [f"s{index}"] or text == f"s{index}"
        assert (numbers == index).all()
        assert empty.shape == (0,)
        numbers += 1  # batches are writable
    assert index == 11


def test_workers_know_who_they_are_and_are_set_up():
    def init(number):
        global_state["number"] = number

    def act(index):
        info = get_worker_info()
        ready = global_state["number"] == info.id
        return (
            info.id,
            info.num_workers,
            info.dataset.length,
            info.seed - info.id,
            ready,
            os.getpid(),
        )

    global_state = {}
    loader = DataLoader(Echo(4, act), None, num_workers=2, worker_init_fn=init)
    rows = [tuple(row) for row in loader]
    assert [row[0] for row in rows] == [0, 1, 0, 1]
    assert {row[1:3] + row[4:5] for row in rows} == {(2, 4, True)}
    assert len({row[3] for row in rows}) == 1
    assert len({row[5] for row in rows} | {os.getpid()}) == 3
    assert get_worker_info() is None


def test_an_error_in_a_worker_is_raised_here_with_its_traceback():
    def act(index):
        return {}["missing"] if index == 3 else index

    with pytest.raises(KeyError) as caught:
        list(DataLoader(Echo(5, act), 1, num_workers=2))
    text = str(caught.value)
    assert "Caught KeyError in DataLoader worker process 1.\nOriginal Traceback" in text
    assert 'return {}["missing"]' in text


class WantsTwo(Exception):
    def __init__(self, a, b):
        super().__init__(a, b)


def test_errors_that_cannot_be_made_again_and_errors_at_the_start():
    def act(index):
        raise WantsTwo(1, 2)

    def init(number):
        raise OSError("no such disk")

    with pytest.raises(RuntimeError, match="Caught WantsTwo in DataLoader worker process 0"):
        list(DataLoader(Echo(2, act), num_workers=1))
    with pytest.raises(OSError, match=r"(?s)Caught OSError.*no such disk"):
        list(DataLoader(Echo(2), num_workers=1, worker_init_fn=init))


def test_what_cannot_be_sent_is_said():
    with pytest.raises(TypeError, match=r"cannot be sent to worker processes: .*num_workers=0"):
        iter(DataLoader(Echo(2, threading.Lock()), num_workers=1))


def test_a_worker_that_dies_is_told_of():
    def act(index):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError, match=r"worker 0 \(pid\(s\) \d+\) exited unexpectedly.*-9"):
        list(DataLoader(Echo(2, act), num_workers=1))


def test_a_worker_that_is_slow_is_told_of():
    def act(index):
        threading.Event().wait(60)

    with pytest.raises(RuntimeError, match=r"timed out after 0\.2 seconds: worker 0"):
        list(DataLoader(Echo(2, act), num_workers=1, timeout=0.2))


def test_a_loop_may_be_left_early():
    iterator = iter(DataLoader(Endless(), batch_size=2, num_workers=1))
    assert next(iterator).tolist() == [0, 1]
    del iterator
    for batch in DataLoader(range(100), num_workers=1):
        assert batch.tolist() == [0]
        break


def test_persistent_workers_stay_and_start_anew():
    loader = DataLoader(
        Echo(20, lambda index: os.getpid()), None, num_workers=1, persistent_workers=True
    )
    first = next(iter(loader))  # left early: the rest is dropped
    assert set(loader) == {first}
    assert psutil.pid_exists(first)
    del loader
    assert not psutil.pid_exists(first)


def test_more_workers_than_cores_are_warned_of():
    loader = DataLoader(range(1), num_workers=len(os.sched_getaffinity(0)) + 1)
    with pytest.warns(UserWarning, match="Our suggested max number of worker"):
        assert [b.item() for b in loader] == [0]


def test_a_script_needs_no_guard_and_its_workers_die_with_it(tmp_path):
    """A killed script: its workers, one of them at work, are gone within seconds."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import os, signal, threading
        from dtrain.utils.data import DataLoader, Dataset

        class Slow(Dataset):
            def __len__(self):
                return 100
            def __getitem__(self, index):
                if index >= 2:
                    threading.Event().wait(60)
                return os.getpid()

        pids = [int(x) for _, x in zip(range(2), DataLoader(Slow(), None, num_workers=2))]
        print(*pids, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """)
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with warnings.catch_warnings():
        run = subprocess.run(
            [sys.executable, script], env=environment, capture_output=True, text=True, timeout=30
        )
    pids = [int(word) for word in run.stdout.split()]
    assert len(set(pids)) == 2, run.stderr
    _, alive = psutil.wait_procs([psutil.Process(p) for p in pids if psutil.pid_exists(p)], 10)
    assert not alive
