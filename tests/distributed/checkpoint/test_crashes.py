"""A save that is killed, fails, or loses power at any of its events leaves a complete checkpoint.

The events are recorded from a run that nothing happens to, and each of them is struck in turn, so
that an event that the code gains is covered the day it comes.
"""

from __future__ import annotations

import errno
import os
import warnings

import pytest

import dtrain as torch
import dtrain.distributed as dist
import dtrain.distributed.checkpoint as dcp
from dtrain.distributed.tensor import Shard, distribute_tensor
from dtrain.testing.distributed import run_distributed
from tests.distributed.checkpoint.disk import LOSSES, Disk, Killed, Remains


def state(step):
    return {"w": torch.full((5, 3), float(step)), "step": step}


def save_step(folder, step, keep=1):
    dcp.save(state(step), storage_writer=dcp.FileSystemWriter(folder / f"step-{step}", keep=keep))


def replaced(folder):
    dcp.save(state(7), checkpoint_id=folder / "step-1")


SAVES = {
    "the first": (None, lambda folder: save_step(folder, 2), 2),
    "a next": (1, lambda folder: save_step(folder, 2), 2),
    "a next, all kept": (1, lambda folder: save_step(folder, 2, keep=9), 2),
    "in place of": (1, replaced, 7),
}


def found_in(folder):
    """The step of the newest checkpoint, all of which must be right; None when there is none."""
    newest = dcp.latest(folder)
    if newest is None:
        return None
    blank = state(0)
    reader = dcp.FileSystemReader(newest, fallback=False)
    dcp.load(blank, storage_reader=reader, no_dist=True)
    assert blank["w"].unique().tolist() == [blank["step"]]
    return blank["step"]


def prepared(tmp_path, name, before):
    folder = tmp_path / name
    folder.mkdir()
    if before is not None:
        save_step(folder, before)
    return folder


def recorded(tmp_path, before, save):
    """The events of a save that nothing happens to."""
    folder = prepared(tmp_path, "undisturbed", before)
    disk = Disk(folder)
    with disk.watched():
        save(folder)
    return disk.events


def at(number, what):
    return lambda n, kind: what if n == number else None


@pytest.mark.parametrize("case", SAVES.values(), ids=SAVES)
def test_killed_at_any_event(tmp_path, case):
    before, save, after = case
    events = recorded(tmp_path, before, save)
    assert {"mkdir", "create", "write", "fsync"} < {kind for kind, *_ in events}
    seen = set()
    for number in range(len(events)):
        folder = prepared(tmp_path, f"{number}", before)
        disk = Disk(folder, at(number, "die"))
        with disk.watched(), pytest.raises(Killed), warnings.catch_warnings():
            save(folder)
        assert disk.dead
        seen.add(found_in(folder))
        assert found_in(folder) in (before, after)
        save_step(folder, 8)  # sweeps away what the killed one left
        assert [path.name for path in folder.iterdir()] == ["step-8"], number
    assert seen == {before, after}


def refused(save, folder, reason):
    """Whether a save raised an error, which says why."""
    try:
        save(folder)
    except dcp.CheckpointException as error:
        if reason not in str(error):
            raise
        return True
    return False


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS], ids=os.strerror)
@pytest.mark.parametrize("case", SAVES.values(), ids=SAVES)
def test_failed_at_any_event(tmp_path, case, code):
    before, save, after = case
    for number, (kind, *_) in enumerate(recorded(tmp_path, before, save)):
        folder = prepared(tmp_path, f"{number}", before)
        disk = Disk(folder, at(number, OSError(code, os.strerror(code))))
        with disk.watched(), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            failed = refused(save, folder, os.strerror(code))
        assert found_in(folder) == (before if failed else after)
        if failed:
            assert not told
            assert len([*folder.iterdir()]) == (0 if before is None else 1), number
        else:  # only what was older could not be deleted
            assert "could not be deleted" in str(told[0].message), kind


def test_power_lost_at_any_event(tmp_path):
    folder, steps = tmp_path / "undisturbed", [0]
    folder.mkdir()
    disk, saved = Disk(folder), []
    with disk.watched():
        for save in (lambda f: save_step(f, 1), replaced, lambda f: save_step(f, 8)):
            save(folder)
            steps.append(len(disk.events))
    results = [None, 1, 7, 8]
    remains, number = Remains(), 0
    for done, (kind, *more) in enumerate(disk.events, 1):
        remains.replay(kind, *more)
        while steps[number + 1] < done:
            number += 1
        for loss in LOSSES:
            for lost in (False, True):
                left = tmp_path / f"{done}-{loss}-{lost}"
                remains.leave(left, loss, lost)
                found = found_in(left)
                if done == steps[number + 1]:  # the save has returned
                    assert found == results[number + 1], (done, loss, lost)
                assert found in results[number : number + 2], (done, kind, more[0], loss, lost)
                saved.append(found)
    assert set(saved) == set(results)
    remains.leave(tmp_path / "all", "kept", False)
    ours, theirs = (
        {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        for root in (tmp_path / "all", folder)
    )
    assert ours == theirs  # so nothing happened to the disk that was not recorded


def save_cut(folder):
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    cut = distribute_tensor(torch.full((5, 3), 2.0), mesh, [Shard(0)])
    dcp.save({"w": cut, "step": 2}, checkpoint_id=folder / "step-2")


def test_ranks_killed_or_failing_at_any_event(tmp_path):
    undisturbed = prepared(tmp_path, "undisturbed", 1)
    disk = Disk(undisturbed)
    with disk.watched():
        run_distributed(2, save_cut, undisturbed)
    for number in range(len(disk.events)):
        for what in ("die", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))):
            folder = prepared(tmp_path, f"{number}-{what}", 1)
            struck = Disk(folder, at(number, what))
            with struck.watched(), pytest.raises((Killed, dcp.CheckpointException)) as caught:
                run_distributed(2, save_cut, folder)
            if what == "die":
                assert caught.type is Killed
                assert found_in(folder) in (1, 2)
            else:
                assert "No space left on device" in str(caught.value)
                assert [path.name for path in folder.iterdir()] == ["step-1"]
                assert found_in(folder) == 1


def test_a_read_only_folder_is_said_so(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path))

    save_step(tmp_path, 1)
    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(dcp.CheckpointException, match=r"rank 0: OSError: .*Read-only file system"):
        save_step(tmp_path, 2)
    assert found_in(tmp_path) == 1
