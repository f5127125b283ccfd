"""What the daemon needs runs out while clients are there, and comes back: descriptors, memory, room for the log."""

from __future__ import annotations

import hashlib
import os
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.robust.client import PATIENCE_S, Connection, CutError, WrongError, context
from benchmarks.robust.server import Server, wait_for

NAME = "fixed-5.bin"
SPIN_CPU_S = 0.5  # of CPU per second: a daemon that has run out of something must not spin
FILES_MAX = 128
MEMORY_MARGIN_BYTES = 8 << 20
LOG_BYTES = 256 * 1024  # of the file system for the log


class SkippedError(Exception):
    """This machine does not allow the experiment; why."""


def _serves(server: Server, expected: bytes, name: str = NAME) -> bool:
    try:
        with Connection(server.address, context(server.ca)) as connection:
            connection.ask(name)
            response = connection.response()
    except (OSError, CutError, WrongError):
        return False
    return response.status == 200 and hashlib.sha256(response.body).digest() == expected


def _recovered(server: Server, expected: bytes) -> None:
    wait_for(lambda: _serves(server, expected), "the daemon serves again")
    server.wait_until_idle()
    if not _serves(server, expected):
        raise WrongError("it serves once, and not again")


def out_of_descriptors(server: Server, expected: bytes, clients: int) -> str:
    """The daemon may open FILES_MAX files in each process; more clients than that come, and stay."""
    pids = server.pids()
    before = server.sample()
    unanswered = 0
    held: list[Connection] = []
    tls = context(server.ca)
    try:
        for _ in range(clients):
            try:
                held.append(_impatient(server, tls))
            except OSError:
                unanswered += 1
                continue
            _ask(held[-1])
        used = server.account.cpu_seconds()
        time.sleep(1.0)
        used = server.account.cpu_seconds() - used
        if used > SPIN_CPU_S:
            raise WrongError(f"without descriptors it used {used:.2f} CPU seconds in one second")
        if not held or not unanswered:
            raise WrongError(f"{len(held)} clients were served and {unanswered} not: there was no shortage")
        for connection in held[:: max(1, len(held) // 10)]:  # files can hardly be opened either: some answer, no end
            _ask(connection)
    finally:
        for connection in held:
            connection.socket.close()
    _recovered(server, expected)
    if server.pids() != pids:
        raise WrongError("a process of the daemon was replaced")
    wait_for(lambda: server.sample().descriptors <= before.descriptors, "descriptors are given back")
    return (
        f"{len(held)} clients held, {unanswered} waited in vain, {used:.2f} CPU s in the second after; no process died"
    )


def _ask(connection: Connection) -> None:
    connection.ask(NAME)
    if connection.response().status not in (200, 503):
        raise WrongError("a request without descriptors is answered neither with 200 nor with 503")


def _impatient(server: Server, tls: ssl.SSLContext) -> Connection:
    """A client that gives the daemon two tenths of a second for its handshake."""
    connection = Connection(server.address, tls, patience_s=0.2)
    connection.socket.settimeout(PATIENCE_S)
    return connection


def out_of_memory(server: Server, expected: bytes, clients: int) -> str:
    """The control group may grow by 8 MiB; clients that need far more than that come together, and read slowly."""
    if not server.account.limits_memory:
        raise SkippedError("no control group with a memory controller can be made here")
    supervisor = server.process.pid
    survivors = set(server.pids()) - set(server.workers())
    before = server.sample()
    served = refused = 0
    held: list[Connection] = []
    tls = context(server.ca)
    server.account.limit_memory(before.memory_bytes + MEMORY_MARGIN_BYTES)
    try:
        for _ in range(clients):
            try:
                connection = Connection(server.address, tls, receive_buffer=4096, patience_s=5.0)
                held.append(connection)
                connection.ask("huge.bin")  # more than fits: it holds buffers and a full send queue
                connection.socket.recv(1)
                served += 1
            except (OSError, ssl.SSLError):
                refused += 1
        lost = sum(_is_dead(connection) for connection in held)
    finally:
        for connection in held:
            connection.socket.close()
        server.account.limit_memory(None)
    if server.process.poll() is not None:
        raise WrongError(f"the daemon died of it: status {server.process.returncode}")
    _recovered(server, expected)
    if supervisor not in server.pids():
        raise WrongError("the supervisor was killed")
    workers = sum(worker["restarts"] for worker in server.status()["workers"])
    others = len(survivors - set(server.pids()))
    return (f"{served} clients served, {refused} refused, {lost} of the served lost; "
            f"{workers} workers and {others} other processes were killed and replaced")  # fmt: skip


def _is_dead(connection: Connection) -> bool:
    try:
        connection.socket.settimeout(0.0)
        while connection.socket.recv(65536):
            continue
    except (BlockingIOError, ssl.SSLWantReadError):
        return False
    except OSError:
        return True
    return True


@contextmanager
def small_file_system(directory: Path) -> Iterator[Path]:
    """A tmpfs of LOG_BYTES, full. Raises SkippedError where none can be mounted."""
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={LOG_BYTES}", "none", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SkippedError(f"no tmpfs can be mounted: {done.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=False)


def _fill(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        while os.write(fd, bytes(4096)):
            continue
    except OSError:
        pass
    finally:
        os.close(fd)


def full_disk(server: Server, expected: bytes, directory: Path, clients: int) -> str:
    """The log's file system is full, then has room again."""
    ballast = directory / "ballast"
    log = directory / "access.log"
    _fill(ballast)
    size = log.stat().st_size
    lines = clients * 20
    for _ in range(clients):
        with Connection(server.address, context(server.ca)) as connection:
            for _ in range(20):
                connection.ask(NAME)
                response = connection.response()
                if response.status != 200 or hashlib.sha256(response.body).digest() != expected:
                    raise WrongError(f"with a full disk {NAME} is answered with {response.status}")
    wait_for(lambda: b"access log cannot be written" in server.stderr, "the daemon says that the log cannot be written")
    time.sleep(2.5)  # it tries again every second
    said = server.stderr.count(b"access log cannot be written")
    if said > len(server.workers()):
        raise WrongError(f"the full disk was told {said} times")
    ballast.unlink()
    wait_for(lambda: log.stat().st_size > size, "lines are written again")
    _recovered(server, expected)
    wait_for(lambda: _settled(log), "the log is written")
    dropped = sum(worker["files"]["log_dropped"] for worker in server.status()["workers"])
    written = log.read_text().splitlines()
    whole = sum(line.startswith("127.0.0.1 - - [") and line.endswith('"') for line in written)
    if whole + dropped < lines or len(written) - whole > len(server.workers()):
        raise WrongError(f"{lines} requests, {whole} whole lines of {len(written)} in the log, {dropped} dropped")
    return f"{lines} requests served; told {said} times; {whole} lines written after it passed, {dropped} dropped"


def _settled(path: Path) -> bool:
    before = path.stat().st_size
    time.sleep(1.5)
    return path.stat().st_size == before
