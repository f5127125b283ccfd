"""Rounds of load.c against the running programs in turn, and what becomes of the numbers."""

from __future__ import annotations

import json
import os
import select
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.rings.servers import Server
from benchmarks.serving.perf_counts import PerfAccount

SOURCES = Path(__file__).resolve().parent
HEADERS = SOURCES.parent.parent / "pyx" / "kdaemon_pyx"
DEADLINE_S = 120.0
BUSY = 0.9  # a load that is busier measures itself


class LoadError(Exception):
    """The load generator could not do its work, so nothing was measured."""


@dataclass(frozen=True)
class Case:
    """What the load does."""

    mode: str  # echo, sink, source
    connections: int
    message_bytes: int

    @property
    def name(self) -> str:
        if self.mode == "echo":
            return f"echo-{size_name(self.message_bytes)}-{self.connections}"
        return f"{self.mode}-{self.connections}"


@dataclass(frozen=True)
class Round:
    """One run of the load against one program."""

    messages: int
    bytes: int
    seconds: float
    load_busy: float
    used: float  # by program and daemon: CPU seconds, or system calls
    p50_us: int
    p99_us: int

    @property
    def work(self) -> float:
        """Per CPU second: messages, or bytes where there are none."""
        return (self.messages or self.bytes) / self.used


@dataclass
class Measured:
    """The rounds of one case, per program."""

    case: Case
    rounds: dict[str, list[Round]] = field(default_factory=dict)

    def work(self, name: str) -> float:
        return statistics.median(one.work for one in self.rounds[name])

    def ratio(self, name: str, reference: str) -> float:
        """The median of the rounds' own ratios: what disturbed a round disturbed both."""
        pairs = zip(self.rounds[name], self.rounds[reference], strict=True)
        return statistics.median(one.work / other.work for one, other in pairs)

    def as_json(self) -> dict[str, object]:
        return {
            "case": self.case.name,
            "rounds": {name: [asdict(one) for one in rounds] for name, rounds in self.rounds.items()},
        }


def size_name(size: int) -> str:
    return f"{size // 1024}k" if size >= 1024 else str(size)


def build(name: str, directory: Path, *libraries: str) -> Path:
    """Compiles one of the C programs here."""
    program = directory / name
    command = [os.environ.get("CC", "cc"), "-std=gnu11", "-O2", "-I", str(HEADERS), "-o", str(program)]
    subprocess.run([*command, str(SOURCES / f"{name}.c"), *libraries], check=True)
    return program


def load(program: Path, server: Server, case: Case, *, seconds: float, cpu: int, used: Callable[[], float]) -> Round:
    """Opens the connections, then loads; `used` is asked at both ends of that time."""
    mode = f"plain-{case.mode}" if server.is_plain else case.mode
    command = [program, "127.0.0.1", server.port, mode, case.connections, case.message_bytes, seconds]
    with subprocess.Popen(
        [str(word) for word in command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        preexec_fn=lambda: os.sched_setaffinity(0, {cpu}),  # noqa: PLW1509 - this program has one thread
    ) as process:
        assert process.stdin is not None
        try:
            _line(process)  # "warm"
            before = used()
            process.stdin.write(b"go\n")
            said = json.loads(_line(process, seconds))
            after = used()
        finally:
            process.kill()
    if not said["bytes"]:
        raise LoadError(f"{case.name}: nothing was moved")
    return Round(
        messages=said["messages"],
        bytes=said["bytes"],
        seconds=said["seconds"],
        load_busy=said["cpu_seconds"] / said["seconds"],
        used=after - before,
        p50_us=said["p50_us"],
        p99_us=said["p99_us"],
    )


def _line(process: subprocess.Popen[bytes], seconds: float = 0) -> bytes:
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], seconds + DEADLINE_S)
    line = process.stdout.readline() if readable else b""
    if not line:
        raise LoadError("the load " + ("ended" if readable else "says nothing"))
    return line


def measure(
    program: Path, servers: dict[str, Server], case: Case, *, rounds: int, seconds: float, cpu: int
) -> Measured:
    """Every program in turn, `rounds` times."""
    measured = Measured(case, {name: [] for name in servers})
    for _ in range(rounds):
        for name, server in servers.items():
            measured.rounds[name].append(load(program, server, case, seconds=seconds, cpu=cpu, used=server.cpu_seconds))
    return measured


def system_calls(program: Path, servers: dict[str, Server], case: Case, seconds: float, cpu: int) -> dict[str, float]:
    """Of program and daemon together per operation, of which a message is two, in a run of its own."""
    found = {}
    for name, server in servers.items():
        if server.is_plain:
            continue  # its processes begin with the connection, perf's count before it; floor.c says how many there are
        counted = PerfAccount(server.account.pids(), "raw_syscalls:sys_enter")
        one = load(program, server, case, seconds=seconds, cpu=cpu, used=counted)
        found[name] = one.used / (2 * one.messages)
    return found
