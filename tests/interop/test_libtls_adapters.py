"""What is built on libtls: ways to read, files, the socket-like object, http.client, httpx and requests."""

from __future__ import annotations

import array
import asyncio
import contextlib
import functools
import http.client
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import requests
import urllib3
from cryptography.hazmat.primitives import hashes, serialization
from support.certificates import Issued
from support.content import pattern
from support.daemon import Daemon
from support.rings import Peer, in_thread, server_context
from support.waiting import DEADLINE_S, eventually

from libtls import Lane
from libtls.functions import tls_start
from libtls.http import RequestsAdapter, httpx_transport
from libtls.http_async import httpx_async_transport
from libtls.sock import TlsSocket


@pytest.fixture
def lane(daemon: Daemon) -> Iterator[Lane]:
    lane = Lane.attach(daemon.socket_path)
    yield lane
    lane.close()


def test_ways_to_read(daemon: Daemon, lane: Lane, peer: Peer) -> None:
    """In the ring's arena without a copy, into a buffer of the program's, and as files."""
    connection, accepted = peer.meet(lane)
    starting = tls_start(connection, "localhost", cafile=daemon.ca)
    assert daemon.issued is not None
    tls = server_context(daemon.issued).wrap_socket(accepted, server_side=True)
    starting.wait(DEADLINE_S)
    tls.sendall(b"in the arena")
    with connection.read_operation() as operation:
        operation.wait(DEADLINE_S)
        with operation.view() as view:
            assert view == b"in the arena"
            with pytest.raises(BufferError):
                operation.destroy()
        operation.destroy()
    tls.sendall(b"into a buffer")
    buffer = array.array("H", bytes(8))
    assert connection.readinto(memoryview(buffer)[1:3], timeout=DEADLINE_S) == 4
    assert buffer.tobytes() == b"\0\0into\0\0"
    assert connection.readinto(bytearray(), timeout=DEADLINE_S) == 0
    assert connection.read(timeout=DEADLINE_S) == b" a buffer"
    file = connection.makefile()
    file.write(b"a line\n")
    file.flush()
    assert tls.recv(100) == b"a line\n"
    tls.sendall(b"one\ntwo\nthree")
    assert file.readline() == b"one\n"
    assert file.readline() == b"two\n"
    assert file.read(5) == b"three"
    file.close()
    connection.write(b"still open")
    assert tls.recv(100) == b"still open"
    connection.close()
    tls.close()


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


def requests_session(lane: Lane, verify: Path | bool) -> requests.Session:
    session = requests.Session()
    session.mount("https://", RequestsAdapter(lane))
    session.trust_env = False  # REQUESTS_CA_BUNDLE would win over what is set here
    session.verify = str(verify) if isinstance(verify, Path) else verify
    return session


def test_requests(daemon: Daemon, lane: Lane) -> None:
    with requests_session(lane, daemon.ca) as session:
        for _ in range(3):
            response = session.get(f"https://localhost:{daemon.port}/large.bin", timeout=DEADLINE_S)
            assert response.content == pattern(1 << 20)
        with session.get(f"https://localhost:{daemon.port}/large.bin", stream=True, timeout=DEADLINE_S) as response:
            assert b"".join(response.iter_content(10_000)) == pattern(1 << 20)


def test_requests_errors(daemon: Daemon, lane: Lane, peer: Peer, tmp_path: Path) -> None:
    """They are requests' own, as with its own sockets."""
    page = f"https://localhost:{daemon.port}/"
    nobody = f"https://127.0.0.1:{peer.port}/"
    with requests_session(lane, True) as session:
        with pytest.raises(requests.exceptions.SSLError, match="trusted authority"):
            session.get(page, timeout=DEADLINE_S)
        with pytest.raises(requests.exceptions.ConnectTimeout):
            session.get(nobody, timeout=0.2)  # says nothing
        session.verify = str(tmp_path)
        with pytest.raises(requests.exceptions.SSLError, match="directory"):
            session.get(page, timeout=DEADLINE_S)
        session.verify = str(daemon.ca)
        assert daemon.issued is not None
        with pytest.raises(requests.exceptions.SSLError, match="client's certificate"):
            session.get(page, timeout=DEADLINE_S, cert=(str(daemon.issued.certificate), str(daemon.issued.key)))
        with pytest.raises(requests.exceptions.ConnectionError, match="Failed to resolve"):
            session.get("https://no-such-host.invalid/", timeout=DEADLINE_S)
        peer.listener.close()
        with pytest.raises(requests.exceptions.ConnectionError, match="refused"):
            session.get(nobody, timeout=DEADLINE_S)
        with pytest.raises(requests.exceptions.ProxyError):
            session.get(page, timeout=DEADLINE_S, proxies={"https": f"http://127.0.0.1:{peer.port}"})


def test_a_fingerprint_is_asserted(daemon: Daemon, lane: Lane) -> None:
    assert daemon.issued is not None
    right = daemon.issued.x509.fingerprint(hashes.SHA256()).hex()
    for fingerprint, answers in ((right, True), ("00" + right[2:], right[:2] == "00")):
        pool = RequestsAdapter(lane).poolmanager.connection_from_url(
            f"https://localhost:{daemon.port}/", {"assert_fingerprint": fingerprint, "ca_certs": str(daemon.ca)}
        )
        if answers:
            assert pool.request("GET", "/", retries=False).status == 200
        else:
            with pytest.raises(urllib3.exceptions.SSLError, match="did not match"):
                pool.request("GET", "/", retries=False)
        pool.close()


class KeepAlive:
    """An HTTPS server by Python's ssl: answers every request, and closes all connections when it is told to."""

    def __init__(self, issued: Issued) -> None:
        self.context = server_context(issued)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://localhost:{self.listener.getsockname()[1]}/"
        self.connections: list[ssl.SSLSocket] = []
        self.silent = False
        self.thread = in_thread(self._run)

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                plain, _ = self.listener.accept()
                in_thread(functools.partial(self._serve, plain))

    def _serve(self, plain: socket.socket) -> None:
        with contextlib.suppress(OSError):
            tls = self.context.wrap_socket(plain, server_side=True)
            self.connections.append(tls)
            while tls.recv(65536):
                if not self.silent:
                    tls.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    def close_idle(self) -> None:
        """With FIN alone, as a server that has crashed or is in a hurry."""
        for connection in self.connections:
            with contextlib.suppress(OSError):  # it is closed already
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(DEADLINE_S)
        self.close_idle()


@pytest.fixture
def server(issued: Issued) -> Iterator[KeepAlive]:
    server = KeepAlive(issued)
    yield server
    server.close()


def nothing_in_flight(lane: Lane) -> bool:
    lane.ring.reap()
    return lane.ring.in_flight == 0


def test_requests_notices_that_an_idle_connection_was_closed(daemon: Daemon, lane: Lane, server: KeepAlive) -> None:
    with requests_session(lane, daemon.ca) as session:
        for opened in (1, 2):
            for _ in range(3):
                assert session.get(server.url, timeout=DEADLINE_S).text == "ok"
            assert len(server.connections) == opened
            server.close_idle()
            eventually(lambda: nothing_in_flight(lane), "the end is here")
        server.silent = True
        with pytest.raises(requests.exceptions.ReadTimeout):
            session.get(server.url, timeout=(DEADLINE_S, 0.2))


def test_httpx_notices_that_an_idle_connection_was_closed(daemon: Daemon, lane: Lane, server: KeepAlive) -> None:
    context = ssl.create_default_context(cafile=str(daemon.ca))
    with httpx.Client(transport=httpx_transport(lane, verify=context), timeout=DEADLINE_S) as client:
        for opened in (1, 2):
            for _ in range(3):
                assert client.get(server.url).text == "ok"
            assert len(server.connections) == opened
            server.close_idle()
            eventually(lambda: nothing_in_flight(lane), "the end is here")
        server.silent = True
        with pytest.raises(httpx.ReadTimeout):
            client.get(server.url, timeout=0.2)


def test_httpx_async_notices_that_an_idle_connection_was_closed(daemon: Daemon, lane: Lane, server: KeepAlive) -> None:
    async def main() -> None:
        context = ssl.create_default_context(cafile=str(daemon.ca))
        transport = httpx_async_transport(lane, verify=context)
        async with asyncio.timeout(DEADLINE_S), httpx.AsyncClient(transport=transport, timeout=DEADLINE_S) as client:
            for opened in (1, 2):
                for _ in range(3):
                    assert (await client.get(server.url)).text == "ok"
                assert len(server.connections) == opened
                server.close_idle()
                while not nothing_in_flight(lane):
                    await asyncio.sleep(0)

    asyncio.run(main())


def test_socket_like(daemon: Daemon, lane: Lane) -> None:
    options = {"cafile": daemon.ca, "timeout": DEADLINE_S, "alpn": ["http/1.1"], "lane": lane}
    with TlsSocket.open("localhost", daemon.port, **options) as sock:  # type: ignore[arg-type]
        assert not sock.readable()
        sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        eventually(sock.readable, "the answer is there")
        buffer = bytearray(8)
        assert sock.recv_into(buffer) == 8
        assert bytes(buffer) == b"HTTP/1.1"
        assert b"kdaemon" in sock.recv(65536)
        sock.settimeout(0.05)
        with pytest.raises(socket.timeout):
            sock.recv(1)
        with pytest.raises(ValueError, match="aio"):
            sock.settimeout(0)
        with pytest.raises(ValueError, match="flags"):
            sock.recv(1, socket.MSG_PEEK)
        with pytest.raises(ValueError, match="flags"):
            sock.sendall(b"x", socket.MSG_OOB)
        sock.settimeout(DEADLINE_S)
        with sock.makefile("rwb") as file:
            file.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            file.flush()
            assert file.read().startswith(b"HTTP/1.1 200 OK")
        assert sock.recv(1) == b""
    assert sock.readable()
    with pytest.raises(OSError, match="closed"):
        sock.recv(1)


def test_what_a_socket_knows(daemon: Daemon, lane: Lane) -> None:
    options = {"cafile": daemon.ca, "timeout": DEADLINE_S, "alpn": ["http/1.1"], "lane": lane}
    sock = TlsSocket.open("localhost", daemon.port, **options)  # type: ignore[arg-type]
    assert sock.fileno() == -1
    assert (sock.family, sock.type) == (socket.AF_INET, socket.SOCK_STREAM)
    assert sock.getpeername() == ("127.0.0.1", daemon.port)
    assert sock.getsockname()[0] == "127.0.0.1"
    assert (sock.version(), sock.selected_alpn_protocol(), sock.compression()) == ("TLSv1.3", "http/1.1", None)
    cipher = sock.cipher()
    assert cipher is not None
    assert cipher[0].startswith("TLS_")
    assert daemon.issued is not None
    assert sock.getpeercert(binary_form=True) == daemon.issued.x509.public_bytes(serialization.Encoding.DER)
    assert ("DNS", "localhost") in sock.getpeercert()["subjectAltName"]
    lane.close()
    assert sock.readable(), "as an error is"
    sock.close()


def test_files_of_a_socket(daemon: Daemon, lane: Lane) -> None:
    """Text and binary, one way and both; the connection is closed with the last of them."""
    sock = TlsSocket.open("localhost", daemon.port, cafile=daemon.ca, timeout=DEADLINE_S, lane=lane)
    with pytest.raises(ValueError, match="mode"):
        sock.makefile("a")
    with pytest.raises(ValueError, match="binary"):
        sock.makefile("r", 0)
    unbuffered = sock.makefile("wb", 0)
    text = sock.makefile("r", encoding="ascii", newline="")
    binary = sock.makefile("rb")
    sock.close()
    unbuffered.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")  # type: ignore[attr-defined]
    assert text.readline() == "HTTP/1.1 200 OK\r\n"
    text.close()
    unbuffered.close()
    assert binary.read() == b""  # type: ignore[attr-defined]
    binary.close()
    with pytest.raises(OSError, match="closed"):
        sock.connection.read()
