"""The interop matrix over real sockets: every peer in one table, the cases made from what each of them can do.

Peers as clients of the daemon (one site, a certificate of each kind, chosen by SNI), and `kdaemon connect` as a client
of peers. What the daemon has no setting for, client certificates and a client that resumes, is in
test_matrix_engine.py, with the same peers.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support import peer_commands, peer_programs
from support.certificates import Issued, issue, issue_rsa_pss
from support.content import pattern
from support.daemon import Daemon, environment, serve, status
from support.peer_programs import Job
from support.waiting import DEADLINE_S

SUITES = ("TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256")
CLASSIC = (("x25519",), ("secp256r1",), ("secp384r1",))
HYBRID = (("X25519MLKEM768",),)
RETRY = (("secp521r1", "secp256r1"), ("secp521r1", "x25519"))  # the one share is for a group that we do not have
CERTIFICATES = ("ecdsa-p256", "ecdsa-p384", "ed25519", "rsa", "rsa-pss-key")
NO_PSS_KEY = CERTIFICATES[:4]
NO_ED25519 = ("ecdsa-p256", "ecdsa-p384", "rsa")
BODY = pattern(40_001)


@dataclass(frozen=True)
class Peer:
    """What a peer can be asked for; an empty tuple: its own choice. `own_groups`: those of the whole process."""

    suites: tuple[str, ...] = SUITES
    groups: tuple[tuple[str, ...], ...] = CLASSIC + RETRY
    certificates: tuple[str, ...] = CERTIFICATES
    resumes: bool = True
    updates: bool = False
    own_groups: tuple[str, ...] = ()


Case = tuple[str, tuple[str, ...], str]  # certificate, groups, suite
Cases = Callable[[Peer], list[Case]]
ANY = ((),)
CLIENTS = {
    "curl": Peer(resumes=False),
    "s_client": Peer(),
    "gnutls-cli": Peer(),
    "tstclnt": Peer(certificates=("ecdsa-p256", "ecdsa-p384", "rsa", "rsa-pss-key"), resumes=False),
    "ssl": Peer(suites=(), groups=CLASSIC),
    "tlslite": Peer(updates=True),
    "node": Peer(groups=CLASSIC + HYBRID + RETRY),
    "boringssl": Peer(suites=(), groups=CLASSIC + HYBRID + RETRY, certificates=NO_ED25519, resumes=False),
    "go": Peer(suites=(), groups=CLASSIC + HYBRID + RETRY, certificates=NO_PSS_KEY),
    "java": Peer(groups=ANY, own_groups=("x25519", "secp256r1", "secp384r1")),
    "java-retry": Peer(groups=ANY, certificates=("ecdsa-p256",), own_groups=("secp521r1", "secp384r1")),
    "deno": Peer(suites=(), groups=ANY, certificates=NO_PSS_KEY, resumes=False),
}
SERVERS = {
    "s_server": Peer(groups=CLASSIC),
    "gnutls-serv": Peer(groups=CLASSIC),
    "selfserv": Peer(groups=CLASSIC, certificates=("ecdsa-p256", "ecdsa-p384", "rsa")),
    "ssl": Peer(suites=(), groups=CLASSIC),
    "tlslite": Peer(groups=CLASSIC),
    "node": Peer(groups=CLASSIC + HYBRID),
    "go": Peer(suites=(), groups=CLASSIC + HYBRID, certificates=NO_PSS_KEY),
    "java": Peer(groups=ANY, own_groups=("x25519", "secp256r1", "secp384r1")),
    "deno": Peer(suites=(), groups=ANY, certificates=NO_PSS_KEY),
}


def covering(peer: Peer) -> list[Case]:
    """Every group with every certificate, and every suite with each of them."""
    suites = peer.suites or ("",)
    return [
        (certificate, groups, suites[(row + column) % len(suites)])
        for row, certificate in enumerate(peer.certificates)
        for column, groups in enumerate(peer.groups)
    ]


def diagonal(peer: Peer) -> list[Case]:
    """The same with each value once or more: for our client, which costs half a second a connection, and for guests."""
    suites = peer.suites or ("",)
    rows = max(len(peer.certificates), len(peer.groups), len(suites))
    return [
        (
            peer.certificates[row % len(peer.certificates)],
            peer.groups[row % len(peer.groups)],
            suites[row % len(suites)],
        )
        for row in range(rows)
    ]


@dataclass(frozen=True)
class Authority:
    """Certificates of every kind for KIND.test, and a file with all their roots."""

    issued: dict[str, Issued]
    roots: Path
    folder: Path

    def job(self, kind: str, groups: Sequence[str], suite: str, **more: Any) -> Job:
        everything = ["x25519", "secp256r1", "secp384r1"]
        job: Job = {
            "ca": str(self.roots),
            "suites": [suite] if suite else list(SUITES),
            "groups": list(groups) or everything,
        }
        job |= {"name": f"{kind}.test", "path": "/file", "resume": False, "update": False, "certificate": "", "key": ""}
        return {**job, **more}

    def server_job(self, kind: str, groups: Sequence[str], suite: str) -> Job:
        issued = self.issued[kind]
        more = {"certificate": str(issued.certificate), "key": str(issued.key), "client_ca": "", "rsa": "rsa" in kind}
        return self.job(kind, groups, suite, **more)

    @property
    def nss(self) -> peer_commands.NssDatabase:
        database = peer_commands.NssDatabase(self.folder / "nss")
        database.trust(self.roots.read_bytes())
        return database


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    folder = tmp_path_factory.mktemp("matrix")
    issued = {
        kind: issue_rsa_pss(folder / kind, f"{kind}.test") if kind == "rsa-pss-key"
        else issue(folder / kind, kind, names=(f"{kind}.test",))
        for kind in CERTIFICATES
    }  # fmt: skip
    roots = folder / "roots.pem"
    roots.write_bytes(b"".join(each.ca.read_bytes() for each in issued.values()))
    (folder / "site").mkdir()
    (folder / "site" / "file").write_bytes(BODY)
    (folder / "kdaemon.toml").write_text(
        "".join(f'[[certificate]]\nchain = "{each.certificate}"\nkey = "{each.key}"\n' for each in issued.values())
        + f'[[site]]\nroot = "{folder}/site"\n'
    )
    return Authority(issued, roots, folder)


class Batch:
    """All jobs of a peer that is one process for many connections, run when the first result is asked for."""

    def __init__(self, authority: Authority, daemon: Daemon, cases: Cases) -> None:
        self._authority, self.daemon, self._cases = authority, daemon, cases
        self._results: dict[str, list[Job]] = {}

    def jobs(self, name: str) -> list[Job]:
        peer = CLIENTS[name]
        job, port = self._authority.job, self.daemon.port
        jobs = [job(*case, port=port, update=peer.updates) for case in self._cases(peer)]
        if peer.resumes:
            jobs += [job("ecdsa-p256", peer.groups[0], suite, port=port, resume=True) for suite in peer.suites or ("",)]
        return jobs

    def result(self, name: str, number: int) -> Job:
        jobs = self.jobs(name)
        if name in peer_commands.CLIENTS:
            if name == "tstclnt":
                jobs[number]["database"] = self._nss()
            return peer_commands.CLIENTS[name](jobs[number])
        if name not in self._results:
            program = name.removesuffix("-retry")
            self._results[name] = peer_programs.run_clients(program, jobs, ",".join(CLIENTS[name].own_groups))
        return self._results[name][number]

    @cache  # noqa: B019 - one object a module
    def _nss(self) -> peer_commands.NssDatabase:
        return self._authority.nss


@contextmanager
def serving(authority: Authority, ktls: str, cases: Cases) -> Iterator[Batch]:
    arguments = ("--workers", "1", "--ktls", ktls, "--config", str(authority.folder / "kdaemon.toml"))
    with serve(None, *arguments) as daemon:
        assert daemon.ready[0].backend == ("user" if ktls == "off" else "kernel")
        yield Batch(authority, daemon, cases)


@pytest.fixture(scope="module")
def batch(authority: Authority) -> Iterator[Batch]:
    with serving(authority, "off", covering) as batch:
        yield batch


@pytest.fixture(scope="module")
def kernel_batch(authority: Authority) -> Iterator[Batch]:
    with serving(authority, "require", diagonal) as batch:
        yield batch


def named(case: Case) -> str:
    certificate, groups, suite = case
    return f"{certificate}-{'+'.join(groups) or 'groups'}-{suite.removeprefix('TLS_') or 'suites'}"


def fetches(names: Iterable[str], cases: Cases) -> list[Any]:
    return [
        pytest.param(name, number, case[2], id=f"{name}-{named(case)}")
        for name in names
        for number, case in enumerate(cases(CLIENTS[name]))
    ]


def resumptions(names: Iterable[str], cases: Cases) -> list[Any]:
    return [
        pytest.param(name, len(cases(CLIENTS[name])) + number, id=f"{name}-{suite or 'suites'}")
        for name in names
        if CLIENTS[name].resumes
        for number, suite in enumerate(CLIENTS[name].suites or ("",))
    ]


def check(result: Job, suite: str = "") -> None:
    assert not result["error"]
    assert result["status"] == 200
    assert result["sha256"] == hashlib.sha256(BODY).hexdigest()
    assert not suite or result.get("suite", "") in ("", suite)


def check_resumed(batch: Batch, peer: str, number: int) -> None:
    result = batch.result(peer, number)
    check(result)
    assert result["resumed"]
    workers: Any = status(batch.daemon)["workers"]
    assert workers[0]["handshakes"]["resumed"]


@pytest.mark.slow
@pytest.mark.parametrize(("peer", "number", "suite"), fetches(CLIENTS, covering))
def test_peer_fetches(batch: Batch, peer: str, number: int, suite: str) -> None:
    check(batch.result(peer, number), suite)


@pytest.mark.slow
@pytest.mark.parametrize(("peer", "number"), resumptions(CLIENTS, covering))
def test_peer_resumes(batch: Batch, peer: str, number: int) -> None:
    check_resumed(batch, peer, number)


#: Those that a guest, where system calls are dear, can run in a second or two.
CORE = ("curl", "s_client", "gnutls-cli", "tstclnt", "ssl", "node")


@pytest.mark.guest
@pytest.mark.parametrize(("peer", "number", "suite"), fetches(CORE, diagonal))
def test_peer_fetches_from_the_kernels_record_layer(kernel_batch: Batch, peer: str, number: int, suite: str) -> None:
    check(kernel_batch.result(peer, number), suite)


@pytest.mark.guest
@pytest.mark.parametrize(("peer", "number"), resumptions(CORE, diagonal))
def test_peer_resumes_with_the_kernels_record_layer(kernel_batch: Batch, peer: str, number: int) -> None:
    check_resumed(kernel_batch, peer, number)


# --- our client


def connect(port: int, job: Job, data: bytes, folder: Path) -> bytes:
    """`kdaemon connect` to a peer's server: what comes back until its close_notify."""
    arguments = [f"127.0.0.1:{port}", "--cafile", job["ca"], "--servername", job["name"]]
    completed = subprocess.run(
        [sys.executable, "-m", "kdaemon", "connect", *arguments],
        input=data,
        capture_output=True,
        timeout=DEADLINE_S,
        check=False,
        env=environment("connect", folder),
    )
    assert (completed.returncode, completed.stderr) == (0, b"")
    return completed.stdout


ECHO = pattern(20_000)


@pytest.mark.slow
@pytest.mark.parametrize("peer", [name for name in SERVERS if name not in peer_commands.SERVERS])
def test_connect_to_a_program(authority: Authority, tmp_path: Path, peer: str) -> None:
    """Each certificate, group and suite of the peer, over an echo of more than one record."""
    able = SERVERS[peer]
    jobs = [authority.server_job(*case) for case in diagonal(able)]
    with peer_programs.servers(peer, jobs, ",".join(able.own_groups)) as ports:
        for port, job in zip(ports, jobs, strict=True):
            assert connect(port, job, ECHO, tmp_path) == ECHO, job


@pytest.mark.slow
@pytest.mark.parametrize(
    ("peer", "case"),
    [
        pytest.param(name, case, id=f"{name}-{named(case)}")
        for name in peer_commands.SERVERS
        for case in diagonal(SERVERS[name])
    ],
)
def test_connect_to_a_command(authority: Authority, tmp_path: Path, peer: str, case: Case) -> None:
    job = authority.server_job(*case)
    with peer_commands.SERVERS[peer](job) as port:
        page = connect(port, job, b"GET / HTTP/1.0\r\n\r\n", tmp_path)
    assert page.startswith(b"HTTP/1.0 200")
