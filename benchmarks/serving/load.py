"""Runs generator.c: one thread, on its own core, that also tells how busy it was."""

from __future__ import annotations

import json
import os
import select
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("generator.c")
START_DEADLINE_S = 300.0


class LoadError(Exception):
    """The generator could not do its work, so nothing was measured."""


@dataclass(frozen=True)
class Load:
    """One run of the generator. `rate`: requests per second, 0 for as many as it gets answered."""

    path: str
    mode: str  # keepalive, full, resumed, idle
    connections: int
    seconds: float
    rate: float
    body_bytes: int
    suite: str
    group: str
    ages: int = 0  # requests that the connections have made before, from none to this many
    files: int = 1  # how many files a * in the path stands for


@dataclass(frozen=True)
class Result:
    """What one run did, in the measured time alone."""

    requests: int
    bytes: int
    handshakes_full: int
    handshakes_resumed: int
    errors: int
    first_error: str
    reconnects: int
    seconds: float
    generator_busy: float  # CPU seconds of the generator per second
    used: float  # by the server, as the account given to run() says: CPU seconds, or system calls
    latency_us: dict[str, int]


def build(directory: Path) -> Path:
    """Compiles the generator into `directory`. Needs a C compiler and OpenSSL's headers, as the project does."""
    program = directory / "generator"
    subprocess.run(
        [os.environ.get("CC", "cc"), "-std=gnu11", "-O2", "-o", str(program), str(SOURCE), "-lssl", "-lcrypto"],
        check=True,
    )
    return program


def take_precedence(session: int) -> None:
    """Where the scheduler shares the CPU between sessions, what else runs on this machine gets the lesser part."""
    try:
        Path(f"/proc/{session}/autogroup").write_text("-15")
    except OSError:
        pass  # no such scheduler, or not root


@contextmanager
def _generator(program: Path, address: tuple[str, int], load: Load, cpu: int) -> Iterator[subprocess.Popen[bytes]]:
    arguments = [
        *map(
            str, (program, *address, load.path, load.mode, load.connections, load.seconds, load.rate, load.body_bytes)
        ),
        load.suite,
        load.group,
        str(load.ages),
        str(load.files),
    ]
    with subprocess.Popen(
        arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        preexec_fn=lambda: os.sched_setaffinity(0, {cpu}),  # noqa: PLW1509 - this program has one thread
        start_new_session=True,
    ) as process:
        take_precedence(process.pid)
        try:
            _line(process, START_DEADLINE_S)  # "warm"
            yield process
        finally:
            process.kill()


def _line(process: subprocess.Popen[bytes], deadline_s: float) -> bytes:
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], deadline_s)
    line = process.stdout.readline() if readable else b""
    if not line:
        raise LoadError("the generator " + ("ended" if readable else f"said nothing for {deadline_s:g} s"))
    return line


def _go(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.write(b"go\n")


def run(program: Path, address: tuple[str, int], load: Load, cpu: int, account: Callable[[], float]) -> Result:
    """Opens the connections, then loads and measures; `account` is asked at both ends of that time."""
    with _generator(program, address, load, cpu) as process:
        if load.rate:
            _real_time(process)
        before = account()
        _go(process)
        line = _line(process, load.seconds + START_DEADLINE_S)
        used = account() - before
    said = json.loads(line)
    busy = said.pop("cpu_seconds") / said["seconds"]
    result = Result(generator_busy=busy, used=used, **said)
    if result.errors:
        raise LoadError(f"{result.errors} errors, the first: {result.first_error}")
    if not result.requests and not result.bytes:
        raise LoadError("nothing was answered")
    return result


def _real_time(process: subprocess.Popen[bytes]) -> None:
    """A paced generator mostly sleeps; that it sleeps longer than it should must not count as the server's latency."""
    try:
        os.sched_setscheduler(process.pid, os.SCHED_FIFO, os.sched_param(1))
    except OSError:
        pass  # not root


@contextmanager
def beside(program: Path, address: tuple[str, int], load: Load, cpu: int) -> Iterator[None]:
    """Runs `load` beside whatever is done meanwhile; nothing of it is counted."""
    with _generator(program, address, load, cpu) as process:
        _go(process)
        yield


@contextmanager
def idle(program: Path, address: tuple[str, int], load: Load, cpu: int) -> Iterator[None]:
    """Holds `load.connections` connections open, each of which has been used once."""
    with _generator(program, address, load, cpu):
        yield
