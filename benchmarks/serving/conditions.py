"""What all runs share, and the load of a case under it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving.cases import Case
from benchmarks.serving.load import Load


@dataclass(frozen=True)
class Conditions:
    """What all runs share."""

    generator: Path
    site: Path
    cpu: int
    seconds: float
    rounds: int
    suite: str
    group: str


def case_load(case: Case, conditions: Conditions, rate: float = 0.0) -> Load:
    return Load(
        path=f"/{case.file.name}", mode=case.mode, connections=case.connections, seconds=conditions.seconds, rate=rate,
        body_bytes=case.file.size, suite=conditions.suite, group=conditions.group, ages=case.ages,
    )  # fmt: skip
