"""What the tests of the daemon's processes share: persistent HTTPS connections, and the pids behind the roles."""

from __future__ import annotations

import os
import select
import signal
import socket
import ssl
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.daemon import Daemon, Ready, environment, status
from support.waiting import DEADLINE_S, eventually, read_line


class Connection:
    """A TLS connection that stays open and asks for one file after the other."""

    def __init__(self, daemon: Daemon, *, ca: Path | None = None, session: ssl.SSLSession | None = None) -> None:
        context = ssl.create_default_context(cafile=str(ca or daemon.ca))
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        self._setup(daemon, context, session)

    def _setup(self, daemon: Daemon, context: ssl.SSLContext, session: ssl.SSLSession | None) -> None:
        self.context = context
        plain = socket.create_connection(daemon.address, DEADLINE_S)
        self.socket = context.wrap_socket(plain, server_hostname="localhost", session=session)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def get(self, path: str = "/small.txt") -> bytes:
        """The body of one response of status 200. Raises OSError or EOFError when the connection is dead."""
        status, body = self.response(path)
        assert status == 200, body
        return body

    def response(self, path: str = "/small.txt") -> tuple[int, bytes]:
        """Status and body of one response. Raises OSError or EOFError when the connection is dead."""
        self.socket.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        data = b""
        while b"\r\n\r\n" not in data:
            data += self._receive()
        head, _, body = data.partition(b"\r\n\r\n")
        (length,) = [int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
        while len(body) < length:
            body += self._receive()
        return int(head.split()[1]), body

    def works(self) -> bool:
        try:
            return len(self.get()) == 1024
        except (OSError, EOFError):
            return False

    def _receive(self) -> bytes:
        data = self.socket.recv(65536)
        if not data:
            raise EOFError
        return data


def facts(daemon: Daemon) -> dict[str, Any]:
    """`ctl status --json`."""
    return status(daemon)


def workers(daemon: Daemon) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = facts(daemon)["workers"]
    return found


def pid_of(daemon: Daemon, role: str) -> int:
    """Of "keymgr", "zygote" or "worker" (the first)."""
    pid = workers(daemon)[0]["pid"] if role == "worker" else facts(daemon)[role]["pid"]
    assert isinstance(pid, int)
    return pid


def kill_and_wait(pid: int) -> None:
    """SIGKILL, and the process's end."""
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        readable, _, _ = select.select([pidfd], [], [], DEADLINE_S)
        assert readable
    finally:
        os.close(pidfd)


def stop_and_wait(pid: int) -> None:
    """SIGSTOP, and all threads standing still."""
    os.kill(pid, signal.SIGSTOP)

    def stopped() -> bool:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return all((task / "stat").read_text().rpartition(")")[2].split()[0] == "T" for task in tasks)

    eventually(stopped, f"{pid} has stopped")


def restarted(daemon: Daemon, role: str, before: int) -> int:
    """Kills nothing: waits until another process has the role and, for a worker, answers. Returns its pid."""

    def now() -> int:
        if role == "worker":
            worker = workers(daemon)[0]
            return worker["pid"] if worker["responding"] and worker["pid"] not in (None, before) else 0
        pid = facts(daemon)[role]["pid"]
        return pid if pid not in (None, before) else 0

    return eventually(now, f"{role} {before} is replaced")


@contextmanager
def run(file: Path, **options: Any) -> Iterator[Daemon]:
    """`kdaemon run --config FILE` with one listener; what `support.daemon.serve` does for `serve`."""
    state = file.parent
    mark = uuid.uuid4().hex
    stderr_path = state / "stderr"
    with stderr_path.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "kdaemon", "run", "--config", str(file)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            bufsize=0,
            env=environment(mark, state),
            start_new_session=True,
            **options,
        )
    daemon = Daemon(process, None, mark, stderr_path)
    assert process.stdout is not None
    try:
        line = read_line(process.stdout, "the ready line")
        assert line, f"the daemon ended with {daemon.wait()}: {daemon.stderr.decode()}"
        daemon.ready.append(Ready.parse(line))
        yield daemon
        daemon.stop()
    except BaseException as error:
        error.add_note(f"the daemon's standard error:\n{daemon.stderr.decode(errors='replace')}")
        raise
    finally:
        if daemon.pids or process.poll() is None:
            daemon.kill()
        process.stdout.close()
