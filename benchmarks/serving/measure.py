"""Runs a case against servers in turn, round by round."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from benchmarks.serving.cases import FILES, MEMORY_CONNECTIONS, Case
from benchmarks.serving.load import Load, Result, idle, run
from benchmarks.serving.servers import Server, Setting, running
from benchmarks.serving.system_calls import SystemCallAccount

BUSY_MAX = 0.90  # beyond, the generator bounds the rate
BUSY_TARGET = 0.75  # where a paced run is put


@dataclass(frozen=True)
class Conditions:
    """What all runs share."""

    generator: Path
    cpu: int
    seconds: float
    rounds: int
    suite: str
    group: str


@dataclass
class Measured:
    """One server in one case: free runs (as fast as it goes) and those that count per CPU-second, one each a round.

    They are the same runs unless the generator was the bound: then the counted run is paced so that it is not.
    """

    server: str
    free: list[Result] = field(default_factory=list)
    counted: list[Result] = field(default_factory=list)

    def rate(self, case: Case) -> float:
        return median(case.work(result) / result.seconds for result in self.free)

    def per_cpu_second(self, case: Case) -> float:
        return median(case.work(result) / result.used for result in self.counted)

    def busy(self) -> float:
        """How busy the generator was in the counted runs, at worst."""
        return max(result.generator_busy for result in self.counted)

    def p99_us(self) -> float:
        """Of the free runs: a closed loop, unless the case has a load of its own (`peak`)."""
        return median(result.latency_us["p99"] for result in self.free)


def _load(case: Case, conditions: Conditions, rate: float = 0.0) -> Load:
    return Load(
        path=f"/{case.file.name}", mode=case.mode, connections=case.connections, seconds=conditions.seconds, rate=rate,
        body_bytes=case.file.size, suite=conditions.suite, group=conditions.group,
    )  # fmt: skip


def _run(server: Server, load: Load, conditions: Conditions) -> Result:
    return run(conditions.generator, server.address, load, conditions.cpu, server.cpu_seconds)


def _one_round(server: Server, case: Case, conditions: Conditions, into: Measured) -> None:
    free = _run(server, _load(case, conditions), conditions)
    into.free.append(free)
    counted = free
    if free.generator_busy >= BUSY_MAX:
        completed = free.requests / free.seconds
        # A few long requests cannot be paced by starting them less often; their generator is only reported as busy.
        if completed >= 100:
            rate = completed * BUSY_TARGET / free.generator_busy
            counted = _run(server, _load(case, conditions, rate), conditions)
    into.counted.append(counted)


def measure(servers: list[Server], case: Case, conditions: Conditions) -> list[Measured]:
    """`conditions.rounds` rounds; the order of the servers turns with each."""
    measured = [Measured(server.name) for server in servers]
    rate = 0.0
    if case.peak:
        reference = _run(servers[0], _load(case, conditions), conditions)
        rate = case.peak * reference.requests / reference.seconds
    for number in range(conditions.rounds):
        turn = range(len(servers))
        for index in turn if number % 2 == 0 else reversed(turn):
            server, into = servers[index], measured[index]
            if case.peak:
                result = _run(server, _load(case, conditions, rate), conditions)
                into.free.append(result)
                into.counted.append(result)
            elif case.idle:
                held = dataclasses.replace(_load(case, conditions), mode="idle", connections=case.idle)
                with idle(conditions.generator, server.address, held, conditions.cpu):
                    _one_round(server, case, conditions, into)
            else:
                _one_round(server, case, conditions, into)
    return measured


def system_calls(server: Server, case: Case, conditions: Conditions) -> float:
    """System calls of all the server's processes for one unit of the case's work, in one run of its own."""
    counting = SystemCallAccount(server.account.pids())
    result = run(conditions.generator, server.address, _load(case, conditions), conditions.cpu, counting)
    return result.used / case.work(result)


@dataclass
class Memory:
    """Bytes of one server, per round: with no connection (after it has served one), and with MEMORY_CONNECTIONS."""

    server: str
    empty_bytes: list[int] = field(default_factory=list)
    idle_bytes: list[int] = field(default_factory=list)

    def per_connection(self) -> float:
        return median(
            (full - empty) / MEMORY_CONNECTIONS for empty, full in zip(self.empty_bytes, self.idle_bytes, strict=True)
        )


def measure_memory(names: list[str], settings: list[Setting], conditions: Conditions) -> list[Memory]:
    """Each round starts each server afresh: what an allocator keeps from before would hide what a connection costs."""
    file = FILES["1k"]
    measured = [Memory(name) for name in names]
    for number in range(conditions.rounds):
        for into, setting in zip(measured, settings, strict=True):
            fresh = dataclasses.replace(
                setting, directory=setting.directory.with_name(f"{setting.directory.name}-m{number}")
            )
            with running(into.server, fresh) as server:
                load = Load(f"/{file.name}", "idle", 1, 0, 0, file.size, conditions.suite, conditions.group)
                with idle(conditions.generator, server.address, load, conditions.cpu):
                    pass
                into.empty_bytes.append(server.account.memory_bytes())
                many = dataclasses.replace(load, connections=MEMORY_CONNECTIONS)
                with idle(conditions.generator, server.address, many, conditions.cpu):
                    into.idle_bytes.append(server.account.memory_bytes())
    return measured
