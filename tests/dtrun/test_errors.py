"""Which failure is the root cause, and how it is told."""

from __future__ import annotations

import json
import signal

import pytest

from dtrun.errors import Failure, exit_code, read_recorded, report, root_cause
from dtrun.spec import BOOTSTRAP


def failure(rank, time, **fields):
    return Failure(
        **({"local_rank": rank, "pid": 100 + rank, "exitcode": 1} | fields), rank=rank, time=time
    )


def test_the_earliest_failure_is_the_cause():
    late, early = failure(0, 2.0), failure(1, 1.0)
    assert root_cause([late, early]) is early


@pytest.mark.parametrize("fields", [{"lost_peer": True}, {"stopped_by": 15, "exitcode": -15}])
def test_a_consequence_is_not_the_cause_however_early(fields):
    consequence, cause = failure(0, 1.0, **fields), failure(1, 9.0)
    assert root_cause([consequence, cause]) is cause


def test_a_lost_peer_alone_is_the_cause():
    first, second = failure(0, 2.0, lost_peer=True), failure(1, 1.0, lost_peer=True)
    assert root_cause([first, second]) is second


@pytest.mark.parametrize(("code", "expected"), [(1, 1), (77, 77), (-9, 137), (-11, 139)])
def test_exit_codes_are_those_of_a_shell(code, expected):
    assert exit_code(failure(0, 0.0, exitcode=code)) == expected


def test_the_report_shows_the_cause_in_full_and_a_line_for_each_other():
    trace = "Traceback (most recent call last):\n  ...\nValueError: boom\n"
    text = report(
        "train.py",
        [
            failure(0, 2.0, lost_peer=True, message="PeerLost: rank 1 is lost"),
            failure(1, 3.0, message="ValueError: boom", traceback=trace),
            failure(2, 4.0, exitcode=-15, stopped_by=15),
        ],
        "host1",
    )
    assert "train.py FAILED" in text
    cause, _, others = text.partition("Other Failures:")
    assert "rank      : 1 (local_rank: 1)\n  exitcode  : 1 (pid: 101)" in cause
    assert "host      : host1" in cause
    assert trace in cause
    assert others.splitlines()[1:3] == [
        "  rank 0 (local_rank: 0, pid: 100): exitcode 1, PeerLost: rank 1 is lost (lost a peer)",
        "  rank 2 (local_rank: 2, pid: 102): stopped by dtrun (SIGTERM)",
    ]


def test_a_signal_is_named():
    text = report("x", [failure(0, 0.0, exitcode=-signal.SIGKILL)], "h")
    assert "exitcode  : -9 (pid: 100)  (SIGKILL)\n" in text
    assert (
        "Signal 9 (SIGKILL) received by PID 100 (sent by a user, a scheduler, or the kernel)"
        in text
    )
    assert "Signal 35 (signal 35)" in report("x", [failure(0, 0.0, exitcode=-35)], "h")


def test_an_exit_without_a_traceback_is_said():
    assert "none: the process ended itself" in report("x", [failure(0, 0.0, exitcode=3)], "h")


def test_an_error_file_is_read(tmp_path):
    fields = {"message": "E: m", "traceback": "T", "lost_peer": True, "time": 5.5, "thread": "T"}
    (tmp_path / "error.json").write_text(json.dumps(fields))
    found = read_recorded(str(tmp_path / "error.json"), str(tmp_path / "none"), 1)
    assert found._asdict() == fields


@pytest.mark.parametrize("text", ["not json", "[1, 2]", '{"message": {"message": "torch"}}', "3"])
def test_a_strange_error_file_is_shown_as_it_is(text, tmp_path):
    (tmp_path / "error.json").write_text(text)
    found = read_recorded(str(tmp_path / "error.json"), str(tmp_path / "none"), 1)
    assert (found.traceback, found.time) == (text, None)


def test_a_crash_is_told_by_the_fault_log_without_the_bootstrap(tmp_path):
    (tmp_path / "fault").write_text(
        "Fatal Python error: Segmentation fault\n\n"
        f'  File "train.py", line 6 in <module>\n  File "{BOOTSTRAP}", line 9 in run\n'
    )
    found = read_recorded(str(tmp_path / "none"), str(tmp_path / "fault"), -11)
    assert found.message == "Fatal Python error: Segmentation fault"
    assert found.traceback.endswith('  File "train.py", line 6 in <module>\n')


def test_a_fault_log_counts_only_for_a_signal(tmp_path):
    (tmp_path / "fault").write_text("dump asked for by the program\n")
    assert read_recorded(str(tmp_path / "none"), str(tmp_path / "fault"), 1).traceback == ""
