"""Runs a case against servers in turn, round by round."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import median

from benchmarks.serving import cold
from benchmarks.serving.cases import FILES, ITSELF, LATENCY, MEMORY_CONNECTIONS, WORKERS, Case
from benchmarks.serving.conditions import Conditions, case_load
from benchmarks.serving.load import Load, Result, idle, run
from benchmarks.serving.servers import Server, Setting, Workers, running

BUSY_MAX = 0.90  # beyond, the generator bounds the rate
BUSY_TARGET = 0.75  # where a paced run is put
WORKER_GENERATOR_BUSY = 0.25  # for the load of one of two workers: the second one shares the generator's core
# A 99th percentile is at the mercy of whatever else runs on the machine: many short runs in turn, their median
LATENCY_ROUNDS = 3  # times those of the other cases


@dataclass
class Measured:
    """One server in one case: free runs (as fast as it goes) and those that count per CPU-second, one each a round.

    They are the same runs unless the generator was the bound: then the counted run is paced so that it is not.
    `without`: the same server's counted runs without idle connections, or with one worker, where that is compared.
    """

    server: str
    free: list[Result] = field(default_factory=list)
    counted: list[Result] = field(default_factory=list)
    without: list[Result] = field(default_factory=list)

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

    def cpu_seconds_per_gb(self) -> float:
        return median(result.used / (result.bytes / 1e9) for result in self.counted)


def _run(server: Server, load: Load, conditions: Conditions) -> Result:
    result = run(conditions.generator, server.address, load, conditions.cpu, server.cpu_seconds)
    server.settle()
    return result


def _one_round(server: Server, case: Case, conditions: Conditions, free: list[Result], counted: list[Result]) -> None:
    result = _run(server, case_load(case, conditions), conditions)
    free.append(result)
    if result.generator_busy >= BUSY_MAX:
        completed = result.requests / result.seconds
        # A few long requests cannot be paced by starting them less often; their generator is only reported as busy.
        if completed >= 100:
            rate = completed * BUSY_TARGET / result.generator_busy
            result = _run(server, case_load(case, conditions, rate), conditions)
    counted.append(result)


def _latency_round(server: Server, case: Case, conditions: Conditions, into: Measured, rate: float) -> None:
    others = cold.streams(server, conditions) if case.cold else nullcontext()
    with others:
        result = run(
            conditions.generator, server.address, case_load(case, conditions, rate), conditions.cpu, server.cpu_seconds
        )
    server.settle()
    into.free.append(result)
    into.counted.append(result)


def _idle_round(server: Server, case: Case, conditions: Conditions, into: Measured) -> None:
    """The same paced load without and with the idle connections: what is done per CPU-second depends on the rate."""
    peak = _run(server, case_load(case, conditions), conditions)
    rate = BUSY_TARGET / max(peak.generator_busy, BUSY_TARGET) * peak.requests / peak.seconds
    load = case_load(case, conditions, rate)
    into.without.append(_run(server, load, conditions))
    held = dataclasses.replace(load, mode="idle", connections=case.idle, rate=0.0, ages=0)
    with idle(conditions.generator, server.address, held, conditions.cpu):
        server.settle()
        result = _run(server, load, conditions)
    server.settle()
    into.free.append(result)
    into.counted.append(result)


def _together(results: Sequence[Result]) -> Result:
    """Two runs as if they were one."""
    first, second = results
    return dataclasses.replace(
        first,
        requests=first.requests + second.requests,
        bytes=first.bytes + second.bytes,
        used=first.used + second.used,
        generator_busy=max(first.generator_busy, second.generator_busy),
    )


def _worker_round(workers: Workers, case: Case, conditions: Conditions, into: Measured) -> None:
    """The same load for each worker, on the same cores, far enough below the peak that no core is the bound."""
    half = dataclasses.replace(case, connections=case.connections // 2)
    peak = _run(workers.single[0], case_load(half, conditions), conditions)
    each = min(0.5, WORKER_GENERATOR_BUSY / peak.generator_busy) * peak.requests / peak.seconds
    into.without.append(_together([_run(one, case_load(half, conditions, each), conditions) for one in workers.single]))
    result = _run(workers.both, case_load(case, conditions, 2 * each), conditions)
    into.free.append(result)
    into.counted.append(result)


def measure(
    servers: Sequence[Server], case: Case, conditions: Conditions, workers: Sequence[Workers] = ()
) -> list[Measured]:
    """`conditions.rounds` rounds; the order of the servers turns with each. `workers`: where they are compared."""
    measured = [Measured(server.name) for server in servers]
    rate = 0.0
    if case.peak:
        peaks = [_run(servers[0], case_load(case, conditions), conditions) for _ in range(3)]
        rate = case.peak * median(result.requests / result.seconds for result in peaks)
    for number in range(conditions.rounds * (LATENCY_ROUNDS if case.compared == LATENCY else 1)):
        turn = range(len(servers))
        for index in turn if number % 2 == 0 else reversed(turn):
            server, into = servers[index], measured[index]
            if case.compared == LATENCY:
                _latency_round(server, case, conditions, into, rate)
            elif case.compared == ITSELF:
                _idle_round(server, case, conditions, into)
            elif case.compared == WORKERS:
                _worker_round(workers[index], case, conditions, into)
            else:
                _one_round(server, case, conditions, into.free, into.counted)
    return measured


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
