"""benchmarks/robustness in its short form: every phase works from end to end, and finds nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAM = ROOT / "benchmarks" / "robustness"


@pytest.mark.slow
def test_the_short_form(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    completed = subprocess.run(
        [sys.executable, str(PROGRAM), "--minutes", "0.1", "--drops", "300", "--clients", "260", "--scale", "0.1",
         "--threads", "12", "--seed", "1", "--json", str(output)],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert completed.returncode == 0, completed.stdout + completed.stderr
    found = json.loads(output.read_text())
    assert found["wrong"] == []
    counts = found["load"]["counts"]
    assert counts["bodies equal by SHA-256"] > 50 and counts["ranges equal"] > 10
    assert sum(found["drops"]["dropped"].values()) == 300
    for phase in ("descriptors", "memory", "disk"):
        assert "served" in found[phase] or "held" in found[phase] or "NOT TRIED" in found[phase]


def test_unknown_phase_is_refused() -> None:
    completed = subprocess.run(
        [sys.executable, str(PROGRAM), "--phases", "nothing"], capture_output=True, text=True, check=False
    )
    assert completed.returncode == 2
    assert "nothing" in completed.stderr and "descriptors" in completed.stderr
