"""Secrets and their files, and the keys that come from them."""

from __future__ import annotations

import os
import re
import stat
import threading

import pytest

from dtrain.comm.security import keys, secret
from dtrain.errors import (
    SecretError,
)

SECRET = b"0123456789abcdef" * 4


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "job.key"
    path.write_bytes(SECRET)
    path.chmod(0o600)
    return path


# ---- the secret


def test_a_secret_is_found_in_the_run_directory_then_by_its_path_then_at_home(file, tmp_path):
    home = {"XDG_STATE_HOME": str(tmp_path / "state")}
    own = secret.job_secret(home)
    assert len(own) == 64
    assert secret.job_secret({**home, "DTRAIN_SECRET_FILE": str(file)}) == SECRET
    run = tmp_path / "run"
    run.mkdir()
    both = {"DTRAIN_SECRET_FILE": str(file), "DTRAIN_RUN_DIR": str(run)}
    assert secret.job_secret(both) == SECRET  # an older launcher's directory has none
    (run / "secret").write_bytes(b"r" * 32)
    (run / "secret").chmod(0o600)
    assert secret.job_secret(both) == b"r" * 32


def test_the_users_own_secret_is_made_once_and_is_private(tmp_path):
    places = {"XDG_RUNTIME_DIR": str(tmp_path / "run"), "XDG_STATE_HOME": str(tmp_path / "state")}
    found, together = [], threading.Barrier(8)

    def look():
        together.wait()
        found.append(secret.job_secret(places))

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    folder = tmp_path / "run" / "dtrain"
    assert len(set(found)) == 1
    assert [path.name for path in folder.iterdir()] == ["secret"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "secret").stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o602, 0o777])
def test_a_secret_that_others_can_read_or_change_is_refused(file, mode):
    file.chmod(mode)
    with pytest.raises(SecretError, match=f"mode {mode:04o}.*run chmod 600 {file}") as caught:
        secret.read_secret(file)
    assert SECRET.decode() not in str(caught.value)


def test_a_secret_of_another_user_is_refused_and_roots_is_not(file, monkeypatch):
    owner = file.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    real = os.fstat

    def owned_by(user):
        def fstat(descriptor):
            values = list(real(descriptor))
            values[4] = user
            return os.stat_result(values)

        return fstat

    monkeypatch.setattr(os, "fstat", owned_by(owner + 2))
    with pytest.raises(SecretError, match=f"belongs to user {owner + 2}"):
        secret.read_secret(file)
    monkeypatch.setattr(os, "fstat", owned_by(0))
    file.chmod(0o440)  # as orchestrators mount secrets for a group
    assert secret.read_secret(file) == SECRET
    file.chmod(0o444)
    with pytest.raises(SecretError, match="mode 0444"):
        secret.read_secret(file)


@pytest.mark.parametrize("content", [b"", b"x" * 31, b"x" * 5000])
def test_a_secret_of_a_wrong_length_is_refused(file, content):
    file.write_bytes(content)
    with pytest.raises(SecretError, match="expected 32 to 4096: make one with dtrun keygen"):
        secret.read_secret(file)


def test_a_secret_that_is_not_there_or_not_a_file_is_named(tmp_path):
    with pytest.raises(SecretError, match="nowhere: No such file"):
        secret.read_secret(tmp_path / "nowhere")
    with pytest.raises(SecretError, match=re.escape(str(tmp_path))):
        secret.read_secret(tmp_path)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o600)
    with pytest.raises(SecretError, match="not a regular file"):
        secret.read_secret(fifo)


def test_where_no_secret_can_be_made_the_way_out_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(SecretError, match="set DTRAIN_SECRET_FILE"):
        secret.job_secret({"XDG_STATE_HOME": str(blocked)})


# ---- keys


def test_hkdf_is_rfc_5869(monkeypatch):
    """Test case 1 of the RFC; its first 32 bytes are the first block."""
    monkeypatch.setattr(keys, "_SALT", bytes(range(13)))
    output = keys.hkdf(b"\x0b" * 22, bytes(range(0xF0, 0xFA)))
    assert output.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"


def test_every_role_run_attempt_and_secret_has_keys_of_its_own(monkeypatch):
    seen = set()
    for run, attempt, content in [
        ("a", 0, SECRET),
        ("a", 1, SECRET),
        ("b", 0, SECRET),
        ("a", 0, b"y" * 32),
    ]:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", run)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        assert keys.store_keys(content) == keys.store_keys(content)
        seen |= {pair.public for pair in keys.store_keys(content)}
    assert len(seen) == 8


def test_a_pair_does_not_show_its_secret_half():
    pair = keys.fresh_keys()
    assert pair.secret.decode() not in f"{pair} {pair!r}"
