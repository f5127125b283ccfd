"""The same figures twice: a table for people, JSON for programs. Ratios are each server's over the first one's."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.serving.cases import MEMORY, MEMORY_CONNECTIONS, Case
from benchmarks.serving.measure import BUSY_MAX, Measured, Memory

COLUMNS = (
    "case",
    "server",
    "rate/s",
    "ratio",
    "per CPU-s",
    "ratio",
    "spread",
    "p99 us",
    "syscalls",
    "generator busy",
    "mark",
)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def _spread(one: Measured, reference: Measured, case: Case) -> tuple[float, float]:
    """Least and greatest ratio per CPU-second of the rounds."""
    ratios = [
        (case.work(mine) / mine.used) / (case.work(other) / other.used)
        for mine, other in zip(one.counted, reference.counted, strict=True)
    ]
    return min(ratios), max(ratios)


def case_as_json(case: Case, measured: list[Measured], system_calls: list[float] | None) -> dict[str, Any]:
    reference = measured[0]
    servers = []
    for number, one in enumerate(measured):
        low, high = _spread(one, reference, case)
        ratio = one.per_cpu_second(case) / reference.per_cpu_second(case)
        p99_ratio = one.p99_us() / max(1.0, reference.p99_us())
        servers.append({
            "server": one.server,
            "rate": one.rate(case),
            "rate_ratio": one.rate(case) / reference.rate(case),
            "per_cpu_second": one.per_cpu_second(case),
            "per_cpu_second_ratio": ratio,
            "per_cpu_second_ratio_spread": [low, high],
            "p99_us": one.p99_us(),
            "p99_ratio": p99_ratio,
            "system_calls_per_unit": system_calls[number] if system_calls else None,
            "generator_busy": one.busy(),
            "generator_was_the_bound": one.busy() >= BUSY_MAX,
            "mark": case.mark,
            "reached": p99_ratio <= case.mark if case.peak else ratio >= case.mark,
            "free_runs": [dataclasses.asdict(result) for result in one.free],
            "counted_runs": [dataclasses.asdict(result) for result in one.counted],
        })  # fmt: skip
    return {
        "case": case.name, "unit": case.unit, "mode": case.mode, "connections": case.connections, "idle": case.idle,
        "part_of_peak": case.peak, "body_bytes": case.file.size, "servers": servers,
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


def _memory_row(one: dict[str, Any]) -> tuple[str, ...]:
    empty, each = min(one["empty_bytes"]) / 1e6, one["bytes_per_connection"] / 1e3
    ratio = one["bytes_per_connection_ratio"] or 0.0
    return (MEMORY, one["server"], f"{empty:.1f} MB empty", "", f"{each:.2f} kB/idle", f"{ratio:.2f}", *[""] * 5)


def rows(case: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table's rows of one case, from its JSON."""
    if case["case"] == MEMORY:
        return [_memory_row(one) for one in case["servers"]]
    found = []
    for number, one in enumerate(case["servers"]):
        low, high = one["per_cpu_second_ratio_spread"]
        what = "p99 <=" if case["part_of_peak"] else ">="
        verdict = f"{what} {one['mark']:g} {'reached' if one['reached'] else 'MISSED'}"
        found.append(
            (
                case["case"],
                one["server"],
                f"{_number(one['rate'])} {case['unit']}",
                f"{one['rate_ratio']:.2f}",
                _number(one["per_cpu_second"]),
                f"{one['per_cpu_second_ratio']:.2f}",
                f"{low:.2f}..{high:.2f}",
                f"{_number(one['p99_us'])} ({one['p99_ratio']:.2f})",
                "" if one["system_calls_per_unit"] is None else f"{one['system_calls_per_unit']:.2f}",
                f"{one['generator_busy']:.0%}{' !' if one['generator_was_the_bound'] else ''}",
                verdict if number else "",
            )
        )
    return found


def table(lines: list[tuple[str, ...]]) -> str:
    """GitHub's Markdown."""
    everything = [COLUMNS, *lines]
    widths = [max(len(line[column]) for line in everything) for column in range(len(COLUMNS))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in everything
    ]
    text.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(text)
