"""A real `kdaemon serve` as a subprocess: started, waited for, stopped, and what it must leave behind (nothing)."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from support.certificates import Issued
from support.waiting import DEADLINE_S, DeadlineError, eventually, read_line

HANDSHAKE_DEADLINE_MS = 1500  # of daemons that are made to wait for silent peers

_READY = re.compile(rb"^ready (https://(\S+):(\d+)/) backend=(\S+) reason=(.*)$")
_MARK = "KDAEMON_TEST_PROCESS"  # in the environment of the daemon and of all it starts
# What a Python traceback or a Cython "exception ignored" begins with, and what sanitizers print.
_TROUBLE = re.compile(
    rb"Traceback \(most recent|Exception ignored|AddressSanitizer|LeakSanitizer|runtime error:|Segmentation"
)


@dataclass(frozen=True)
class Ready:
    """One `ready` line."""

    url: str
    host: str
    port: int
    backend: str
    reason: str

    @classmethod
    def parse(cls, line: bytes) -> Ready:
        match = _READY.match(line.rstrip(b"\n"))
        if match is None:
            raise AssertionError(f"not a ready line: {line!r}")
        url, host, port, backend, reason = (group.decode() for group in match.groups())
        return cls(url, host.strip("[]"), int(port), backend, reason)


def processes_with_mark(mark: str) -> list[int]:
    """Living processes started with `mark` in their environment, zombies left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if f"{_MARK}={mark}".encode() not in (entry / "environ").read_bytes().split(b"\0"):
                continue
            if (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                found.append(int(entry.name))
        except OSError:  # it ended meanwhile, or it is somebody else's
            continue
    return found


def descriptor_count(pids: Sequence[int]) -> int:
    """Descriptors held open by the processes, each counted in each process that holds it, without files on disk.

    The daemon remembers a bounded number of those for a minute (tests/interop/test_files_unused.py).
    """
    count = 0
    for pid in pids:
        try:
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                try:
                    link = str(descriptor.readlink())
                    count += not link.startswith("/") or link.startswith(("/dev/", "/memfd:"))
                except OSError:
                    continue
        except OSError:
            continue
    return count


def resident_bytes(pids: Sequence[int]) -> int:
    """Proportional set size of the processes together, in bytes."""
    total_kib = 0
    for pid in pids:
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total_kib += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return total_kib * 1024


@dataclass
class Daemon:
    """A running `kdaemon serve`. Made by `serve()`; not thread-safe."""

    process: subprocess.Popen[bytes]
    issued: Issued | None
    mark: str
    stderr_path: Path
    ready: list[Ready] = field(default_factory=list)
    descriptors_at_start: int = 0

    @property
    def socket_path(self) -> str:
        """Where programs attach and `kdaemon ctl` asks."""
        return str(self.stderr_path.parent / "kdaemon.sock")

    @property
    def url(self) -> str:
        """`https://127.0.0.1:PORT/`, or what the first listener is."""
        return self.ready[0].url

    @property
    def host(self) -> str:
        return self.ready[0].host

    @property
    def port(self) -> int:
        return self.ready[0].port

    @property
    def address(self) -> tuple[str, int]:
        return self.host, self.port

    @property
    def ca(self) -> Path:
        assert self.issued is not None, "the daemon made its own certificate"
        return self.issued.ca

    @property
    def pids(self) -> list[int]:
        """Every living process of the daemon, the supervisor included."""
        return processes_with_mark(self.mark)

    @property
    def stderr(self) -> bytes:
        return self.stderr_path.read_bytes()

    def connect(self, timeout_s: float = DEADLINE_S) -> socket.socket:
        """A plain TCP connection to the first listener."""
        return socket.create_connection(self.address, timeout_s)

    def wait_idle(self) -> None:
        """Until no process holds more descriptors than when the daemon became ready: everything was given back."""
        eventually(
            lambda: descriptor_count(self.pids) <= self.descriptors_at_start,
            f"what closed connections held is given back (at start: {self.descriptors_at_start})",
        )

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self, deadline_s: float = DEADLINE_S) -> int:
        """The exit status; raises DeadlineError with what the daemon said on standard error."""
        try:
            return self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise DeadlineError(
                f"the daemon did not end within {deadline_s:g} s; it said:\n{self.stderr.decode()}"
            ) from None

    def stop(self, status: int = 0) -> None:
        """SIGTERM, then what holds for every daemon's end: its exit status, no process left, nothing ugly said."""
        if self.process.poll() is None:
            self.signal()
        assert self.wait() == status, (
            f"exit status {self.process.returncode}, not {status}; it said:\n{self.stderr.decode()}"
        )
        self.assert_nothing_left()

    def assert_nothing_left(self) -> None:
        """No orphan stays and nothing on standard error looks like a defect."""
        eventually(lambda: not self.pids, f"no process of the daemon is left: {self.pids}", 5.0)
        trouble = _TROUBLE.search(self.stderr)
        assert trouble is None, self.stderr.decode()

    def kill(self) -> None:
        """Ends everything at once; for teardown after a failure only."""
        for pid in self.pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def _has_its_uring(pid: int) -> bool:
    """A worker is ready before its engine thread has run, which on a busy machine may be much later."""
    try:
        if not Path(f"/proc/{pid}/comm").read_text().startswith("kdaemon-wrk"):
            return True
        return any("[io_uring]" in str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False


def settled_descriptor_count(daemon: Daemon) -> int:
    """Once it stays the same: processes that are ready may still be opening, or closing, their last descriptor."""
    counts: list[int] = []

    def stays() -> bool:
        counts.append(descriptor_count(daemon.pids))
        return len(counts) >= 10 and len(set(counts[-10:])) == 1 and all(map(_has_its_uring, daemon.pids))

    eventually(stays, "the number of descriptors stays the same")
    return counts[-1]


def environment(mark: str, state: Path) -> dict[str, str]:
    """What a test's daemon runs with: this interpreter's import path, its own state and runtime directories."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("KDAEMON_", "SSL", "XDG_"))}
    return inherited | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "PYTHONUNBUFFERED": "1",
        "XDG_STATE_HOME": str(state / "state"),
        "XDG_RUNTIME_DIR": str(state),
        "HOME": str(state),
        _MARK: mark,
    }


@contextmanager
def serve(
    directory: Path | None,
    *arguments: str,
    issued: Issued | None = None,
    listeners: Sequence[str] = ("127.0.0.1:0",),
    extra_environment: dict[str, str] | None = None,
    prefix: Sequence[str] = (),
    ends_by_itself: bool = False,
) -> Iterator[Daemon]:
    """Runs `python -m kdaemon serve DIRECTORY ARGUMENTS…` until the block ends; yields at its ready lines.

    `directory`: None if a configuration among the arguments names the sites.
    `issued`: its certificate; without one the daemon makes its own. `prefix`: a command to run it under (`prlimit …`).
    At the end the daemon is stopped and its clean end asserted, unless `ends_by_itself`: the test then does it.
    If the block raises, everything is killed and the daemon's standard error is added to the report.
    """
    mark = uuid.uuid4().hex
    # Short, because UNIX socket paths are limited to 108 bytes and pytest's own temporary paths are long.
    with tempfile.TemporaryDirectory(prefix="kd-") as state_name:
        state = Path(state_name)
        stderr_path = state / "stderr"
        command = [*prefix, sys.executable, "-m", "kdaemon", "serve", *([str(directory)] if directory else [])]
        for listener in listeners:
            command += ["--listen", listener]
        command += [*(issued.arguments if issued else []), *arguments]
        with stderr_path.open("wb") as stderr:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                bufsize=0,
                env=environment(mark, state) | (extra_environment or {}),
                cwd=state,
                start_new_session=True,
            )
        daemon = Daemon(process, issued, mark, stderr_path)
        assert process.stdout is not None
        try:
            while len(daemon.ready) < len(listeners):
                line = read_line(process.stdout, f"the ready line of {' '.join(command)}")
                if not line:
                    raise AssertionError(f"the daemon ended with {daemon.wait()} before it was ready")
                if line.startswith(b"ready "):
                    daemon.ready.append(Ready.parse(line))
            daemon.descriptors_at_start = settled_descriptor_count(daemon)
            yield daemon
            if not ends_by_itself:
                daemon.wait_idle()
                daemon.stop()
        except BaseException as error:
            error.add_note(f"the daemon's standard error:\n{daemon.stderr.decode(errors='replace')}")
            daemon.kill()
            raise
        finally:
            if daemon.pids or process.poll() is None:
                daemon.kill()
            process.stdout.close()


def control(daemon: Daemon, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`kdaemon ctl ARGUMENTS…` for this daemon."""
    return subprocess.run(
        [sys.executable, "-m", "kdaemon", "ctl", *arguments],
        env=environment(daemon.mark + "-ctl", daemon.stderr_path.parent),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def status(daemon: Daemon) -> dict[str, object]:
    """`ctl status --json`, parsed."""
    completed = control(daemon, "status", "--json")
    assert completed.returncode == 0, completed.stderr
    parsed: dict[str, object] = json.loads(completed.stdout)
    return parsed
