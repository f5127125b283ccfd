"""Bytes before TLS and STARTTLS in both roles: in user mode here, with the kernel's records in guests.

Whatever hands a connection over, no byte is lost, and none from before TLS is ever taken for one of after.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import smtplib
import socket
import ssl
import struct
from collections.abc import Callable, Iterator

import pytest
from support.certificates import Issued
from support.daemon import Daemon
from support.layers import record_layer
from support.rings import Peer, in_thread, layer, read_exactly, server_context
from support.waiting import DEADLINE_S

from libtls import Lane, TlsError, errors
from libtls.connection import Connection, Listener
from libtls.functions import tls_listen, tls_start

# Bytes before TLS


def test_plain_bytes_and_their_ends(lane: Lane, peer: Peer) -> None:
    connection, other = peer.meet(lane)
    info = connection.info()
    assert (info.version, info.record_layer) == ("", "none")
    connection.write(b"hello")
    assert other.recv(100) == b"hello"
    read = connection.read_operation()
    barrier = connection.barrier_operation()
    behind = connection.write_operation(b"behind the barrier")
    other.sendall(b"an answer")
    assert read.wait(DEADLINE_S) == b"an answer"
    assert barrier.wait(DEADLINE_S) == 0
    assert behind.wait(DEADLINE_S) == 18
    assert other.recv(100) == b"behind the barrier"
    connection.shutdown()
    assert other.recv(100) == b""  # FIN, and no record of TLS before it
    other.sendall(b"still talking")
    other.close()
    assert read_exactly(connection, 13) == b"still talking"
    assert connection.read(timeout=DEADLINE_S) == b""
    with pytest.raises(errors.BrokenConnection):
        connection.write(b"x")
    connection.close()


def test_close_without_tls_sends_no_record(lane: Lane, peer: Peer) -> None:
    connection, other = peer.meet(lane)
    write = connection.write_operation(b"last words")
    connection.close()
    assert write.wait(DEADLINE_S) == 10
    assert other.recv(100) == b"last words"
    assert other.recv(100) == b""
    other.close()


def test_plain_bulk_each_way(lane: Lane, peer: Peer) -> None:
    connection, other = peer.meet(lane)
    data = os.urandom(8 << 20)
    there, back = hashlib.sha256(), hashlib.sha256()

    def echo() -> None:
        left = len(data)
        while left:
            piece = other.recv(1 << 16)
            there.update(piece)
            other.sendall(piece)
            left -= len(piece)

    threads = [in_thread(echo), in_thread(lambda: connection.write(data))]
    left = len(data)
    while left:
        piece = connection.read(timeout=DEADLINE_S)
        back.update(piece)
        left -= len(piece)
    for thread in threads:
        thread.join(DEADLINE_S)
    assert there.digest() == back.digest() == hashlib.sha256(data).digest()
    connection.close()
    other.close()


def test_a_reset_is_an_error(lane: Lane, peer: Peer) -> None:
    connection, other = peer.meet(lane)
    read = connection.read_operation()
    other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    other.close()
    with pytest.raises(errors.ConnectionReset):
        read.wait(DEADLINE_S)
    with pytest.raises(errors.ConnectionReset):
        tls_start(connection, "localhost").wait(DEADLINE_S)
    connection.close()


# START_TLS, the client's side


def starttls_server(other: socket.socket, issued: Issued, answer: bytes = b"220 go ahead\r\n") -> Callable[[], None]:
    """Greets, waits for STARTTLS, answers, shakes hands and echoes until the end."""

    def run() -> None:
        other.sendall(b"220 ready\r\n")
        command = b""
        while not command.endswith(b"\r\n"):
            command += other.recv(100)
        assert command == b"STARTTLS\r\n"
        other.sendall(answer)
        try:
            with server_context(issued).wrap_socket(other, server_side=True) as tls:
                while data := tls.recv(1 << 16):
                    tls.sendall(data)
        except OSError:
            other.close()

    return run


def test_starttls(daemon: Daemon, lane: Lane, peer: Peer, issued: Issued) -> None:
    connection, other = peer.meet(lane)
    names = other.getpeername(), other.getsockname()
    thread = in_thread(starttls_server(other, issued))
    assert read_exactly(connection, 11) == b"220 ready\r\n"
    connection.write(b"STARTTLS\r\n")
    assert read_exactly(connection, 14) == b"220 go ahead\r\n"
    assert record_layer(*names) == "none"
    tls_start(connection, "localhost", cafile=daemon.ca).wait(DEADLINE_S)
    assert record_layer(*names) == layer(daemon)
    assert connection.info().version == "TLSv1.3"
    data = os.urandom(200_000)
    write = connection.write_operation(data)
    assert read_exactly(connection, len(data)) == data
    assert write.wait(DEADLINE_S) == len(data)
    connection.close()
    thread.join(DEADLINE_S)


@pytest.mark.parametrize("place", ["daemon", "socket"])
@pytest.mark.parametrize(
    "injected", [b"250 injected\r\n", b"\x17\x03\x03\x00\x05hello", b"\x16\x03\x03"], ids=["text", "record", "half"]
)
def test_what_is_injected_before_tls_is_never_data_of_it(
    lane: Lane, peer: Peer, issued: Issued, injected: bytes, place: str
) -> None:
    """Plaintext glued to the answer that starts TLS: the handshake gets it, and fails; no READ ever sees it."""
    connection, other = peer.meet(lane)
    answer = b"220 go ahead\r\n"
    if place == "socket":
        other.sendall(answer)
        assert read_exactly(connection, len(answer)) == answer
        other.sendall(injected)
    else:
        other.sendall(answer + injected)
        assert read_exactly(connection, len(answer)) == answer
    starting = tls_start(connection, "localhost", cafile=issued.ca)
    other.settimeout(1)  # half a record swallows the server's answer: somebody has to give up

    def shake_hands() -> None:
        with contextlib.suppress(OSError):
            server_context(issued).wrap_socket(other, server_side=True).sendall(b"secret")
        other.close()

    thread = in_thread(shake_hands)
    refused = (errors.HandshakeError, errors.Truncated)
    with pytest.raises(refused):
        starting.wait(DEADLINE_S)
    with pytest.raises(refused):
        connection.read(timeout=DEADLINE_S)
    with pytest.raises(refused):
        connection.write(b"a password")
    connection.close()
    thread.join(DEADLINE_S)


def test_start_tls_with_a_read_in_flight(daemon: Daemon, lane: Lane, peer: Peer, issued: Issued) -> None:
    connection, other = peer.meet(lane)
    read = connection.read_operation()
    with pytest.raises(TlsError, match="in flight") as failure:
        tls_start(connection, "localhost", cafile=daemon.ca).wait(DEADLINE_S)
    assert failure.value.errno == errno.EBUSY
    other.sendall(b"plain")
    assert read.wait(DEADLINE_S) == b"plain"  # nothing has changed
    starting = tls_start(connection, "localhost", cafile=daemon.ca)
    with pytest.raises(TlsError, match="busy"):
        connection.read()
    with pytest.raises(TlsError, match="busy"):
        connection.close_operation().wait(DEADLINE_S)
    tls = server_context(issued).wrap_socket(other, server_side=True)
    starting.wait(DEADLINE_S)
    tls.sendall(b"sealed")
    assert connection.read(timeout=DEADLINE_S) == b"sealed"
    tls.close()


def test_start_tls_behind_a_barrier(daemon: Daemon, lane: Lane, peer: Peer, issued: Issued) -> None:
    """The way to say all of it at once: what is before the barrier is plain."""
    connection, other = peer.meet(lane)
    write = connection.write_operation(b"STARTTLS\r\n" * 1000)
    connection.barrier_operation()
    starting = tls_start(connection, "localhost", cafile=daemon.ca)
    received = b""
    while len(received) < 10_000:
        received += other.recv(10_000 - len(received))
    assert received == b"STARTTLS\r\n" * 1000
    tls = server_context(issued).wrap_socket(other, server_side=True)
    starting.wait(DEADLINE_S)
    assert write.wait(DEADLINE_S) == 10_000
    connection.write(b"sealed")
    assert tls.recv(100) == b"sealed"
    connection.close()
    tls.close()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("localhost", errors.CertificateUntrusted), ("wrong.example", errors.CertificateNameMismatch)],
)
def test_a_failed_handshake_does_not_fall_back(
    lane: Lane, peer: Peer, issued: Issued, name: str, expected: type[TlsError]
) -> None:
    connection, other = peer.meet(lane)
    cafile = None if expected is errors.CertificateUntrusted else issued.ca
    thread = in_thread(lambda: wrap_quietly(other, issued))
    with pytest.raises(expected):
        tls_start(connection, name, cafile=cafile).wait(DEADLINE_S)
    with pytest.raises(TlsError):
        connection.write(b"a password in the clear")
    connection.close()
    thread.join(DEADLINE_S)


def wrap_quietly(other: socket.socket, issued: Issued) -> None:
    with contextlib.suppress(OSError):
        server_context(issued).wrap_socket(other, server_side=True)
    other.close()


def test_what_is_refused_at_once_leaves_the_connection_as_it_was(lane: Lane, peer: Peer) -> None:
    connection, other = peer.meet(lane)
    with pytest.raises(TlsError, match="certificate of this name"):
        tls_start(connection, server_side=True, certificate="nobody.example").wait(DEADLINE_S)
    with pytest.raises(TlsError, match="malformed"):
        tls_start(connection, "localhost", cadata=b"no PEM").wait(DEADLINE_S)
    connection.write(b"plain")
    assert other.recv(100) == b"plain"
    connection.close()
    other.close()


def test_a_peer_that_ends_or_says_nothing_during_start_tls(lane: Lane, peer: Peer) -> None:
    connection, other = peer.meet(lane)
    with pytest.raises(errors.DeadlinePassed):
        tls_start(connection, "localhost", timeout=0.2).wait(DEADLINE_S)
    connection.close()
    other.close()
    connection, other = peer.meet(lane)
    other.close()
    with pytest.raises(TlsError):
        tls_start(connection, "localhost").wait(DEADLINE_S)
    connection.close()


# START_TLS, the server's side


@pytest.fixture
def plain_listener(lane: Lane) -> Iterator[Listener]:
    with tls_listen(tls=False, lane=lane).wait(DEADLINE_S) as listener:
        yield listener


def read_line(connection: Connection) -> bytes:
    """One byte at a time, so that nothing behind the line is read."""
    line = b""
    while not line.endswith(b"\r\n"):
        line += read_exactly(connection, 1)
    return line


def test_a_mail_server_by_libtls_and_smtplib(daemon: Daemon, lane: Lane, plain_listener: Listener) -> None:
    heard: list[bytes] = []
    layers: list[str] = []

    def serve_mail() -> None:
        with plain_listener.accept() as connection:
            connection.write(b"220 mail.example\r\n")
            while True:
                line = read_line(connection)
                heard.append(line.upper().split()[0])
                if heard[-1] == b"EHLO":
                    layers.append(connection.info().record_layer)
                    connection.write(b"250-mail.example\r\n250 STARTTLS\r\n")
                elif heard[-1] == b"STARTTLS":
                    connection.write(b"220 go ahead\r\n")
                    tls_start(connection, server_side=True, certificate="localhost").wait(DEADLINE_S)
                elif heard[-1] == b"QUIT":
                    connection.write(b"221 bye\r\n")
                    return

    thread = in_thread(serve_mail)
    context = ssl.create_default_context(cafile=str(daemon.ca))
    with smtplib.SMTP("localhost", plain_listener.port, timeout=DEADLINE_S) as client:
        client.ehlo()
        assert client.starttls(context=context)[0] == 220
        assert client.ehlo()[0] == 250
    thread.join(DEADLINE_S)
    assert heard == [b"EHLO", b"STARTTLS", b"EHLO", b"QUIT"]
    assert layers == ["none", "user" if layer(daemon) == "none" else "kernel"]


def test_a_client_that_begins_tls_without_waiting(daemon: Daemon, lane: Lane, plain_listener: Listener) -> None:
    """Its ClientHello is there before START_TLS: it is the beginning of the handshake."""
    plain = socket.create_connection(("127.0.0.1", plain_listener.port), DEADLINE_S)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context(cafile=str(daemon.ca))
    client = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    plain.sendall(b"STARTTLS\r\n" + outgoing.read())
    connection = plain_listener.accept()
    assert read_line(connection) == b"STARTTLS\r\n"
    starting = tls_start(connection, server_side=True)
    while True:
        try:
            client.do_handshake()
            break
        except ssl.SSLWantReadError:
            incoming.write(plain.recv(1 << 16))
    client.write(b"sealed")
    plain.sendall(outgoing.read())  # Finished and the first record in one piece
    starting.wait(DEADLINE_S)
    assert connection.read(timeout=DEADLINE_S) == b"sealed"
    connection.close()
    plain.close()


def test_a_handshake_outlives_its_listener(daemon: Daemon, lane: Lane, plain_listener: Listener) -> None:
    plain = socket.create_connection(("127.0.0.1", plain_listener.port), DEADLINE_S)
    connection = plain_listener.accept()
    starting = tls_start(connection, server_side=True)
    plain_listener.close()
    context = ssl.create_default_context(cafile=str(daemon.ca))
    with context.wrap_socket(plain, server_hostname="localhost") as tls:
        starting.wait(DEADLINE_S)
        connection.write(b"sealed")
        assert tls.recv(100) == b"sealed"
        connection.close()


def test_a_plain_listener_has_nothing_of_tls(lane: Lane) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        tls_listen(tls=False, certificate="localhost", lane=lane).wait(DEADLINE_S)


def test_commands_injected_before_tls_reach_no_server(daemon: Daemon, lane: Lane, plain_listener: Listener) -> None:
    """What somebody glued to STARTTLS is not a command of the client that shakes hands afterwards."""
    plain = socket.create_connection(("127.0.0.1", plain_listener.port), DEADLINE_S)
    plain.sendall(b"STARTTLS\r\nRCPT TO:<thief@example>\r\n")
    connection = plain_listener.accept()
    assert read_line(connection) == b"STARTTLS\r\n"
    with pytest.raises(errors.HandshakeError):
        tls_start(connection, server_side=True).wait(DEADLINE_S)
    with pytest.raises(errors.HandshakeError):
        connection.read()
    connection.close()
    plain.close()
