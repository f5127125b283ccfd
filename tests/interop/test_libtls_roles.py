"""libtls against a real daemon: both roles, real peers, user mode here and the kernel's record layer in the guests."""

from __future__ import annotations

import hashlib
import itertools
import os
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator

import pytest
from kdaemon_pyx import client_abi as abi
from support.certificates import Issued
from support.content import pattern
from support.daemon import Daemon, descriptor_count, serve, status
from support.layers import has_end
from support.waiting import DEADLINE_S, eventually

from libtls import Lane, TlsError, errors
from libtls.connection import Connection, Listener
from libtls.functions import tls_connect, tls_listen, tls_open, tls_start


@pytest.fixture(scope="module", params=["off", pytest.param("require", marks=pytest.mark.guest)])
def daemon(
    request: pytest.FixtureRequest, issued: Issued, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Daemon]:
    """One daemon for all tests of a record layer; at its end every connection must be gone."""
    directory = tmp_path_factory.mktemp("site")
    (directory / "index.html").write_bytes(b"<!doctype html><title>kdaemon</title>\n")
    (directory / "large.bin").write_bytes(pattern(8 << 20))
    with serve(directory, "--workers", "1", "--ktls", request.param, issued=issued) as daemon:
        # The first connection starts the thread that resolves and connects, which keeps two sockets of its own.
        lane = Lane.attach(daemon.socket_path)
        tls_open("localhost", daemon.port, cafile=daemon.ca, lane=lane).wait(DEADLINE_S).close()
        lane.close()
        eventually(lambda: is_idle(daemon), "the first client is gone")
        daemon.descriptors_at_start = descriptor_count(daemon.pids)
        yield daemon


def is_idle(daemon: Daemon) -> bool:
    report = status(daemon)
    workers = report["workers"]
    assert isinstance(workers, list)
    return not report["clients"] and all(worker["connections"] == 0 for worker in workers)


@pytest.fixture
def lane(daemon: Daemon) -> Iterator[Lane]:
    lane = Lane.attach(daemon.socket_path)
    yield lane
    lane.close()
    eventually(lambda: not status(daemon)["clients"], "the client is detached")


@pytest.fixture
def listener(lane: Lane) -> Listener:
    return tls_listen(certificate="localhost", alpn=["echo"], lane=lane).wait(DEADLINE_S)


def in_thread(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def dial(daemon: Daemon, listener: Listener) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=str(daemon.ca))
    context.set_alpn_protocols(["echo"])
    plain = socket.create_connection(("127.0.0.1", listener.port), DEADLINE_S)
    return context.wrap_socket(plain, server_hostname="localhost")


def pair(daemon: Daemon, listener: Listener) -> tuple[ssl.SSLSocket, Connection]:
    accept = listener.accept_operation()
    peer = dial(daemon, listener)
    return peer, accept.wait(DEADLINE_S)


def test_a_program_serves_tls_with_nothing_but_libtls(daemon: Daemon, listener: Listener) -> None:
    """`openssl s_client` talks to it."""
    accept = listener.accept_operation()
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{listener.port}", "-CAfile", str(daemon.ca)]
    command += ["-verify_return_error", "-verify_hostname", "localhost", "-servername", "localhost", "-alpn", "echo"]
    command += ["-ciphersuites", "TLS_AES_128_GCM_SHA256", "-groups", "P-256"]
    with subprocess.Popen(
        [*command, "-quiet"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        client.stdin.write(b"a question\n")
        client.stdin.flush()
        with accept.wait(DEADLINE_S) as connection:
            assert connection.read() == b"a question\n"
            connection.write(b"an answer\n")
            assert client.stdout.readline() == b"an answer\n"
            info = connection.info()
        assert client.wait(DEADLINE_S) == 0
    assert info.alpn == "echo"
    assert info.server_name == "localhost"
    assert info.version == "TLSv1.3"
    assert (info.record_layer, info.record_layer_reason) == (daemon.ready[0].backend, daemon.ready[0].reason)
    assert (info.cipher_suite, info.named_group) == (0x1301, 23)
    assert not info.resumed


def test_a_page_is_fetched_through_the_daemon(daemon: Daemon, lane: Lane) -> None:
    with tls_open("localhost", daemon.port, cafile=daemon.ca, alpn=["http/1.1"], lane=lane).wait(DEADLINE_S) as page:
        page.write(b"GET /large.bin HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        head, _, body = page.makefile().read().partition(b"\r\n\r\n")
        assert page.info().peer_certificate
    assert head.startswith(b"HTTP/1.1 200 OK")
    assert body == pattern(8 << 20)


def stream(megabytes: int) -> Iterator[bytes]:
    """Random megabytes, no two alike, without holding them all."""
    block = os.urandom((1 << 20) - 8)
    for number in range(megabytes):
        yield number.to_bytes(8, "big") + block


def send_all(write: Callable[[bytes], object], megabytes: int, sent: hashlib._Hash) -> None:
    for piece in stream(megabytes):
        sent.update(piece)
        write(piece)


def receive_all(read: Callable[[int], bytes], megabytes: int, received: hashlib._Hash) -> None:
    left = megabytes << 20
    while left:
        piece = read(min(left, 1 << 18))
        assert piece
        received.update(piece)
        left -= len(piece)


@pytest.mark.parametrize("megabytes", [16, pytest.param(1024, marks=pytest.mark.slow)])
def test_bulk_each_way(daemon: Daemon, listener: Listener, megabytes: int) -> None:
    """`openssl s_client` and the program, both directions at the same time: equal SHA-256 of what was sent and came."""
    accept = listener.accept_operation()
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{listener.port}", "-CAfile", str(daemon.ca), "-quiet"]
    with subprocess.Popen(
        [*command, "-alpn", "echo"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        connection = accept.wait(DEADLINE_S)
        sent, came, sent_back, came_back = (hashlib.sha256() for _ in range(4))
        threads = [
            in_thread(lambda: (send_all(client.stdin.write, megabytes, sent), client.stdin.flush())),
            in_thread(lambda: receive_all(connection.read, megabytes, came)),
            in_thread(lambda: send_all(connection.write, megabytes, sent_back)),
            in_thread(lambda: receive_all(client.stdout.read, megabytes, came_back)),
        ]
        for thread in threads:
            thread.join(DEADLINE_S * 10)
        client.stdin.close()
        assert sent.digest() == came.digest()
        assert sent_back.digest() == came_back.digest()
        connection.close()


def test_both_ends_through_the_daemon(daemon: Daemon, lane: Lane, listener: Listener) -> None:
    accept = listener.accept_operation()
    client = tls_open("127.0.0.1", listener.port, cafile=daemon.ca, alpn=["echo"], lane=lane).wait(DEADLINE_S)
    server = accept.wait(DEADLINE_S)
    for size in (1, 1000, 16384, 16385, 200_000):
        data = os.urandom(size)
        write = client.write_operation(data)
        got = b""
        while len(got) < size:
            got += server.read()
        assert got == data
        assert write.wait(DEADLINE_S) == size
    client.close()
    assert server.read() == b""
    server.close()


def test_connect_then_start_tls(daemon: Daemon, lane: Lane) -> None:
    connection = tls_connect("localhost", daemon.port, lane=lane).wait(DEADLINE_S)
    tls_start(connection, "localhost", cafile=daemon.ca, alpn=["http/1.1"]).wait(DEADLINE_S)
    connection.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert connection.read().startswith(b"HTTP/1.1 200 OK")
    connection.close()


def test_shutdown_of_one_direction(daemon: Daemon, listener: Listener) -> None:
    """close_notify goes out, reading goes on (RFC 8446 section 6.1)."""
    peer, connection = pair(daemon, listener)
    connection.write(b"that is all")
    connection.shutdown()
    assert peer.recv(100) == b"that is all"
    assert peer.recv(100) == b""
    peer.sendall(b"I have more")
    assert connection.read() == b"I have more"
    with pytest.raises(errors.BrokenConnection):
        connection.write(b"x")
    connection.close()
    peer.close()


def test_end_of_data_comes_after_data_that_nobody_asked_for_yet(daemon: Daemon, listener: Listener) -> None:
    peer, connection = pair(daemon, listener)
    peer.sendall(b"late reader")
    goodbye = in_thread(lambda: peer.unwrap().close())  # returns when our close_notify is there, too
    assert connection.read(4) == b"late"
    assert connection.read() == b" reader"
    assert connection.read() == b""
    assert connection.read() == b""
    connection.close()
    goodbye.join(DEADLINE_S)


@pytest.mark.parametrize("ends_well", [True, False], ids=["close_notify", "truncated"])
def test_data_and_its_end_are_there_before_anybody_reads(daemon: Daemon, listener: Listener, ends_well: bool) -> None:
    peer, connection = pair(daemon, listener)
    ends = peer.getpeername(), peer.getsockname()
    peer.sendall(b"all of it")
    if ends_well:
        peer.settimeout(0)
        with pytest.raises(ssl.SSLWantReadError):  # our close_notify is out, the other's not there
            peer.unwrap()
    # Without OpenSSL, which would say goodbye.
    with socket.socket(fileno=os.dup(peer.fileno())) as plain:
        plain.shutdown(socket.SHUT_WR)
    eventually(lambda: has_end(*ends), "the FIN is there")
    connection.lane.run(abi.NOP)  # the connection's thread has seen it, too
    assert connection.read(timeout=DEADLINE_S) == b"all of it"
    for _ in range(2):
        if ends_well:
            assert connection.read(timeout=DEADLINE_S) == b""
        else:
            with pytest.raises(errors.Truncated, match="close_notify"):
                connection.read(timeout=DEADLINE_S)
    connection.close()
    peer.close()


def test_a_flood_and_its_end_for_reads_of_every_size(daemon: Daemon, listener: Listener) -> None:
    """Records end within READs, READs within records, and both together; the end comes last."""
    peer, connection = pair(daemon, listener)
    sent, came, megabytes = hashlib.sha256(), hashlib.sha256(), 16
    flood = in_thread(lambda: (send_all(peer.sendall, megabytes, sent), peer.unwrap().close()))
    sizes = itertools.cycle([1, 16384, 1 << 20, 100, 65536, 1 << 18, 16383, 3 << 19])
    while piece := connection.read(next(sizes), timeout=DEADLINE_S):
        came.update(piece)
    assert connection.read(timeout=DEADLINE_S) == b""
    connection.close()
    flood.join(DEADLINE_S)
    assert came.digest() == sent.digest()


def test_truncation_is_not_an_end(daemon: Daemon, listener: Listener) -> None:
    peer, connection = pair(daemon, listener)
    peer.sendall(b"half a")
    socket.socket(fileno=peer.detach()).close()
    assert connection.read() == b"half a"
    with pytest.raises(errors.Truncated, match="close_notify"):
        connection.read()
    connection.close()


def test_write_to_a_peer_that_does_not_read(daemon: Daemon, listener: Listener) -> None:
    """Its deadline passes midway: a short count, and what was queued behind it does not leave a hole."""
    peer, connection = pair(daemon, listener)
    first = connection.write_operation(bytes(8 << 20), timeout=1.0)
    behind = connection.write_operation(b"behind")
    moved = first.wait(DEADLINE_S)
    assert 0 < moved < 8 << 20
    with pytest.raises(errors.Cancelled):
        behind.wait(DEADLINE_S)
    received = 0
    while received < moved:
        received += len(peer.recv(1 << 16))
    assert received == moved
    connection.close(timeout=5)
    peer.close()


def test_barrier(daemon: Daemon, listener: Listener) -> None:
    peer, connection = pair(daemon, listener)
    read = connection.read_operation()
    barrier = connection.barrier_operation()
    write = connection.write_operation(b"after")
    assert not write.done
    peer.sendall(b"before")
    assert read.wait(DEADLINE_S) == b"before"
    assert barrier.wait(DEADLINE_S) == 0
    assert write.wait(DEADLINE_S) == 5
    assert peer.recv(10) == b"after"
    connection.close()
    peer.close()


def test_a_busy_connection_starves_no_other(daemon: Daemon, lane: Lane, listener: Listener) -> None:
    """One that moves as much as it can, as long as it takes another one of the same program to be answered 50 times."""

    def both_ends() -> tuple[Connection, Connection]:
        accept = listener.accept_operation()
        client = tls_open("localhost", listener.port, cafile=daemon.ca, alpn=["echo"], lane=lane).wait(DEADLINE_S)
        return client, accept.wait(DEADLINE_S)

    (source, sink), (asks, answers) = both_ends(), both_ends()
    done = threading.Event()

    def pour() -> None:
        while not done.is_set():
            source.write(bytes(1 << 20))
        source.close()

    def drain() -> None:
        while sink.read(1 << 20):
            pass
        sink.close()

    threads = [threading.Thread(target=pour), threading.Thread(target=drain)]
    for thread in threads:
        thread.start()
    try:
        for number in range(50):
            asks.write(b"%d" % number)
            answers.write(b"answer to " + answers.read(timeout=DEADLINE_S))
            assert asks.read(timeout=DEADLINE_S) == b"answer to %d" % number
    finally:
        done.set()
        for thread in threads:
            thread.join(DEADLINE_S)
    assert not any(thread.is_alive() for thread in threads)
    asks.close()
    answers.close()


def test_many_connections_at_once(daemon: Daemon, lane: Lane, listener: Listener) -> None:
    accepts = [listener.accept_operation() for _ in range(50)]
    opens = [tls_open("127.0.0.1", listener.port, cafile=daemon.ca, alpn=["echo"], lane=lane) for _ in range(50)]
    clients = [operation.wait(DEADLINE_S) for operation in opens]
    servers = [operation.wait(DEADLINE_S) for operation in accepts]
    reads = [server.read_operation() for server in servers]
    for number, client in enumerate(clients):
        client.write(b"%d" % number)
    assert sorted(int(read.wait(DEADLINE_S)) for read in reads) == list(range(50))
    for connection in (*clients, *servers):
        connection.close()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, errors.CertificateUntrusted),
        ({"server_name": "wrong.example", "trusted": True}, errors.CertificateNameMismatch),
        ({"alpn": ["spdy"], "trusted": True}, errors.AlertReceived),
    ],
)
def test_refused_handshakes(
    daemon: Daemon, lane: Lane, listener: Listener, options: dict[str, object], expected: type[TlsError]
) -> None:
    trusted = {"cafile": daemon.ca} if options.pop("trusted", False) else {}
    with pytest.raises(expected):
        tls_open("127.0.0.1", listener.port, lane=lane, **trusted, **options).wait(DEADLINE_S)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ({"expired": True}, errors.CertificateExpired),
        ({"names": ("other.example",)}, errors.CertificateNameMismatch),
    ],
)
def test_bad_certificates(
    lane: Lane,
    make_issued: Callable[..., Issued],
    made: dict[str, object],
    expected: type[TlsError],
) -> None:
    """Presented by another server."""
    issued = make_issued(**made)
    with tls_server(issued) as port, pytest.raises(expected):
        tls_open("localhost", port, cafile=issued.ca, lane=lane).wait(DEADLINE_S)


class tls_server:
    """A server that shakes hands with whoever comes, by Python's ssl."""

    def __init__(self, issued: Issued) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(issued.certificate, issued.key)

    def __enter__(self) -> int:
        self.listener = socket.create_server(("localhost", 0))
        self.thread = in_thread(self.run)
        return int(self.listener.getsockname()[1])

    def run(self) -> None:
        while True:
            try:
                plain, _ = self.listener.accept()
            except OSError:
                return
            try:
                self.context.wrap_socket(plain, server_side=True).close()
            except OSError:
                plain.close()

    def __exit__(self, *_: object) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(DEADLINE_S)


def test_hosts_that_do_not_answer(lane: Lane) -> None:
    with pytest.raises(errors.NameNotResolved):
        tls_open("no-such-host.invalid", 443, lane=lane).wait(DEADLINE_S)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(errors.ConnectionRefused):
        tls_open("127.0.0.1", port, lane=lane).wait(DEADLINE_S)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(errors.DeadlinePassed):
        tls_open("127.0.0.1", silent.getsockname()[1], timeout=0.2, lane=lane).wait(DEADLINE_S)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        operation = tls_open("127.0.0.1", silent.getsockname()[1], lane=lane)
        silent.accept()[0].close()
        with pytest.raises(TlsError):
            operation.wait(DEADLINE_S)


def test_listen_errors(lane: Lane, listener: Listener) -> None:
    with pytest.raises(OSError, match="No such file"):
        tls_listen(certificate="nobody.example", lane=lane).wait(DEADLINE_S)
    with pytest.raises(OSError, match="in use"):
        tls_listen(port=listener.port, lane=lane).wait(DEADLINE_S)
    with pytest.raises(OSError, match="Invalid argument"):
        tls_listen("not an address", lane=lane).wait(DEADLINE_S)


def test_double_close_and_use_after_close(daemon: Daemon, lane: Lane, listener: Listener) -> None:
    peer, connection = pair(daemon, listener)
    stale = Connection(lane, connection.handle)
    connection.close()
    connection.close()
    for use in (stale.read, lambda: stale.write(b"x"), stale.close):
        with pytest.raises(errors.ConnectionClosed):
            use()
    peer.close()


def test_destroy_in_flight_is_refused(daemon: Daemon, listener: Listener) -> None:
    peer, connection = pair(daemon, listener)
    read = connection.read_operation()
    with pytest.raises(BlockingIOError, match="in flight"):
        read.destroy()
    with read:
        pass
    assert read.done
    read.destroy()
    connection.close()
    peer.close()


def test_a_user_mode_write_is_sealed_once(daemon: Daemon, listener: Listener) -> None:
    """The program may reuse its buffer as soon as the operation is posted."""
    peer, connection = pair(daemon, listener)
    buffer = bytearray(b"first" * 1000)
    write = connection.write_operation(buffer)
    buffer[:] = b"other" * 1000
    received = b""
    while len(received) < 5000:
        received += peer.recv(8192)
    assert received == b"first" * 1000
    assert write.wait(DEADLINE_S) == 5000
    connection.close()
    peer.close()
