"""The same figures twice: a table for people, JSON for programs. Ratios are each server's over the first one's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from statistics import median, quantiles
from typing import Any

from benchmarks.serving.cases import (
    ITSELF,
    LATENCY,
    MEMORY,
    MEMORY_CONNECTIONS,
    MEMORY_MARK,
    WORK,
    WORKERS,
    Case,
)
from benchmarks.serving.measure import BUSY_MAX, Measured, Memory

COLUMNS = (
    "case",
    "server",
    "rate/s",
    "ratio",
    "per CPU-s",
    "ratio",
    "p99 us",
    "spread",
    "generator busy",
    "mark",
)


COST_COLUMNS = ("case", "server", "unit", "CPU s/GB")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def _ratios(one: Measured, reference: Measured, case: Case) -> list[float]:
    """Of each round what the case's mark is about."""
    if case.compared == LATENCY:
        return [
            mine.latency_us["p99"] / max(1, other.latency_us["p99"])
            for mine, other in zip(one.free, reference.free, strict=True)
        ]
    others = one.without if case.compared in {ITSELF, WORKERS} else reference.counted
    ratios = [
        (case.work(mine) / mine.used) / (case.work(other) / other.used)
        for mine, other in zip(one.counted, others, strict=True)
    ]
    return [1 / ratio for ratio in ratios] if case.compared == WORKERS else ratios


def _spread(ratios: list[float]) -> tuple[float, float]:
    """Least and greatest; of many the quartiles."""
    if len(ratios) < 8:
        return min(ratios), max(ratios)
    first, _, third = quantiles(ratios, n=4)
    return first, third


def case_as_json(case: Case, measured: list[Measured], costs: dict[str, list[float]]) -> dict[str, Any]:
    """`costs`: for each kind, what one unit of the case's work costs each of the servers."""
    reference = measured[0]
    servers = []
    for number, one in enumerate(measured):
        ratios = _ratios(one, reference, case)
        p99_ratio = one.p99_us() / max(1.0, reference.p99_us())
        ratio = one.per_cpu_second(case) / reference.per_cpu_second(case)
        compared = {WORK: ratio, LATENCY: p99_ratio}.get(case.compared, median(ratios))
        servers.append({
            "server": one.server,
            "rate": one.rate(case),
            "rate_ratio": one.rate(case) / reference.rate(case),
            "per_cpu_second": one.per_cpu_second(case),
            "per_cpu_second_ratio": ratio,
            "p99_us": one.p99_us(),
            "p99_ratio": p99_ratio,
            "cpu_seconds_per_gb": one.cpu_seconds_per_gb(),
            "costs": {kind: each[number] for kind, each in costs.items()},
            "generator_busy": one.busy(),
            "generator_was_the_bound": one.busy() >= BUSY_MAX,
            "compared": compared,
            "compared_spread": _spread(ratios),
            "mark": case.mark,
            "reached": compared <= case.mark if case.compared in {LATENCY, WORKERS} else compared >= case.mark,
            "free_runs": [dataclasses.asdict(result) for result in one.free],
            "counted_runs": [dataclasses.asdict(result) for result in one.counted],
            "runs_without": [dataclasses.asdict(result) for result in one.without],
        })  # fmt: skip
    return {
        "case": case.name, "unit": case.unit, "mode": case.mode, "connections": case.connections, "idle": case.idle,
        "part_of_peak": case.peak, "body_bytes": case.file.size, "compared": case.compared, "servers": servers,
    }  # fmt: skip


def memory_as_json(measured: list[Memory]) -> dict[str, Any]:
    reference = measured[0].per_connection()
    servers = [
        {
            "server": one.server,
            "empty_bytes": one.empty_bytes,
            "idle_bytes": one.idle_bytes,
            "bytes_per_connection": one.per_connection(),
            "bytes_per_connection_ratio": one.per_connection() / reference if reference else None,
        }
        for one in measured
    ]
    return {"case": MEMORY, "connections": MEMORY_CONNECTIONS, "servers": servers}


def _memory_row(one: dict[str, Any], *, reference: bool) -> tuple[str, ...]:
    empty, each = min(one["empty_bytes"]) / 1e6, one["bytes_per_connection"] / 1e3
    ratio = one["bytes_per_connection_ratio"] or 0.0
    verdict = "" if reference else f"<= {MEMORY_MARK:g} {'reached' if ratio <= MEMORY_MARK else 'MISSED'}"
    cells = (f"{empty:.1f} MB empty", "", f"{each:.2f} kB/idle", f"{ratio:.2f}", "", "", "")
    return (MEMORY, one["server"], *cells, verdict)


_MARKS = {WORK: ">=", LATENCY: "p99 <=", ITSELF: "of itself >=", WORKERS: "CPU of one's <="}


def rows(case: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table's rows of one case, from its JSON."""
    if case["case"] == MEMORY:
        return [_memory_row(one, reference=number == 0) for number, one in enumerate(case["servers"])]
    found: list[tuple[str, ...]] = []
    for number, one in enumerate(case["servers"]):
        low, high = one["compared_spread"]
        verdict = f"{_MARKS[case['compared']]} {one['mark']:g} {'reached' if one['reached'] else 'MISSED'}"
        if case["compared"] in {ITSELF, WORKERS}:
            verdict += f": {one['compared']:.2f}"
        elif number == 0 or one["server"] in {"openssl", "node"}:  # those are beside it, not judged
            verdict = ""
        found.append(
            (
                case["case"],
                one["server"],
                f"{_number(one['rate'])} {case['unit']}",
                f"{one['rate_ratio']:.2f}",
                _number(one["per_cpu_second"]),
                f"{one['per_cpu_second_ratio']:.2f}",
                f"{_number(one['p99_us'])} ({one['p99_ratio']:.2f})",
                f"{low:.2f}..{high:.2f}",
                f"{one['generator_busy']:.0%}{' !' if one['generator_was_the_bound'] else ''}",
                verdict,
            )
        )
    return found


def cost_rows(case: dict[str, Any], kinds: Sequence[str]) -> list[tuple[str, ...]]:
    """The rows of the second table: what the work costs."""
    if case["case"] == MEMORY:
        return []
    found: list[tuple[str, ...]] = []
    for one in case["servers"]:
        each = [_number(one["costs"][kind]) if kind in one["costs"] else "" for kind in kinds]
        unit = {"requests": "request", "handshakes": "handshake"}.get(case["unit"], case["unit"])
        found.append((case["case"], one["server"], unit, f"{one['cpu_seconds_per_gb']:.2f}", *each))
    return found


def table(lines: list[tuple[str, ...]], columns: Sequence[str] = COLUMNS) -> str:
    """GitHub's Markdown."""
    everything = [tuple(columns), *lines]
    widths = [max(len(line[column]) for line in everything) for column in range(len(columns))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in everything
    ]
    text.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(text)
