"""The secret of a run: made here or read from a file, and handed to the ranks as a file.

Rules: 1. never an argument, never an environment variable, never printed but by `dtrun keygen`.
2. On one node every attempt gets a secret of its own, so that a rank of an older one is refused. On
several nodes all get the content of --secret-file; the ranks derive their keys from it, the run id
and the number of the attempt. 3. A file that others can read is no secret.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Mapping

NAME = "secret"  # in the run directory of an attempt
LEAST, MOST = 32, 4096  # bytes


class Secret(bytes):
    """The content of a secret file, which shows up in no text."""

    def __repr__(self) -> str:
        return "<secret>"


def fresh() -> str:
    """A new secret: 32 random bytes, as a line of text."""
    return os.urandom(32).hex() + "\n"


def read(path: str) -> Secret:
    """The content of a user's secret file; ValueError says why it is refused."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            check(path, os.fstat(descriptor))
            content = os.read(descriptor, MOST + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ValueError(f"--secret-file {path}: {error.strerror}") from None
    if not LEAST <= len(content) <= MOST:
        raise ValueError(
            f"--secret-file {path} has {len(content)} bytes, expected {LEAST} to {MOST}: "
            "make one with dtrun keygen"
        )
    return Secret(content)


def of_home(environ: Mapping[str, str]) -> str:
    """The path of the user's own secret in the home directory, made if it is not there.

    Nodes of a cluster share the home, and see the same one. ValueError says why it cannot be had.
    """
    home = environ.get("HOME") or os.path.expanduser("~")
    path = os.path.join(home, ".local", "state", "dtrain", NAME)
    if os.path.exists(path):
        return path
    draft = f"{path}.{os.uname().nodename}.{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        _create(draft, fresh().encode())
        with contextlib.suppress(FileExistsError):  # another node was quicker: its secret counts
            os.link(draft, path)
        os.unlink(draft)
    except OSError as error:
        raise ValueError(
            f"cannot make a secret for the nodes at {path}: {error.strerror}. Make one that all "
            "can read (dtrun keygen) and name it with --secret-file"
        ) from None
    return path


def check(path: str, status: os.stat_result) -> None:
    """ValueError unless the file is its owner's alone, and the owner is this user or root."""
    me = os.geteuid()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"--secret-file {path} is not a regular file")
    if status.st_uid not in (me, 0):
        raise ValueError(f"--secret-file {path} belongs to user {status.st_uid}, not to you ({me})")
    # Root can give a file to somebody else only through a group (mounted secrets are such files).
    if status.st_mode & (0o077 if status.st_uid == me else 0o007):
        mode = f"{stat.S_IMODE(status.st_mode):04o}"
        raise ValueError(
            f"--secret-file {path} can be read or changed by others (mode {mode}): "
            f"run chmod 600 {path}, and make a new one if somebody else may have read it"
        )


def hand_over(run_dir: str, content: bytes) -> None:
    """Put the secret where the ranks of this attempt look for it."""
    _create(os.path.join(run_dir, NAME), content)


def _create(path: str, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, stat.S_IRUSR)
    try:
        os.write(descriptor, content)
    finally:
        os.close(descriptor)
