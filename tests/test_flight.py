"""The flight record: what is written comes back, what is torn is recognised, nothing grows."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import threading

import pytest

from dtrain import flight, stacks


@pytest.fixture
def section(tmp_path, monkeypatch):
    """A section in a file, as a rank under dtrun has it."""
    monkeypatch.setenv("DTRAIN_RUN_DIR", str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(stacks, "answer", lambda: 0)
    writer = flight._Writer()
    monkeypatch.setattr(flight, "here", lambda: writer)
    yield flight.section("world", 1, 4)
    os.close(writer._file)
    writer._memory.close()


def test_a_call_comes_back(section, tmp_path):
    place = section.begin(flight.RUNNING, 7, 16, 1.5, "barrier()", "train.py:88")
    running = flight.read(tmp_path / "flight-3").groups[0].calls[0]
    section.end(place, flight.DONE, 2.5, 0.25)
    record = flight.read(tmp_path / "flight-3")
    (group,) = record.groups
    assert (record.pid, record.rank) == (os.getpid(), 3)
    assert record.main_thread == threading.main_thread().ident
    assert (group.name, group.number, group.rank, group.size) == ("world", 1, 1, 4)
    assert running.unfinished
    assert group.calls == [
        flight.Call(7, 16, 1.5, flight.DONE, 2.5, 0.25, "barrier()", "train.py:88")
    ]
    assert str(group.calls[0]) == "#7 barrier() at train.py:88"


def test_a_queued_call_starts(section, tmp_path):
    place = section.begin(flight.QUEUED, 0, 0, 1.0, "barrier()", "a.py:1")
    section.run(place, 3.0)
    (call,) = flight.read(tmp_path / "flight-3").groups[0].calls
    assert (call.state, call.start) == (flight.RUNNING, 3.0)


def test_the_ring_keeps_the_last_calls(section, tmp_path):
    for seq in range(flight.CALLS + 10):
        section.begin(flight.DONE, seq, 0, float(seq), "barrier()", "a.py:1")
    calls = flight.read(tmp_path / "flight-3").groups[0].calls
    assert [call.seq for call in calls] == list(range(10, flight.CALLS + 10))


def test_long_words_are_cut_where_they_say_least(section, tmp_path):
    section.begin(flight.DONE, 0, 0, 0.0, "all_reduce(" + "9" * 200, "/very" * 50 + "/train.py:88")
    (call,) = flight.read(tmp_path / "flight-3").groups[0].calls
    assert call.signature.startswith("all_reduce(999")
    assert call.site.endswith("/very/train.py:88")


def test_a_torn_record_is_not_told(section, tmp_path):
    section.begin(flight.DONE, 0, 0, 0.0, "barrier()", "a.py:1")
    place = section.begin(flight.RUNNING, 1, 0, 0.0, "barrier()", "a.py:2")
    # As it looks when the writer has come as far as its last number.
    struct.pack_into("<Q", section._memory, place + 248, 0)
    (group,) = flight.read(tmp_path / "flight-3").groups
    assert ([call.seq for call in group.calls], group.torn) == ([0], 1)


def test_sections_are_used_again(section, tmp_path):
    """Far more groups than sections, most of them closed: the open one keeps its calls."""
    section.begin(flight.DONE, 0, 0, 0.0, "barrier()", "a.py:1")
    for _ in range(2 * flight.SECTIONS):
        made = flight.section("short", 0, 2)
        flight.close(made)
        flight.close(made)
    groups = flight.read(tmp_path / "flight-3").groups
    assert len(groups) == flight.SECTIONS
    assert [group.name for group in groups if group.is_open] == ["world"]
    assert len(groups[0].calls) == 1
    assert max(group.number for group in groups) == 2 * flight.SECTIONS


def test_more_open_groups_than_sections_still_write():
    made = [flight.section("many", 0, 2) for _ in range(flight.SECTIONS + 2)]
    for one in made:
        one.end(one.begin(flight.RUNNING, 0, 0, 0.0, "barrier()", "a.py:1"), flight.DONE, 1.0, 0.0)
        flight.close(one)


def test_no_room_is_said(section, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(flight.os, "posix_fallocate", full)
    with pytest.warns(RuntimeWarning, match="no room for its flight record"):
        made = flight.section("other", 0, 2)
    made.begin(flight.DONE, 0, 0, 0.0, "barrier()", "a.py:1")
    flight.close(made)


def test_a_child_does_not_write_into_the_record_of_its_parent(section, tmp_path):
    program = (
        "from dtrain import flight; made = flight.section('child', 0, 1);"
        "made.begin(flight.DONE, 0, 0, 0.0, 'barrier()', 'a.py:1')"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)
    (group,) = flight.read(tmp_path / "flight-3").groups
    assert (group.name, group.calls) == ("world", [])


def test_a_record_is_found_by_its_process(section, tmp_path):
    (tmp_path / "flight-0").write_bytes(b"")
    assert flight.of_process(os.getpid()).rank == 3
    assert flight.of_process(1) is None
    assert [record.rank for record in flight.read_all(tmp_path)] == [3]


def test_reading_while_somebody_writes_tells_only_whole_calls(section, tmp_path):
    """Every call that is told has one number in all of its fields."""
    stop = threading.Event()

    def write():
        number = 0
        while not stop.is_set():
            number += 1
            section.begin(flight.DONE, number, number, float(number), f"f({number})", f"a:{number}")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(20):
            for call in flight.read(tmp_path / "flight-3").groups[0].calls:
                number = call.seq
                assert (call.nbytes, call.start) == (number, float(number))
                assert (call.signature, call.site) == (f"f({number})", f"a:{number}")
    finally:
        stop.set()
        writer.join(10)
