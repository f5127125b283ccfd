"""What benchmarks/serve concludes from its runs; and that the programs of benchmarks/rings compile."""

import dataclasses
import subprocess
from pathlib import Path

import pytest

from benchmarks.serving.cases import CASES
from benchmarks.serving.load import Result
from benchmarks.serving.measure import Measured
from benchmarks.serving.report import case_as_json, cost_rows, rows

RINGS = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "rings"

RUN = Result(
    requests=1000, bytes=1_000_000, handshakes_full=0, handshakes_resumed=0, errors=0, first_error="", reconnects=0,
    seconds=1.0, generator_busy=0.5, used=0.1, latency_us={"p99": 1000},
)  # fmt: skip


def measured(name: str, *, cpu_s: float = 0.1, p99_us: int = 1000, without_cpu_s: float | None = None) -> Measured:
    run = dataclasses.replace(RUN, used=cpu_s, latency_us={"p99": p99_us})
    without = [] if without_cpu_s is None else [dataclasses.replace(RUN, used=without_cpu_s)] * 3
    return Measured(name, [run] * 3, [run] * 3, without)


def case(name: str):  # type: ignore[no-untyped-def]
    return next(one for one in CASES if one.name == name)


@pytest.mark.parametrize(
    ("name", "mine", "reached", "compared"),
    [
        ("requests-1k", {"cpu_s": 0.07}, True, 1 / 0.7),
        ("requests-1k", {"cpu_s": 0.08}, False, 1 / 0.8),
        ("latency-1k", {"p99_us": 1000}, True, 1.0),
        ("latency-1k", {"p99_us": 1001, "cpu_s": 0.01}, False, 1.001),
        ("idle-10000", {"cpu_s": 0.105, "without_cpu_s": 0.1}, True, 1 / 1.05),
        ("idle-10000", {"cpu_s": 0.106, "without_cpu_s": 0.1}, False, 1 / 1.06),
        ("two-workers", {"cpu_s": 0.11, "without_cpu_s": 0.1}, True, 1.1),
        ("two-workers", {"cpu_s": 0.12, "without_cpu_s": 0.1}, False, 1.2),
    ],
)
def test_marks(name: str, mine: dict[str, float], reached: bool, compared: float) -> None:
    reference = measured("nginx", without_cpu_s=0.1)
    found = case_as_json(case(name), [reference, measured("kdaemon", **mine)], {})  # type: ignore[arg-type]
    server = found["servers"][1]
    assert server["compared"] == pytest.approx(compared)
    assert server["reached"] is reached
    row = rows(found)[1]
    assert row[:2] == (name, "kdaemon")
    assert ("reached" if reached else "MISSED") in row[-1]


def test_costs_are_those_of_each_server() -> None:
    found = case_as_json(
        case("requests-1k"), [measured("nginx"), measured("kdaemon", cpu_s=0.05)], {"calls": [7.0, 0.5]}
    )
    assert cost_rows(found, ["calls"]) == [
        ("requests-1k", "nginx", "request", "100.00", "7.00"),
        ("requests-1k", "kdaemon", "request", "50.00", "0.50"),
    ]


@pytest.mark.parametrize("program", sorted(path.name for path in RINGS.glob("*.c")))
def test_the_programs_of_the_rings_compile(program: str) -> None:
    command = ["cc", "-std=gnu11", "-Wall", "-Werror", "-fsyntax-only", "-I", str(RINGS / "../../pyx/kdaemon_pyx")]
    result = subprocess.run([*command, str(RINGS / program)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
