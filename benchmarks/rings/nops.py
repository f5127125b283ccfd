"""NOP round trips and rates: the C client of nop.c, Python beside it, a bare doorbell between the same cores."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.rings.servers import environment

PYTHON_ROUNDS = 20_000
PAUSE_S = 0.0002  # after which the daemon sleeps


def percentiles(samples: list[int]) -> tuple[int, int]:
    samples.sort()
    return samples[len(samples) // 2], samples[-1 - len(samples) // 100]


def python_nops() -> dict[str, float]:
    """In this process, over KDAEMON_SOCKET."""
    from kdaemon_pyx import client_abi as abi  # noqa: PLC0415 - in a process of its own

    from libtls import tls_init  # noqa: PLC0415

    ring = tls_init(operations=256).ring

    def one() -> int:
        begin = time.perf_counter_ns()
        ring.wait(ring.post(abi.NOP))
        return time.perf_counter_ns() - begin

    ring.spin_ns = 10_000_000
    spinning = percentiles([one() for _ in range(PYTHON_ROUNDS)])
    ring.spin_ns = 0
    slept = []
    for _ in range(PYTHON_ROUNDS // 100):
        time.sleep(PAUSE_S)
        slept.append(one())
    woken = percentiles(slept)
    begin = time.perf_counter()
    for _ in range(PYTHON_ROUNDS // 100):
        operations = [ring.post(abi.NOP) for _ in range(200)]
        for operation in operations:
            ring.wait(operation)
    rate = PYTHON_ROUNDS * 2 / (time.perf_counter() - begin)
    return {
        "spinning_p50_ns": spinning[0],
        "spinning_p99_ns": spinning[1],
        "woken_p50_ns": woken[0],
        "woken_p99_ns": woken[1],
        "nops_per_s": rate,
    }


def measure(program: Path, path: Path, cpu: int, daemon_cpu: int, rounds: int) -> str:
    """A table: medians of `rounds` rounds in turn."""

    def run(command: list[str]) -> dict[str, float]:
        done = subprocess.run(
            ["taskset", "-c", str(cpu), *command],
            env=environment(KDAEMON_SOCKET=str(path)),
            stdout=subprocess.PIPE,
            check=True,
        )
        said: dict[str, float] = json.loads(done.stdout)
        return said

    found: dict[str, list[dict[str, float]]] = {"C": [], "Python": [], "doorbell": []}
    for _ in range(rounds):
        found["C"].append(run([str(program), str(path), "50000"]))
        found["doorbell"].append(run([str(program), "--doorbell", str(cpu), str(daemon_cpu), "500"]))
        found["Python"].append(run([sys.executable, "-m", "benchmarks.rings.nops"]))

    def median(who: str, what: str) -> float:
        return statistics.median(one[what] for one in found[who])

    bare = [median("doorbell", f"doorbell_p{percent}_ns") / 1000 for percent in (50, 99)]
    lines = ["| NOP | C | Python | mark (C) |", "| --- | --- | --- | --- |"]
    rows = [
        ("spinning p50", "spinning_p50_ns", "2 µs"),
        ("spinning p99", "spinning_p99_ns", ""),
        ("woken p50", "woken_p50_ns", f"1.5 × a bare doorbell's {bare[0]:.1f} µs"),
        ("woken p99", "woken_p99_ns", f"(bare doorbell: {bare[1]:.1f} µs)"),
    ]
    for name, what, mark in rows:
        figures = [f"{median(who, what) / 1000:.2f} µs" for who in ("C", "Python")]
        lines.append(f"| {name} | {figures[0]} | {figures[1]} | {mark} |")
    rates = [f"{median(who, 'nops_per_s') / 1e6:.2f} M/s" for who in ("C", "Python")]
    return "\n".join([*lines, f"| rate | {rates[0]} | {rates[1]} | 1 M/s |"])


if __name__ == "__main__":
    print(json.dumps(python_nops()))
    sys.stdout.flush()
    os._exit(0)
