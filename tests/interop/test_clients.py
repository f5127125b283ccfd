"""Every client against every suite, group and certificate the daemon has, whole bodies compared."""

from __future__ import annotations

import hashlib
import re
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import peers
from support.certificates import issue, issue_rsa_pss
from support.clients import MemoryClient, fetch
from support.content import pattern
from support.daemon import Daemon, serve
from support.waiting import say_until

from kdaemon import ktls as kernel_tls

CERTIFICATES = {
    "ecdsa-p256": {"kind": "ecdsa-p256"},
    "ecdsa-p384": {"kind": "ecdsa-p384"},
    "ed25519": {"kind": "ed25519"},
    "rsa": {"kind": "rsa"},
    "rsa-chain-of-3": {"kind": "rsa", "intermediates": 2},
    "rsa-pss-signed": {"kind": "rsa", "pss": True},
    "rsa-pss-key": None,
}
# The last asks for a HelloRetryRequest: the one key share is for a group the daemon lacks.
GROUPS = (("x25519",), ("secp256r1",), ("secp521r1", "secp256r1"))
RECORD_LAYERS = ("off", pytest.param("require", marks=pytest.mark.guest))


BODIES = {"small.txt": pattern(1024), "medium.bin": pattern(40_001), "large.bin": pattern((1 << 20) + 1)}
# gnutls-cli writes what it receives byte by byte, which takes a minute for a large file in user-mode Linux.
PATHS = {"curl": "large.bin", "s_client": "large.bin", "gnutls-cli": "medium.bin"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    for name, body in BODIES.items():
        (directory / name).write_bytes(body)
    return directory


# The kernel's record layer knows nothing of certificates: one is enough there.
SERVERS = [pytest.param((kind, "off"), id=f"{kind}-off") for kind in CERTIFICATES]
SERVERS.append(pytest.param(("ecdsa-p256", "require"), id="ecdsa-p256-require", marks=pytest.mark.guest))


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for each certificate and record layer."""
    kind, ktls = request.param
    options, directory = CERTIFICATES[kind], tmp_path_factory.mktemp("certificate")
    certificate = issue_rsa_pss(directory) if options is None else issue(directory, **options)  # type: ignore[arg-type]
    with serve(files, "--workers", "1", "--ktls", ktls, issued=certificate) as daemon:
        assert daemon.ready[0].backend == ("user" if ktls == "off" else "kernel")
        yield daemon


@pytest.mark.parametrize("groups", GROUPS, ids="+".join)
@pytest.mark.parametrize("suite", peers.SUITES)
@pytest.mark.parametrize("peer", peers.PEERS)
def test_peer_fetches(server: Daemon, peer: str, suite: str, groups: tuple[str, ...]) -> None:
    assert peers.PEERS[peer](server, f"/{PATHS[peer]}", suite, groups) == BODIES[PATHS[peer]]


@pytest.mark.parametrize("groups", GROUPS[:2], ids="+".join)
def test_python_ssl_fetches(server: Daemon, groups: tuple[str, ...]) -> None:
    assert peers.python_ssl(server, "/large.bin", "", groups) == BODIES["large.bin"]


@pytest.mark.parametrize("suite", peers.SUITES)
@pytest.mark.parametrize(("groups", "hellos"), [(GROUPS[0], 1), (GROUPS[1], 1), (GROUPS[2], 2)])
def test_hello_retry_request_only_when_needed(server: Daemon, suite: str, groups: tuple[str, ...], hellos: int) -> None:
    assert peers.hello_count(server, server.ca, suite, groups) == hellos


@pytest.fixture(scope="module", params=RECORD_LAYERS)
def ktls(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def plain_server(files: Path, ktls: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon with an ECDSA certificate, for what does not depend on the certificate."""
    with serve(files, "--workers", "1", "--ktls", ktls, issued=issue(tmp_path_factory.mktemp("certificate"))) as daemon:
        yield daemon


def test_python_ssl_sees_http_1_1_by_alpn_and_close_notify(plain_server: Daemon) -> None:
    context = ssl.create_default_context(cafile=str(plain_server.ca))
    context.set_alpn_protocols(["h2", "http/1.1"])
    with MemoryClient(plain_server.address, plain_server.ca, context=context) as client:
        client.handshake()
        assert client.tls.selected_alpn_protocol() == "http/1.1"
        assert client.tls.version() == "TLSv1.3"
        client.request()
        client.send()
        response = client.response()
    assert (response.status, response.body, response.truncated) == (200, pattern(1024), False)


def test_one_connection_serves_many_requests(plain_server: Daemon) -> None:
    """Keep-alive, and requests sent before the answers are read: curl fetches 50 files over one connection."""
    completed = peers.run([
        peers.program("curl"), "--silent", "--show-error", "--fail", "--ipv4", "--cacert", str(plain_server.ca),
        "--write-out", "%{stderr}%{num_connects} ", f"https://localhost:{plain_server.port}/small.txt?[1-50]",
    ])  # fmt: skip
    assert completed.stdout == pattern(1024) * 50
    assert sum(map(int, completed.stderr.split())) == 1


def test_a_session_is_resumed(plain_server: Daemon, tmp_path: Path) -> None:
    """`openssl s_client` keeps a ticket and comes back with it."""
    session = tmp_path / "session.pem"
    common = [
        peers.program("openssl"), "s_client", "-connect", f"127.0.0.1:{plain_server.port}", "-servername", "localhost",
        "-tls1_3", "-CAfile", str(plain_server.ca), "-verify_return_error", "-ign_eof",
    ]  # fmt: skip
    request = b"GET /small.txt HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    first = peers.run([*common, "-sess_out", str(session)], request)
    assert re.search(rb"^New, TLSv1.3", first.stdout, re.MULTILINE)
    second = peers.run([*common, "-sess_in", str(session)], request)
    assert re.search(rb"^Reused, TLSv1.3", second.stdout, re.MULTILINE)
    assert pattern(1024) in second.stdout


@pytest.mark.parametrize("command", [b"k", b"K"], ids=["update-not-requested", "update-requested"])
def test_key_update_by_the_client(plain_server: Daemon, ktls: str, command: bytes) -> None:
    """s_client sends a KeyUpdate, then a request under the new key; a kernel that cannot rekey ends the connection."""
    follows = ktls == "off" or kernel_tls.probe().rekey
    arguments = [
        peers.program("openssl"), "s_client", "-connect", f"127.0.0.1:{plain_server.port}", "-servername", "localhost",
        "-tls1_3", "-CAfile", str(plain_server.ca), "-verify_return_error",
    ]  # fmt: skip
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
    ) as client:
        assert client.stdin is not None and client.stdout is not None
        say_until(client.stdin, b"", client.stdout, b"Verify return code: 0 (ok)")
        say_until(client.stdin, command + b"\n", client.stdout, b"KEYUPDATE")
        request = b"GET /small.txt HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        if follows:
            say_until(client.stdin, request, client.stdout, pattern(1024).splitlines(keepends=True)[-1])
        client.stdin.close()
        client.stdout.read()
    assert fetch(plain_server.address, plain_server.ca).status == 200


def test_many_at_once(plain_server: Daemon) -> None:
    """32 curl transfers in parallel, each file whole."""
    completed = peers.run([
        peers.program("curl"), "--silent", "--show-error", "--fail", "--ipv4", "--cacert", str(plain_server.ca),
        "--parallel", "--parallel-immediate", "--parallel-max", "32", "--output", "/dev/null",
        "--write-out", "%{size_download}\n", f"https://localhost:{plain_server.port}/large.bin?[1-32]",
    ])  # fmt: skip
    assert completed.stdout.split() == [str((1 << 20) + 1).encode()] * 32


def test_the_made_up_certificate_is_kept_and_verifies(files: Path, tmp_path: Path) -> None:
    """Without --cert the daemon makes one for localhost, 127.0.0.1 and ::1, tells its SHA-256, and uses it again."""
    environment = {"XDG_STATE_HOME": str(tmp_path / "state")}
    fingerprints = set()
    for _ in range(2):
        with serve(files, "--workers", "1", extra_environment=environment) as daemon:
            certificate = tmp_path / "state" / "kdaemon" / "localhost.crt"
            assert fetch(daemon.address, certificate).status == 200
            with MemoryClient(daemon.address, certificate) as client:
                client.handshake(send_finished=True)
                der = client.tls.getpeercert(binary_form=True)
                assert der is not None
                fingerprints.add(hashlib.sha256(der).hexdigest())
            assert fingerprints.copy().pop().encode() in daemon.stderr.lower()
    assert len(fingerprints) == 1
