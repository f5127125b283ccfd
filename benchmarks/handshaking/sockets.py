"""Servers and clients over sockets: connections per CPU-second of all processes of the end that is measured.

A connection is a handshake, one request for 64 bytes and its response, close_notify. Servers are loaded by the
generator of benchmarks/serve, or by Node where the group is the hybrid, which the generator's OpenSSL has not; the load
has a CPU of its own. Clients run against `openssl s_server`, which has that CPU then. Rounds alternate.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import tls_pair
from cryptography.hazmat.primitives import serialization

from benchmarks.handshaking import client
from benchmarks.serving import load, measure, report, servers
from benchmarks.serving.cases import Case, File
from benchmarks.serving.conditions import Conditions

HYBRID = "X25519MLKEM768"
FILE = File("64", 64)
CONNECTIONS = 16
MARK = 0.6  # of the first server's work per CPU-second
NODE_LOAD = Path(__file__).with_name("node_load.js")


@dataclasses.dataclass(frozen=True)
class SocketCase:
    """`mode`: full or resumed; `kind`: of the certificate's key; `servers`: the first is the reference."""

    name: str
    mode: str
    kind: str
    group: str
    servers: tuple[str, ...]

    def as_case(self) -> Case:
        return Case(self.name, FILE, self.mode, CONNECTIONS, "handshakes", MARK)


SERVER_CASES = {
    case.name: case
    for case in (
        *(
            SocketCase(f"server-{mode}-{kind}", mode, kind, "X25519", ("nginx", "openssl", "kdaemon"))
            for mode, kinds in (("full", tls_pair.KEY_KINDS), ("resumed", ("p256",)))
            for kind in kinds
        ),
        SocketCase("server-full-hybrid", "full", "p256", HYBRID, ("node", "kdaemon")),
        SocketCase("server-resumed-hybrid", "resumed", "p256", HYBRID, ("node", "kdaemon")),
    )
}
CLIENT_CASES = {
    case.name: case
    for case in (
        *(
            SocketCase(f"client-full-{kind}", "full", kind, "X25519", ("ssl", "openssl", "kdaemon"))
            for kind in tls_pair.KEY_KINDS
        ),
        SocketCase("client-resumed-p256", "resumed", "p256", "X25519", ("ssl", "kdaemon")),
    )
}
NAMES = (*SERVER_CASES, *CLIENT_CASES)


def write_identity(directory: Path, kind: str) -> tuple[Path, Path, Path]:
    """(certificate, key, authority) for localhost, as files."""
    identity = tls_pair.server_identity(kind)
    paths = tuple(directory / f"{kind}-{name}.pem" for name in ("certificate", "key", "authority"))
    certificate, key, authority = paths
    certificate.write_bytes(identity.certificate.public_bytes(serialization.Encoding.PEM))
    key.touch(0o600)
    key.write_bytes(
        identity.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    authority.write_text(identity.issuer_pem)
    return certificate, key, authority


def node_generator(directory: Path) -> Path:
    """The generator's command line, spoken by Node."""
    program = directory / "node-load"
    program.write_text(f'#!/bin/sh\nexec "{servers.node()}" "{NODE_LOAD}" "$@"\n')
    program.chmod(0o700)
    return program


class Bench:
    """One run of the benchmark: its folder, site, certificates and generators."""

    def __init__(self, directory: Path, options: argparse.Namespace) -> None:
        self._directory = directory
        self._options = options
        self._site = directory / "site"
        self._site.mkdir()
        (self._site / FILE.name).write_bytes(os.urandom(FILE.size))
        self._identities = {kind: write_identity(directory, kind) for kind in tls_pair.KEY_KINDS}
        self._generators: dict[str, Path] = {}

    def _generator(self, group: str) -> Path:
        make = node_generator if group == HYBRID else load.build
        if group not in self._generators:
            self._generators[group] = make(self._directory)
        return self._generators[group]

    def _setting(self, case: SocketCase, name: str, cpu: int) -> servers.Setting:
        certificate, key, _ = self._identities[case.kind]
        return servers.Setting(
            directory=self._directory / f"{case.name}-{name}", site=self._site, certificate=certificate, key=key,
            cpus=frozenset((cpu,)), one_ticket=True, group=case.group,
        )  # fmt: skip

    def measure_servers(self, case: SocketCase, names: list[str]) -> dict[str, Any]:
        """All rounds of one case, as benchmarks/serve measures."""
        options = self._options
        conditions = Conditions(
            self._generator(case.group), self._site, options.load_cpu, options.seconds / options.rounds, options.rounds,
            "TLS_AES_128_GCM_SHA256", case.group,
        )  # fmt: skip
        authority = self._identities[case.kind][2]
        with ExitStack() as stack:
            started = [
                stack.enter_context(servers.running(name, self._setting(case, name, options.server_cpu)))
                for name in names
            ]
            for server in started:
                if case.group != HYBRID:  # Python's ssl verifies what is served; it has no hybrid
                    servers.verify(server, self._site, authority)
            measured = measure.measure(started, case.as_case(), conditions)
        return report.case_as_json(case.as_case(), measured, {})

    def measure_clients(self, case: SocketCase, names: list[str]) -> dict[str, Any]:
        """All rounds of one case: connections per CPU-second of each client, against `openssl s_server`."""
        options = self._options
        authority = self._identities[case.kind][2]
        found: dict[str, list[float]] = {name: [] for name in names}
        with servers.running("openssl", self._setting(case, "openssl", options.load_cpu)) as server:
            for number in range(options.rounds):
                for name in names if number % 2 == 0 else reversed(names):
                    found[name].append(self._run_client(name, case, server.address, authority))
        reference = found[names[0]]
        return {
            "case": case.name,
            "clients": [
                {
                    "client": name,
                    "per_cpu_second": each,
                    "ratios": [a / b for a, b in zip(each, reference, strict=True)],
                }
                for name, each in found.items()
            ],
        }

    def _run_client(self, name: str, case: SocketCase, address: tuple[str, int], authority: Path) -> float:
        seconds = self._options.seconds / self._options.rounds
        if name == "openssl":
            return self._run_s_time(address, authority, max(1, round(seconds)))
        command = [
            sys.executable, client.__file__, name, case.mode,
            *map(str, address), str(authority), str(seconds), FILE.name,
        ]  # fmt: skip
        said = self._run(command).stdout
        result = json.loads(said)
        return float(result["connections"] / result["cpu_seconds"])

    def _run_s_time(self, address: tuple[str, int], authority: Path, seconds: int) -> float:
        """s_time tells its connections; its CPU time is that of a child that has ended."""
        before = os.times()
        said = self._run([
            "openssl", "s_time", "-new", "-tls1_3", "-connect", "{}:{}".format(*address), "-CAfile", str(authority),
            "-verify", "4", "-time", str(seconds), "-www", f"/{FILE.name}",
        ]).stdout  # fmt: skip
        after = os.times()
        used = after.children_user + after.children_system - before.children_user - before.children_system
        return int(said.split(" connections in ")[0].split()[-1]) / used

    def _run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        cpu = self._options.server_cpu
        completed = subprocess.run(
            command, capture_output=True, text=True, check=False,
            preexec_fn=lambda: os.sched_setaffinity(0, {cpu}),
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )  # fmt: skip
        if completed.returncode:
            raise servers.ServerError(f"{command[0]} ended with {completed.returncode}: {completed.stderr.strip()}")
        return completed


def client_rows(case: dict[str, Any]) -> list[str]:
    rows = []
    for number, one in enumerate(case["clients"]):
        rate, ratio = statistics.median(one["per_cpu_second"]), statistics.median(one["ratios"])
        spread = f"{min(one['ratios']):.2f}..{max(one['ratios']):.2f}"
        verdict = f">= {MARK:g} {'reached' if ratio >= MARK else 'MISSED'}" if number else ""
        rows.append(f"| {case['case']:22} | {one['client']:8} | {rate:9,.0f} | {ratio:5.2f} | {spread} | {verdict}")
    return rows


def run(names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Both tables."""
    wanted = set(options.servers.split(",")) if options.servers else set()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="kdaemon-handshake-") as directory:
        bench = Bench(Path(directory), options)
        for name in names:
            case = SERVER_CASES.get(name) or CLIENT_CASES[name]
            chosen = [one for one in case.servers if not wanted or one in wanted]
            started = time.monotonic()
            if name in SERVER_CASES:
                found.append(bench.measure_servers(case, chosen))
                print(report.table(report.rows(found[-1])), flush=True)
            else:
                found.append(bench.measure_clients(case, chosen))
                print("\n".join(client_rows(found[-1])), flush=True)
            print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    return {"openssl": ssl.OPENSSL_VERSION, "cases": found}
