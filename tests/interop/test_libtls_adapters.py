"""What is built on libtls: the socket-like object, http.client, httpx and requests."""

from __future__ import annotations

import http.client
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import requests
from support.certificates import Issued
from support.content import pattern
from support.daemon import Daemon, serve
from support.waiting import DEADLINE_S

from libtls import Lane, errors
from libtls.http import RequestsAdapter, httpx_transport
from libtls.sock import TlsSocket


@pytest.fixture(scope="module")
def daemon(issued: Issued, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    directory: Path = tmp_path_factory.mktemp("site")
    (directory / "index.html").write_bytes(b"<!doctype html><title>kdaemon</title>\n")
    (directory / "large.bin").write_bytes(pattern(1 << 20))
    with serve(directory, "--workers", "1", issued=issued, ends_by_itself=True) as daemon:
        yield daemon
        daemon.stop()


@pytest.fixture
def lane(daemon: Daemon) -> Iterator[Lane]:
    lane = Lane.attach(str(daemon.stderr_path.parent / "kdaemon.sock"))
    yield lane
    lane.close()


def test_http_client(daemon: Daemon, lane: Lane) -> None:
    connection = http.client.HTTPConnection("localhost", daemon.port)
    connection.sock = TlsSocket.open("localhost", daemon.port, cafile=daemon.ca, timeout=DEADLINE_S, lane=lane)
    for path, size in (("/", 38), ("/large.bin", 1 << 20), ("/", 38)):
        connection.request("GET", path)
        response = connection.getresponse()
        assert response.status == 200
        assert len(response.read()) == size
    connection.close()


def test_httpx(daemon: Daemon, lane: Lane) -> None:
    context = ssl.create_default_context(cafile=str(daemon.ca))
    with httpx.Client(transport=httpx_transport(lane, verify=context)) as client:
        for _ in range(3):
            assert client.get(f"https://localhost:{daemon.port}/large.bin").content == pattern(1 << 20)


def test_httpx_does_not_trust_everybody(daemon: Daemon, lane: Lane) -> None:
    with (
        httpx.Client(transport=httpx_transport(lane, verify=ssl.create_default_context())) as client,
        pytest.raises(httpx.ConnectError, match="trusted authority"),
    ):
        client.get(f"https://localhost:{daemon.port}/")


def test_requests(daemon: Daemon, lane: Lane) -> None:
    with requests.Session() as session:
        session.mount("https://", RequestsAdapter(lane))
        session.trust_env = False  # REQUESTS_CA_BUNDLE would win over what is set here
        session.verify = str(daemon.ca)
        for _ in range(3):
            response = session.get(f"https://localhost:{daemon.port}/large.bin", timeout=DEADLINE_S)
            assert response.content == pattern(1 << 20)
        session.verify = True
        session.close()
        with pytest.raises((requests.ConnectionError, errors.CertificateUntrusted)):
            session.get(f"https://localhost:{daemon.port}/", timeout=DEADLINE_S)


def test_socket_like(daemon: Daemon, lane: Lane) -> None:
    with TlsSocket.open("localhost", daemon.port, cafile=daemon.ca, timeout=DEADLINE_S, lane=lane) as sock:
        assert not sock.readable()
        sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        while not sock.readable():
            pass
        buffer = bytearray(8)
        assert sock.recv_into(buffer) == 8
        assert bytes(buffer) == b"HTTP/1.1"
        assert b"kdaemon" in sock.recv(65536)
        sock.settimeout(0.05)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        with pytest.raises(ValueError, match="aio"):
            sock.settimeout(0)
        sock.settimeout(DEADLINE_S)
        with sock.makefile("rwb") as file:
            file.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            file.flush()
            assert file.read().startswith(b"HTTP/1.1 200 OK")
        assert sock.fileno() == -1
        assert sock.family == socket.AF_INET
