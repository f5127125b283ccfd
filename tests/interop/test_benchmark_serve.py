"""benchmarks/serve works from end to end. What it measures in so short a time says nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.peers import program

ROOT = Path(__file__).resolve().parent.parent.parent

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="server and load need a core each")


def test_every_kind_of_case_is_measured(tmp_path: Path) -> None:
    program("nginx")
    program("cc")
    output = tmp_path / "result.json"
    completed = subprocess.run(
        [
            sys.executable, str(ROOT / "benchmarks" / "serve"), "--rounds", "1", "--seconds", "0.3",
            "--json", str(output),
            "--cases", "requests-1k,bytes-1m,handshakes-full,handshakes-resumed,latency-1k,memory",
        ],
        env=os.environ | {"PATH": f"{os.environ['PATH']}:/usr/sbin", "XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr
    cases = {case["case"]: case for case in json.loads(output.read_text())["cases"]}
    for name, case in cases.items():
        assert [server["server"] for server in case["servers"]] == ["nginx", "kdaemon"]
        assert name in completed.stdout
    for name in ("requests-1k", "bytes-1m", "handshakes-full", "handshakes-resumed", "latency-1k"):
        for server in cases[name]["servers"]:
            assert server["rate"] > 0 and server["per_cpu_second"] > 0, name
            assert all(run["errors"] == 0 and 0 < run["generator_busy"] <= 1.1 for run in server["counted_runs"])
    for server in cases["handshakes-full"]["servers"]:
        assert not server["free_runs"][0]["handshakes_resumed"]
    for server in cases["handshakes-resumed"]["servers"]:
        run = server["free_runs"][0]
        assert run["handshakes_resumed"] > run["handshakes_full"]
    for server in cases["memory"]["servers"]:
        assert server["bytes_per_connection"] > 0


def test_unknown_case_is_refused() -> None:
    completed = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "serve"), "--cases", "nothing"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 2
    assert "nothing" in completed.stderr and "requests-1k" in completed.stderr
