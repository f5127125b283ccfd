"""record_size_limit (RFC 8449) on the wire: daemon and `kdaemon connect` against our client, GnuTLS and tlslite-ng."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.certificates import Issued
from support.clients import parse_response
from support.content import pattern
from support.daemon import Daemon, serve
from support.peers import program, run
from support.waiting import DEADLINE_S, eventually
from tlslite.api import HandshakeSettings, TLSConnection

from kdaemon import ktls
from kdaemon.socket_records import UserRecords
from kdaemon.tls.certificates import TrustStore
from kdaemon.tls.client import ClientHandshake
from kdaemon.tls.configuration import ClientConfig

FILES = {"empty.bin": 0, "small.txt": 1024, "one.bin": 16384, "large.bin": 300_001}
OVERHEAD = 17  # content type and tag


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    for name, size in FILES.items():
        (directory / name).write_bytes(pattern(size))
    return directory


@pytest.fixture(
    scope="module",
    params=[
        "off",
        pytest.param("auto", marks=pytest.mark.guest),
        pytest.param("require", marks=[pytest.mark.guest, pytest.mark.slow]),
    ],
)
def policy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def daemon(policy: str, site: Path, issued: Issued) -> Iterator[Daemon]:
    with serve(site, "--workers", "1", "--ktls", policy, issued=issued) as daemon:
        yield daemon


def content_max(policy: str, limit: int | None) -> int:
    """Of the daemon's records. A kernel that makes no smaller ones and is required: the limit is not negotiated."""
    if limit is None or (policy == "require" and not ktls.probe().tx_max_payload):
        return 16384
    return limit - 1


def request_for(path: str) -> bytes:
    return f"GET /{path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()


def fetch_limited(daemon: Daemon, path: str, limit: int | None) -> tuple[bytes, list[int]]:
    """With our client engine: (body, sizes of the records' content)."""
    trust = TrustStore.from_pem(daemon.ca.read_bytes())
    config = ClientConfig(verify=trust.verify_server, record_size_limit=limit, alpn=(b"http/1.1",))
    handshake = ClientHandshake(config, "localhost", random=os.urandom, now_s=time.time())
    with socket.create_connection(daemon.address, DEADLINE_S) as sock:
        while not handshake.complete:
            sock.sendall(handshake.data_to_send())
            handshake.receive(sock.recv(65536))
        sock.sendall(handshake.data_to_send())
        records = UserRecords(sock, handshake.established)
        records.send(23, request_for(path))
        sizes, data, content_type = [], b"", 0
        while content_type != 21:  # close_notify
            received = records.receive()
            assert received is not None, "truncated"
            content_type, content = received
            if content_type == 23:
                sizes.append(len(content))
                data += content
    response = parse_response(data)
    assert response.status == 200
    return response.body, sizes


@pytest.mark.parametrize("limit", [64, 513, 16385, None])
@pytest.mark.parametrize("path", FILES)
def test_our_client_gets_no_larger_record(daemon: Daemon, policy: str, path: str, limit: int | None) -> None:
    body, sizes = fetch_limited(daemon, path, limit)
    assert body == pattern(FILES[path])
    assert max(sizes) <= content_max(policy, limit)
    if FILES[path] > 16384:
        assert max(sizes) == content_max(policy, limit)


@contextmanager
def relay(target: tuple[str, int]) -> Iterator[tuple[int, list[int], list[int]]]:
    """Passes one connection on: (its port, sizes of the client's and of the server's protected records)."""
    sizes: tuple[list[int], list[int]] = ([], [])

    def records(data: bytearray, into: list[int]) -> None:
        while len(data) >= 5 and len(data) >= 5 + (size := int.from_bytes(data[3:5], "big")):
            if data[0] == 23:
                into.append(size)
            del data[: 5 + size]

    def pump(source: socket.socket, sink: socket.socket, into: list[int]) -> None:
        held = bytearray()
        try:
            while data := source.recv(65536):
                held += data
                records(held, into)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # either end may leave first; what was said is what the test looks at

    def run_relay() -> None:
        client, _ = listener.accept()
        with client, socket.create_connection(target, DEADLINE_S) as server:
            client.settimeout(DEADLINE_S)
            other = threading.Thread(target=pump, args=(server, client, sizes[1]))
            other.start()
            pump(client, server, sizes[0])
            other.join(DEADLINE_S)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(DEADLINE_S)
        thread = threading.Thread(target=run_relay)
        thread.start()
        try:
            yield listener.getsockname()[1], *sizes
        finally:
            thread.join(DEADLINE_S)


def test_gnutls_client(daemon: Daemon, policy: str) -> None:
    size = 700
    with relay(daemon.address) as (port, _, from_server):
        completed = run([
            program("gnutls-cli"), "--logfile", "/dev/stderr", "--x509cafile", str(daemon.ca),
            "--recordsize", str(size), "--sni-hostname", "localhost", "--verify-hostname", "localhost",
            "--port", str(port), "127.0.0.1",
        ], request_for("one.bin"))  # fmt: skip
    assert parse_response(completed.stdout).body == pattern(16384)
    assert max(from_server) == content_max(policy, size + 1) + OVERHEAD


@pytest.mark.parametrize("limit", [64, 700])
def test_tlslite_client(daemon: Daemon, policy: str, limit: int) -> None:
    settings = HandshakeSettings()
    settings.minVersion = settings.maxVersion = (3, 4)
    settings.record_size_limit = limit
    with relay(daemon.address) as (port, _, from_server), socket.create_connection(("127.0.0.1", port)) as sock:
        sock.settimeout(DEADLINE_S)
        client = TLSConnection(sock)
        client.handshakeClientCert(serverName="localhost", settings=settings)
        client.sendall(request_for("one.bin"))
        data = b""
        while piece := client.recv(65536):
            data += bytes(piece)
    assert parse_response(data).body == pattern(16384)
    assert max(from_server) == content_max(policy, limit) + OVERHEAD


@pytest.mark.parametrize("policy", ["off", pytest.param("auto", marks=pytest.mark.guest)])
def test_connect_to_a_gnutls_server(issued: Issued, tmp_path: Path, policy: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        server_port = probe.getsockname()[1]
    command = [
        program("gnutls-serv"), "--echo", "--recordsize", "600", "--port", str(server_port), "--disable-client-cert",
        "--x509certfile", str(issued.certificate), "--x509keyfile", str(issued.key),
        "--priority", "NORMAL:-VERS-ALL:+VERS-TLS1.3",
    ]  # fmt: skip
    data = pattern(9000).replace(b"\0", b"x")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            eventually(lambda: _accepts(server_port), "gnutls-serv accepts")
            with relay(("127.0.0.1", server_port)) as (port, from_client, _):
                completed = subprocess.run(
                    [
                        sys.executable, "-m", "kdaemon", "connect", f"127.0.0.1:{port}", "--ktls", policy,
                        "--cafile", str(issued.ca), "--servername", "localhost",
                    ],
                    input=data, capture_output=True, timeout=DEADLINE_S, check=False,
                )  # fmt: skip
        finally:
            server.kill()
    assert completed.stdout == data, completed.stderr
    assert max(from_client) == 600 + OVERHEAD


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), DEADLINE_S).close()
    except ConnectionRefusedError:
        return False
    return True
