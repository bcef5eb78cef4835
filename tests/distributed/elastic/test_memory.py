"""Memory that outlives a process: what is written is whole, or what was there before is."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

import dtrain as torch
from dtrain.distributed.elastic.memory import Memory
from dtrain.distributed.elastic.packing import pack, unpack


@pytest.fixture
def slots():
    made = [os.memfd_create("test") for _ in range(2)]
    yield made
    for descriptor in made:
        os.close(descriptor)


def test_the_two_newest_are_kept(slots):
    memory = Memory(slots)
    assert memory.numbers() == set()
    for number in range(1, 6):
        memory.write(number, [b"number ", str(number).encode() * number])
        assert memory.read(number) == b"number " + str(number).encode() * number
    assert memory.numbers() == {4, 5}
    assert Memory(slots).read(4) == b"number 4444"  # whoever opens it next
    with pytest.raises(KeyError):
        memory.read(3)


def test_a_write_that_is_interrupted_leaves_the_newest(slots):
    memory = Memory(slots)
    memory.write(1, [b"one"])
    memory.write(2, [b"two"])

    def killed():
        yield b"thr"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        memory.write(3, killed())
    assert memory.numbers() == {2}
    assert memory.read(2) == b"two"
    memory.write(3, [b"three"])
    assert memory.numbers() == {2, 3}


def test_no_memory_left_is_an_error_and_the_newest_is_whole(slots, monkeypatch):
    memory = Memory(slots)
    memory.write(1, [b"one"])

    def full(*args):
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="no space"):
            memory.write(2, [b"two"])
    assert memory.read(1) == b"one"


def test_a_state_comes_back_as_it_was():
    state = {
        "model": {"weight": torch.randn(3, 4), "scalar": torch.tensor(2.5), "none": torch.empty(0)},
        "half": torch.ones(3, dtype=torch.bfloat16),
        "array": np.arange(6).reshape(2, 3).T,
        "plain": [1, "two", (3.0, None), {4: b"5"}, 2**70],
        "last": torch.arange(5),
    }
    found = unpack(b"".join(bytes(part) for part in pack(state)))
    assert found["plain"] == state["plain"]
    assert (found["array"] == state["array"]).all()
    for name in ("half", "last"):
        assert torch.equal(found[name], state[name])
        assert found[name].dtype is state[name].dtype
    assert all(torch.equal(found["model"][n], state["model"][n]) for n in state["model"])
    assert [t.shape for t in found["model"].values()] == [(3, 4), (), (0,)]


def test_what_is_no_data_is_named():
    with pytest.raises(TypeError, match=r"object\['a'\]\[0\]: a builtins.object"):
        pack({"a": [object()]})
