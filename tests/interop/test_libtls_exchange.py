"""ADOPT and EXPORT: in user mode here, with the kernel's records in guests.

Whatever hands a connection over, no byte of it is lost.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import peers
from support.certificates import Issued
from support.content import pattern
from support.daemon import Daemon
from support.layers import record_layer
from support.rings import Peer, in_thread, layer, read_exactly, worker
from support.waiting import DEADLINE_S, say_until

from libtls import Lane, TlsError
from libtls.connection import Connection, Listener
from libtls.exchange import KtlsSocket, tls_adopt, tls_export
from libtls.functions import tls_listen, tls_open, tls_start

SOL_TLS, TLS_SET_RECORD_TYPE, TLS_GET_RECORD_TYPE = 282, 1, 2  # linux/tls.h
ALERT, CLOSE_NOTIFY = 21, bytes([1, 0])  # RFC 8446 section 6.1

# ADOPT


def adopted(daemon: Daemon, lane: Lane) -> tuple[Connection, tuple[str, int], tuple[str, int]]:
    with socket.create_connection(("127.0.0.1", daemon.port), DEADLINE_S) as plain:
        connection = tls_adopt(plain, lane=lane).wait(DEADLINE_S)
        return connection, plain.getsockname(), plain.getpeername()


@pytest.mark.guest_core
def test_adopt_as_client(daemon: Daemon, lane: Lane) -> None:
    connection, *names = adopted(daemon, lane)
    assert record_layer(*names) == "none"
    tls_start(connection, "localhost", cafile=daemon.ca, alpn=["http/1.1"]).wait(DEADLINE_S)
    assert record_layer(*names) == layer(daemon)
    connection.write(b"GET /page HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert connection.makefile().read().endswith(pattern(100_000))
    connection.close()


@pytest.mark.parametrize("blocking", [True, False])
def test_adopt_as_server(daemon: Daemon, lane: Lane, peer: Peer, blocking: bool) -> None:
    """The program accepts, the daemon does TLS. Whether the socket blocks does not matter."""
    client = socket.create_connection(("127.0.0.1", peer.port), DEADLINE_S)
    accepted, _ = peer.listener.accept()
    accepted.setblocking(blocking)
    connection = tls_adopt(accepted.fileno(), lane=lane).wait(DEADLINE_S)
    accepted.close()
    starting = tls_start(connection, server_side=True, certificate="localhost")
    context = ssl.create_default_context(cafile=str(daemon.ca))
    tls = context.wrap_socket(client, server_hostname="localhost")
    starting.wait(DEADLINE_S)
    assert record_layer(tls.getpeername(), tls.getsockname()) == layer(daemon)
    tls.sendall(b"to the server")
    assert connection.read(timeout=DEADLINE_S) == b"to the server"
    connection.write(b"to the client")
    assert tls.recv(100) == b"to the client"
    connection.close()
    assert tls.recv(100) == b""
    tls.close()


# EXPORT


def test_export_in_user_mode_says_why_not(daemon: Daemon, lane: Lane) -> None:
    if layer(daemon) == "kernel":
        pytest.skip("the kernel makes the records here")
    with tls_open("localhost", daemon.port, cafile=daemon.ca, lane=lane).wait(DEADLINE_S) as connection:
        with pytest.raises(TlsError, match="only kernel TLS can be exported") as failure:
            tls_export(connection).wait(DEADLINE_S)
        assert failure.value.errno == errno.EOPNOTSUPP
        connection.write(b"GET /page HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert connection.makefile().read().endswith(pattern(100_000))


def exported(daemon: Daemon, lane: Lane, listener: Listener) -> tuple[KtlsSocket, ssl.SSLSocket]:
    accept = listener.accept_operation()
    context = ssl.create_default_context(cafile=str(daemon.ca))
    plain = socket.create_connection(("127.0.0.1", listener.port), DEADLINE_S)
    tls = context.wrap_socket(plain, server_hostname="localhost")
    connection = accept.wait(DEADLINE_S)
    tls.sendall(b"before")
    assert read_exactly(connection, 6) == b"before"
    sock = tls_export(connection).wait(DEADLINE_S)
    sock.settimeout(DEADLINE_S)
    return sock, tls


@pytest.fixture
def tls_listener(daemon: Daemon, lane: Lane) -> Iterator[Listener]:
    if layer(daemon) != "kernel":
        pytest.skip("only kernel TLS can be exported")
    with tls_listen(certificate="localhost", lane=lane).wait(DEADLINE_S) as listener:
        yield listener


@pytest.mark.guest_core
def test_export(daemon: Daemon, lane: Lane, tls_listener: Listener) -> None:
    """A real socket of the program's with the kernel's records; in the daemon nothing of it is left."""
    sock, tls = exported(daemon, lane, tls_listener)
    assert record_layer(sock.getsockname(), sock.getpeername()) == "kernel"
    assert worker(daemon)["connections"] == 0
    assert worker(daemon)["exported"] >= 1
    assert not os.get_inheritable(sock.fileno())
    assert not holds(daemon, sock)
    data = os.urandom(500_000)
    thread = in_thread(lambda: tls.sendall(data))
    received = b""
    while len(received) < len(data):
        received += sock.recv(1 << 16)
    thread.join(DEADLINE_S)
    assert received == data
    thread = in_thread(lambda: sock.sendall(data))
    back = b""
    while len(back) < len(data):
        back += tls.recv(1 << 16)
    thread.join(DEADLINE_S)
    assert back == data
    sock.send_close_notify()
    assert tls.recv(100) == b""  # Python's ssl raises where close_notify is missing
    goodbye = in_thread(tls.unwrap)
    with pytest.raises(OSError, match="Input/output error"):
        sock.recv(100)  # the duty: a record that is no data
    assert sock.receive() == b""
    goodbye.join(DEADLINE_S)
    sock.close()
    tls.close()


def holds(daemon: Daemon, sock: socket.socket) -> bool:
    """Whether any descriptor of the daemon's processes is this socket."""
    inode = f"socket:[{os.fstat(sock.fileno()).st_ino}]"
    for pid in daemon.pids:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if str(entry.readlink()) == inode:
                    return True
    return False


def test_export_waits_for_what_is_in_flight_or_unread(daemon: Daemon, lane: Lane, tls_listener: Listener) -> None:
    accept = tls_listener.accept_operation()
    context = ssl.create_default_context(cafile=str(daemon.ca))
    plain = socket.create_connection(("127.0.0.1", tls_listener.port), DEADLINE_S)
    tls = context.wrap_socket(plain, server_hostname="localhost")
    connection = accept.wait(DEADLINE_S)
    read = connection.read_operation(3)
    with pytest.raises(TlsError, match="in flight") as failure:
        tls_export(connection).wait(DEADLINE_S)
    assert failure.value.errno == errno.EBUSY
    tls.sendall(b"abcdef")
    assert read.wait(DEADLINE_S) == b"abc"
    # Whether "def" is in the daemon or still in the kernel: it comes, once, by the one way or the other.
    received = b""
    while True:
        try:
            sock = tls_export(connection).wait(DEADLINE_S)
            break
        except TlsError as error:
            assert error.errno == errno.EBUSY
            received += connection.read(timeout=DEADLINE_S)
    sock.settimeout(DEADLINE_S)
    while len(received) < 3:
        received += sock.recv(10)
    assert received == b"def"
    sock.close()
    tls.close()


def test_the_duties_by_system_calls_alone(daemon: Daemon, lane: Lane, tls_listener: Listener) -> None:
    """As docs/libtls.md states them: close_notify read by recvmsg with its record's type, and answered by sendmsg."""
    exported_socket, tls = exported(daemon, lane, tls_listener)
    with socket.socket(fileno=exported_socket.detach()) as sock:
        sock.settimeout(DEADLINE_S)
        tls.sendall(b"last words")
        goodbye = in_thread(tls.unwrap)  # sends close_notify and waits for ours
        assert sock.recv(100) == b"last words"
        data, ancillary, _, _ = sock.recvmsg(100, socket.CMSG_SPACE(1))
        assert (ancillary, data) == ([(SOL_TLS, TLS_GET_RECORD_TYPE, bytes([ALERT]))], CLOSE_NOTIFY)
        sock.sendmsg([CLOSE_NOTIFY], [(SOL_TLS, TLS_SET_RECORD_TYPE, bytes([ALERT]))])
        goodbye.join(DEADLINE_S)
        assert not goodbye.is_alive()
        tls.close()
        assert sock.recv(100) == b""  # FIN


def test_an_exported_client_passes_over_tickets(daemon: Daemon, lane: Lane) -> None:
    if layer(daemon) != "kernel":
        pytest.skip("only kernel TLS can be exported")
    connection = tls_open("localhost", daemon.port, cafile=daemon.ca, lane=lane).wait(DEADLINE_S)
    sock = tls_export(connection).wait(DEADLINE_S)
    sock.settimeout(DEADLINE_S)
    sock.sendall(b"GET /page HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    received = b""
    while piece := sock.receive():
        received += piece
    assert received.endswith(pattern(100_000))
    sock.send_close_notify()
    sock.close()


def test_an_exported_client_ends_at_a_key_update(daemon: Daemon, lane: Lane, issued: Issued) -> None:
    """It is a clear error, whatever the kernel could do; this side says goodbye, and what it still reads fails."""
    if layer(daemon) != "kernel":
        pytest.skip("only kernel TLS can be exported")
    with peers.interactive_server(issued) as (typed, shown, port):
        connection = tls_open("127.0.0.1", port, server_name="localhost", cafile=issued.ca, lane=lane).wait(DEADLINE_S)
        sock = tls_export(connection).wait(DEADLINE_S)
        sock.settimeout(DEADLINE_S)
        sock.sendall(b"before\n")
        say_until(typed, b"", shown, b"before")
        typed.write(b"k\n")
        with pytest.raises(TlsError, match="cannot follow") as failure:
            sock.receive()
        assert failure.value.errno == errno.EKEYEXPIRED
        sock.sendall(b"under the old key\n")  # the other direction's is as it was
        say_until(typed, b"", shown, b"under the old key")
        sock.send_close_notify()
        say_until(typed, b"", shown, b"CONNECTION CLOSED")
        with pytest.raises(OSError, match=r"Bad message|Key has expired"):
            sock.receive()  # the server's close_notify, under its new key
        sock.close()
