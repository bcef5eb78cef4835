"""dtrain.env: what a worker reads of its launcher, and what it says when something is missing."""

from __future__ import annotations

import dataclasses

import pytest

from dtrain.env import LaunchEnv, is_launched, rendezvous

MINIMAL = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "4711"}
FULL = MINIMAL | {
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "0",
    "GROUP_WORLD_SIZE": "2",
    "ROLE_NAME": "trainer",
    "TORCHELASTIC_RUN_ID": "r1",
    "TORCHELASTIC_RESTART_COUNT": "3",
    "DTRAIN_RUN_DIR": "/run/d",
}


def test_a_launcher_environment_is_read_in_full():
    assert dataclasses.astuple(LaunchEnv.from_environ(FULL)) == (
        *(1, 4, "127.0.0.1", 4711, 1, 2, 0, 2),
        *("trainer", "r1", 3, "/run/d"),
    )


def test_four_variables_are_enough():
    env = LaunchEnv.from_environ(MINIMAL)
    assert (env.local_rank, env.run_dir, env.run_id, env.restart_count) == (None, None, None, 0)


@pytest.mark.parametrize("value", [None, ""])
@pytest.mark.parametrize("name", MINIMAL)
def test_a_missing_variable_is_named_in_torchs_words(name, value):
    environ = {key: text for key, text in MINIMAL.items() if key != name}
    environ |= {} if value is None else {name: value}
    words = (
        "Error initializing torch.distributed using env:// rendezvous: "
        f"environment variable {name} expected, but not set"
    )
    with pytest.raises(ValueError, match=words):
        LaunchEnv.from_environ(environ)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK"])
def test_a_bad_number_is_named_with_its_value(name):
    with pytest.raises(ValueError, match=f"{name} must be an integer, got 'two'"):
        LaunchEnv.from_environ(FULL | {name: "two"})


@pytest.mark.parametrize(("name", "value"), [("RANK", "4"), ("RANK", "-1"), ("MASTER_PORT", "0")])
def test_numbers_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be in .*, got {value}"):
        LaunchEnv.from_environ(MINIMAL | {name: value})


def test_arguments_win_over_the_environment():
    address_only = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    meeting = rendezvous(0, 2, address_only)
    assert (meeting.rank, meeting.world_size, meeting.is_host) == (0, 2, True)
    assert (meeting.master_addr, meeting.master_port) == ("node1", 29500)
    assert not rendezvous(1, 2, MINIMAL).is_host


def test_is_launched_asks_for_the_run_id():
    assert is_launched(FULL)
    assert not is_launched(MINIMAL)
