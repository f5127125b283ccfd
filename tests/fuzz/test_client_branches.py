"""Every branch of the client ring's validation is taken by the fuzzing client; the same run under AddressSanitizer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def program(name: str, *arguments: str) -> str:
    command = [sys.executable, "-m", f"benchmarks.rings.{name}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_branch_of_the_validation(tmp_path: Path) -> None:
    assert "branches taken" in program("branches", "3000000", "--folder", str(tmp_path))


@pytest.mark.slow
def test_under_the_address_sanitizer_with_every_fetched_entry_altered(tmp_path: Path) -> None:
    report = json.loads(program("fuzz", "2000000", "1", "--rewrite", "--build", "alter", "--folder", str(tmp_path)))
    assert report["sanitizer"]
    assert report["fetch_alters"]
    assert report["accepted_percent"] >= 30
