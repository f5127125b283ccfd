"""Starts the programs under test, with the daemon if they need it, in one account and on the same CPUs."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving.accounting import Account, account
from libtls.attach import attach
from libtls.errors import DaemonError

ROOT = Path(__file__).resolve().parent.parent.parent
START_DEADLINE_S = 60.0

DAEMON_CONFIGURATION = """\
listen = []
workers = 1
socket = "{directory}/kdaemon.sock"
{extra}
[[certificate]]
chain = "{certificate}"
key = "{key}"
[clients]
roles = ["client", "server"]
arena_mib_max = 256
[log]
level = "error"
"""


class ServerError(Exception):
    """A program did not start."""


@dataclass
class Server:
    """A running program and what it uses, the daemon included."""

    name: str
    port: int
    account: Account

    @property
    def is_plain(self) -> bool:
        """floor.c: the load speaks no TLS with it."""
        return self.name.startswith("floor")

    def cpu_seconds(self) -> float:
        return self.account.cpu_seconds()


def line_of(process: subprocess.Popen[bytes], what: str) -> str:
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], START_DEADLINE_S)
    line = process.stdout.readline().decode() if readable else ""
    if not line:
        raise ServerError(f"{what} did not start")
    return line


def until_it_answers(path: Path, process: subprocess.Popen[bytes]) -> None:
    """A daemon without listeners says no `ready` line: attach and leave again."""
    deadline = time.monotonic() + START_DEADLINE_S
    while True:
        try:
            return attach(str(path)).close()
        except DaemonError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise ServerError(f"kdaemon: {error}") from None
        time.sleep(0.02)


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "pyx")]), **more}


@contextmanager
def process(command: list[str], enter: Callable[[], None], **more: str) -> Iterator[subprocess.Popen[bytes]]:
    """Ended at the end of the block."""
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        env=environment(**more),
        preexec_fn=enter,  # noqa: PLW1509 - this program has one thread
    ) as started:
        assert started.stdin is not None
        try:
            yield started
        finally:
            started.stdin.close()
            started.terminate()
            try:
                started.wait(10)
            except subprocess.TimeoutExpired:
                started.kill()


@contextmanager
def daemon(
    directory: Path, certificate: Path, key: Path, enter: Callable[[], None], extra: str = ""
) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A daemon for libtls alone; the path of its socket."""
    configuration = directory / "kdaemon.toml"
    configuration.write_text(
        DAEMON_CONFIGURATION.format(directory=directory, certificate=certificate, key=key, extra=extra)
    )
    command = [sys.executable, "-m", "kdaemon", "run", "--config", str(configuration)]
    path = directory / "kdaemon.sock"
    with process(command, enter) as started:
        until_it_answers(path, started)
        yield path, started


@contextmanager
def running(
    name: str,
    command: list[str],
    directory: Path,
    *,
    certificate: Path,
    key: Path,
    cpus: set[int],
    daemon_cpus: set[int],
) -> Iterator[Server]:
    """`command` prints its port. Names that begin with libtls get a daemon of their own, by KDAEMON_SOCKET."""
    used = account(f"kdaemon-rings-{os.getpid()}-{name}")
    directory.mkdir()

    def enter_on(where: set[int]) -> Callable[[], None]:
        def enter() -> None:
            used.enter()
            os.sched_setaffinity(0, where)

        return enter

    try:
        with ExitStack() as stack:
            more = {}
            if name.startswith("libtls"):
                path, _ = stack.enter_context(daemon(directory, certificate, key, enter_on(daemon_cpus)))
                more["KDAEMON_SOCKET"] = str(path)
            program = stack.enter_context(process(command, enter_on(cpus), **more))
            yield Server(name, int(line_of(program, name)), used)
    finally:
        used.close()
