"""What `dtrun doctor` looks at on this host: one function a check, each returns a `Finding`.

Rules: 1. A check looks at the thing itself (it binds, maps, compiles, resolves), not at a setting
that stands for it. 2. What is found is `ok`, a `warning` (it works, but not always or not well) or
`failed`, and comes with the remedy. 3. Nothing is left behind, and every wait has a deadline.
What a check depends on is an argument, so that tests can break it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from dtrun import options, process, secret
from dtrun.rendezvous import make_run_dir, reserve_port

OK, WARNING, FAILED = "ok", "warning", "failed"
PATIENCE_SECONDS = 60.0  # for a process that takes half a second where nobody else works
CONNECT_SECONDS = 5.0
# A rank holds 30 to 40 descriptors and 4 to 6 for each other rank of its host (measured, 2 and 8).
FILES_OF_A_RANK, FILES_OF_A_PEER = 40, 6
ROOM = 1 << 24  # bytes: the shared memory and the space in the run directory that are tried


class Finding(NamedTuple):
    """One line of the doctor's report."""

    check: str
    state: str
    what: str
    remedy: str = ""


def loopback(host: str = "127.0.0.1") -> Finding:
    """A port of this host can be had and reached: here by being refused, as nobody listens."""
    try:
        with contextlib.closing(reserve_port(host)) as held:
            port = held.getsockname()[1]
            try:
                socket.create_connection((host, port), timeout=2.0).close()
            except ConnectionRefusedError:
                return Finding("loopback", OK, f"{host} hands out ports and answers")
            return Finding(
                "loopback", FAILED, f"somebody else answers at {host}:{port}, which is ours",
                "look for a proxy or a redirection of ports on this host",
            )  # fmt: skip
    except OSError as error:
        return Finding(
            "loopback", FAILED, f"{host} cannot be used: {error}",
            "bring the loopback device up: ip link set lo up",
        )  # fmt: skip


def meeting_port(port: int = options.DEFAULT_PORT) -> Finding:
    """The port where several nodes meet unless told otherwise."""
    try:
        reserve_port("127.0.0.1", port).close()
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        return Finding(
            "port", WARNING, f"{port}, where several nodes meet by default, "
            + ("is in use here" if taken else f"cannot be bound: {error.strerror}"),
            "with several nodes, name another: --rdzv-endpoint HOST:PORT",
        )  # fmt: skip
    return Finding("port", OK, f"{port}, where several nodes meet by default, is free")


def endpoint(host: str, port: int, seconds: float = CONNECT_SECONDS) -> Finding:
    """Node 0 can be reached from here; whether it listens already does not matter."""
    try:
        with socket.create_connection((host, port), timeout=seconds) as line:
            own, there = line.getsockname()[0], line.getpeername()[0]
        what = f"{host}:{port} is {there} and answers; the way there starts at {own}"
    except ConnectionRefusedError:
        what = f"{host}:{port} is there; nobody listens yet"
    except socket.gaierror as error:
        return Finding(
            "endpoint", FAILED, f"{host} is not resolved: {error.strerror}",
            "name node 0 by its address, or put it into /etc/hosts",
        )  # fmt: skip
    except OSError as error:
        return Finding(
            "endpoint", FAILED, f"{host}:{port} cannot be reached from here: {error}",
            "open the port in the firewall between the nodes, and all ports above 1024 among them: "
            "ranks choose free ones",
        )  # fmt: skip
    return Finding("endpoint", OK, what)


def run_directory(environ: Mapping[str, str] = os.environ) -> Finding:
    """The directory of a run can be made, is private, and takes files."""
    remedy = "point TMPDIR at a local directory that you can write, with a path of at most 60 bytes"
    try:
        path = make_run_dir(environ)
        try:
            mode = os.stat(path).st_mode & 0o777
            with open(os.path.join(path, "room"), "wb") as file:
                os.posix_fallocate(file.fileno(), 0, ROOM)
        finally:
            shutil.rmtree(path, ignore_errors=True)
    except OSError as error:
        return Finding("run directory", FAILED, f"cannot be made or written: {error}", remedy)
    base = os.path.dirname(path)
    if mode != 0o700:
        return Finding(
            "run directory",
            FAILED,
            f"{base} makes directories of mode {mode:04o}, not 0700",
            remedy,
        )
    return Finding("run directory", OK, f"private, in {base}")


def shared_memory(size: int = ROOM) -> Finding:
    """Nameless shared memory (memfd) can be made, mapped and written."""
    try:
        descriptor = os.memfd_create("dtrain-doctor", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, size)
            with mmap.mmap(descriptor, size) as memory:
                memory[size - 1] = 1
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        return Finding(
            "shared memory", FAILED, f"{size >> 20} MiB cannot be had: {error}",
            "raise ulimit -f and -v and the container's limit of memory, allow memfd_create in its "
            "seccomp profile; until then init_process_group('zmq') does without",
        )  # fmt: skip
    return Finding("shared memory", OK, f"{size >> 20} MiB had and written; /dev/shm is not used")


def open_files(limit: int | None = None) -> Finding:
    """Descriptors that a rank may have (RLIMIT_NOFILE)."""
    if limit is None:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if limit == resource.RLIM_INFINITY:
            return Finding("open files", OK, "no limit")
    ranks = (limit - FILES_OF_A_RANK) // FILES_OF_A_PEER
    what = f"{limit} a process, enough for {max(0, ranks)} ranks on this host"
    if ranks >= 32:
        return Finding("open files", OK, what)
    state = WARNING if ranks >= 2 else FAILED
    return Finding("open files", state, what, "ulimit -n 4096, or nofile in limits.conf or compose")


def processes(limit: int | None = None) -> Finding:
    """Threads that this user may have (RLIMIT_NPROC); root is not held to it."""
    if limit is None:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
        if os.geteuid() == 0 or limit == resource.RLIM_INFINITY:
            return Finding("processes", OK, "no limit for this user")
    what = f"{limit} threads for all that this user runs; a rank has about 10"
    if limit >= 512:
        return Finding("processes", OK, what)
    return Finding("processes", WARNING, what, "ulimit -u 4096, or nproc in limits.conf")


def children(watch: Callable[[], None] = process.adopt_orphans) -> Finding:
    """The kernel tells of orphans and of dead parents, which is how nothing is left behind."""
    try:
        watch()
        with open(f"/proc/{os.getpid()}/task/{os.getpid()}/children", encoding="ascii"):
            pass
    except OSError as error:
        return Finding(
            "clean-up", FAILED, f"child processes cannot be watched: {error}",
            "mount /proc, and allow prctl in the container's seccomp profile",
        )  # fmt: skip
    return Finding("clean-up", OK, "orphans come back to dtrun, ranks die with it")


def compiler(environ: Mapping[str, str] = os.environ) -> Finding:
    """A C compiler whose output loads. Nothing needs it today."""
    command = shlex.split(environ.get("CC") or "cc")
    with tempfile.TemporaryDirectory(prefix="dtrun-doctor-") as folder:
        source, made = os.path.join(folder, "f.c"), os.path.join(folder, "f.so")
        with open(source, "w", encoding="ascii") as file:
            file.write("int answer(int x) { return 6 * x; }\n")
        try:
            subprocess.run(
                [*command, "-shared", "-fPIC", "-o", made, source],
                check=True, capture_output=True, timeout=PATIENCE_SECONDS, env=dict(environ),
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
            good = ctypes.CDLL(made).answer(7) == 42
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None) or str(error).encode()
            last = said.decode(errors="replace").strip().splitlines()[-1]
            return Finding(
                "compiler", WARNING, f"{shlex.join(command)} does not work: {last}",
                "apt-get install gcc libc6-dev, or set CC; dtrain runs without",
            )  # fmt: skip
    if not good:
        return Finding(
            "compiler", WARNING, f"{shlex.join(command)} computes 6 x 7 wrongly", "set CC"
        )
    return Finding("compiler", OK, f"{shlex.join(command)} makes code that loads")


def kernel_clock() -> tuple[bool, float]:
    """Whether the kernel holds its clock for synchronised, and its own bound of the error, in s."""
    size = 256  # of struct timex, with room; modes = 0 only reads
    state = ctypes.create_string_buffer(size)
    if ctypes.CDLL(None, use_errno=True).adjtimex(state) < 0:
        raise OSError(ctypes.get_errno(), "adjtimex failed")
    longs = memoryview(state).cast("B").cast("l")
    unsynchronised = 0x40  # STA_UNSYNC
    return not memoryview(state).cast("B").cast("i")[10] & unsynchronised, longs[3] / 1e6


def clock(
    read: Callable[[], tuple[bool, float]] = kernel_clock, now: Callable[[], float] = time.time
) -> Finding:
    """The time of day, by which timelines and logs of several hosts are put side by side."""
    remedy = "run chrony or systemd-timesyncd (on the host, if this is a container)"
    date = time.strftime("%Y-%m-%d", time.gmtime(now()))
    if date < "2025":
        return Finding("clock", WARNING, f"it says {date}: certificates will not be valid", remedy)
    try:
        synchronised, bound = read()
    except OSError as error:
        return Finding("clock", WARNING, f"its state cannot be read: {error}", remedy)
    if not synchronised:
        return Finding(
            "clock", WARNING, "not synchronised: several hosts' logs will not agree", remedy
        )
    return Finding("clock", OK, f"synchronised, within {bound:.3f} s by the kernel's own bound")


def names(name: str | None = None, resolve: Callable[[str], str] = socket.gethostbyname) -> Finding:
    """This host's name and localhost resolve, quickly, and to addresses that mean them."""
    name = socket.gethostname() if name is None else name
    begin = time.monotonic()
    try:
        local, own = resolve("localhost"), resolve(name)
    except OSError as error:
        return Finding(
            "names", WARNING, f"localhost or {name}, this host's name, is not resolved: {error}",
            f"put both into /etc/hosts, or name nodes by address; 127.0.0.1 localhost {name}",
        )  # fmt: skip
    taken = time.monotonic() - begin
    if not local.startswith("127."):
        return Finding("names", FAILED, f"localhost is {local}", "correct /etc/hosts")
    if taken > 1.0:
        return Finding(
            "names", WARNING, f"{taken:.1f} s to resolve localhost and {name}",
            "look at the servers in /etc/resolv.conf; /etc/hosts is asked first",
        )  # fmt: skip
    if own.startswith("127."):
        return Finding(
            "names", WARNING, f"{name}, this host's name, is {own}: other hosts cannot use that",
            "with several nodes give rank 0's address in digits, or correct /etc/hosts",
        )  # fmt: skip
    return Finding("names", OK, f"{name} is {own}")


def secret_file(environ: Mapping[str, str] = os.environ) -> Finding:
    """The secret that several nodes share, if the environment names one."""
    path = environ.get("DTRAIN_SECRET_FILE")
    if not path:
        return Finding(
            "secret", OK, "each run on one node makes its own; DTRAIN_SECRET_FILE not set"
        )
    try:
        secret.read(path)
    except ValueError as error:
        text = str(error).replace("--secret-file", "DTRAIN_SECRET_FILE")
        return Finding("secret", FAILED, text, f"(umask 077; dtrun keygen > {path})")
    return Finding("secret", OK, f"{path} is private and long enough")


def python(version: tuple[int, int] = sys.version_info[:2]) -> Finding:
    """The interpreter that will run the ranks."""
    words = f"{version[0]}.{version[1]} at {sys.executable}"
    if version < (3, 11):
        return Finding("python", FAILED, words, "install Python 3.11 or newer")
    return Finding("python", OK, words)


HOST = (
    *(python, loopback, meeting_port, names, run_directory, shared_memory, open_files, processes),
    *(children, clock, compiler, secret_file),
)
