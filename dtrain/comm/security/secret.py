"""Where a job's secret comes from: a file, always, that nobody else can read.

The first of these that is there: 1. `secret` in DTRAIN_RUN_DIR, which dtrun writes for each
attempt; 2. the file that DTRAIN_SECRET_FILE names, the same bytes on every host; 3. the user's own,
`dtrain/secret` in XDG_RUNTIME_DIR, else in XDG_STATE_HOME or ~/.local/state. That one is made when
it is first needed, so that jobs on one host are authenticated without anybody doing anything.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from dtrain.errors import SecretError

__all__ = ["job_secret", "read_secret"]

_LEAST, _MOST = 32, 4096  # bytes


def job_secret(environ: Mapping[str, str] = os.environ) -> bytes:
    """The secret of this process's job. Raises `SecretError`."""
    run_dir = environ.get("DTRAIN_RUN_DIR")
    if run_dir and (path := Path(run_dir, "secret")).exists():
        return read_secret(path)
    if named := environ.get("DTRAIN_SECRET_FILE"):
        return read_secret(Path(named))
    path = _own_place(environ)
    if not path.exists():
        _make(path)
    return read_secret(path)


def read_secret(path: Path) -> bytes:
    """The content of a secret's file, to the last byte.

    Raises `SecretError` when the file is not there, belongs to another user, can be read by others,
    or is shorter than 32 bytes.
    """
    try:
        # Without O_NONBLOCK a pipe in its place would be waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            _check(path, os.fstat(descriptor))
            content = os.read(descriptor, _MOST + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise SecretError(f"cannot read the secret file {path}: {error.strerror}") from error
    if not _LEAST <= len(content) <= _MOST:
        raise SecretError(
            f"the secret file {path} has {len(content)} bytes, expected {_LEAST} to {_MOST}: make"
            " one with dtrun keygen"
        )
    return content


def _check(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise SecretError(f"the secret file {path} is not a regular file")
    me = os.geteuid()
    if status.st_uid not in (me, 0):
        raise SecretError(
            f"the secret file {path} belongs to user {status.st_uid}, this process is user {me}:"
            " whoever owns the file knows the secret. Use a file of your own"
        )
    # Root can give a file to somebody else only through a group (mounted secrets are such files).
    private = 0o007 if status.st_uid != me else 0o077
    if status.st_mode & private:
        raise SecretError(
            f"the secret file {path} can be read or changed by others (mode"
            f" {stat.S_IMODE(status.st_mode):04o}): run chmod 600 {path}, and make a new secret if"
            " somebody else may have read it"
        )


def _own_place(environ: Mapping[str, str]) -> Path:
    base = environ.get("XDG_RUNTIME_DIR") or environ.get("XDG_STATE_HOME")
    return Path(base or Path.home() / ".local" / "state") / "dtrain" / "secret"


def _make(path: Path) -> None:
    """A new secret at `path`, complete or not at all; another process may be quicker."""
    draft = path.with_name(f"secret.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(secrets.token_hex(32).encode())
            with contextlib.suppress(FileExistsError):
                os.link(draft, path)
        finally:
            draft.unlink()
    except OSError as error:
        raise SecretError(
            f"cannot make a secret at {path}: {error.strerror}. Make one where you can write (dtrun"
            " keygen > FILE) and set DTRAIN_SECRET_FILE to its path"
        ) from error
