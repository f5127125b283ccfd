"""What is not a TLS 1.3 handshake, or not one the daemon can take: the right alert, and nothing else breaks."""

from __future__ import annotations

import os
import socket
import ssl
import struct
import time
from collections.abc import Callable

import pytest
from support import clients
from support.clients import MemoryClient, client_hello, plaintext_alert, receive_to_end, record
from support.daemon import HANDSHAKE_DEADLINE_MS, Daemon

pytestmark = pytest.mark.usefixtures("still_serves")


def say(victim: Daemon, data: bytes) -> bytes:
    """What the daemon answers to `data` before it closes."""
    with victim.connect() as connection:
        connection.sendall(data)
        return receive_to_end(connection)


def hello_then_silence(victim: Daemon, data: bytes) -> socket.socket:
    connection = victim.connect()
    connection.sendall(data)
    return connection


@pytest.mark.parametrize(
    "garbage",
    [
        pytest.param(b"\xff" * 64, id="ff"),
        pytest.param(b"\0" * 64, id="zeros"),
        pytest.param(b"SSH-2.0-OpenSSH_9.2\r\n", id="ssh"),
        pytest.param(b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10" + b"\1" * 37, id="sslv2"),
        pytest.param(record(clients.CONTENT_APPLICATION_DATA, b"x" * 32), id="application-data-first"),
        pytest.param(record(clients.CONTENT_HANDSHAKE, b"\x02" + b"\0\0\x04" + b"abcd"), id="server-hello-first"),
        pytest.param(record(clients.CONTENT_HANDSHAKE, b"\x01" + b"\0\0\x04" + b"abcd"), id="hello-of-nonsense"),
        pytest.param(record(clients.CONTENT_HANDSHAKE, b""), id="empty-handshake-record"),
        pytest.param(record(20, b"\x02"), id="change-cipher-spec-that-is-not-1"),
        pytest.param(record(99, b"abc"), id="unknown-content-type"),
    ],
)
def test_garbage_is_answered(victim: Daemon, garbage: bytes) -> None:
    answer = say(victim, garbage)
    assert plaintext_alert(answer) is not None or answer.startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_get_an_alert_or_an_end(victim: Daemon, seed: int) -> None:
    """Random bytes may promise a record that never comes, so the client gives up first."""
    with victim.connect() as connection:
        connection.sendall(bytes([seed]) + os.urandom(511))
        connection.shutdown(socket.SHUT_WR)
        answer = receive_to_end(connection)
    assert not answer or plaintext_alert(answer) is not None or answer.startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"POST", b"OPTIONS", b"PRI"])
def test_plain_http_is_told_so_or_closed(victim: Daemon, method: bytes) -> None:
    answer = say(victim, method + b" / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert not answer or answer.startswith(b"HTTP/1.1 400 ") or plaintext_alert(answer) is not None


def test_client_hello_cut_at_every_byte_then_end(victim: Daemon) -> None:
    """All cuts are open at once; each connection must end by itself, with an alert or without."""
    hello = client_hello()
    connections = []
    for length in range(len(hello)):
        connection = hello_then_silence(victim, hello[:length])
        connection.shutdown(socket.SHUT_WR)
        connections.append(connection)
    for length, connection in enumerate(connections):
        with connection:
            answer = receive_to_end(connection)
            assert not answer or plaintext_alert(answer) is not None, f"cut at {length}: {answer!r}"


def test_client_hello_cut_at_every_byte_then_reset(victim: Daemon) -> None:
    hello = client_hello()
    for length in range(len(hello)):
        connection = hello_then_silence(victim, hello[:length])
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    victim.wait_idle()


def test_client_hello_sent_in_two_parts_at_every_byte(victim: Daemon, still_serves: Callable[[], None]) -> None:
    """Split anywhere it is the same ClientHello. The request between the parts proves that the first one was taken."""
    hello = client_hello(groups=(0x0017,), shares=[])  # no share: the answer to the whole is a HelloRetryRequest
    connections = [hello_then_silence(victim, hello[:length]) for length in range(1, len(hello))]
    still_serves()
    for length, connection in enumerate(connections, 1):
        with connection:
            connection.sendall(hello[length:])
            answer = connection.recv(5)
            assert answer[:1] == bytes([clients.CONTENT_HANDSHAKE]), f"split at {length}: {answer!r}"


def test_client_hello_fragmented_into_records_of_one_byte(victim: Daemon) -> None:
    message = client_hello(groups=(0x0017,), shares=[])[5:]
    with victim.connect() as connection:
        connection.sendall(b"".join(record(clients.CONTENT_HANDSHAKE, message[i : i + 1]) for i in range(len(message))))
        assert connection.recv(5)[:1] == bytes([clients.CONTENT_HANDSHAKE])


@pytest.mark.parametrize(
    ("hello", "description"),
    [
        pytest.param(client_hello(versions=None), clients.PROTOCOL_VERSION, id="tls-1.2-without-supported-versions"),
        pytest.param(client_hello(versions=(0x0303, 0x0302)), clients.PROTOCOL_VERSION, id="tls-1.2-and-1.1-listed"),
        pytest.param(client_hello(versions=None, legacy_version=0x0301), clients.PROTOCOL_VERSION, id="tls-1.0"),
        pytest.param(client_hello(versions=None, legacy_version=0x0300), clients.PROTOCOL_VERSION, id="ssl-3.0"),
        pytest.param(client_hello(suites=(0x1304, 0xC02B)), clients.HANDSHAKE_FAILURE, id="no-common-suite"),
        pytest.param(client_hello(groups=(0x0100,)), clients.HANDSHAKE_FAILURE, id="no-common-group"),
        pytest.param(client_hello(signature_algorithms=(0x0201,)), clients.HANDSHAKE_FAILURE, id="no-common-signature"),
        pytest.param(client_hello(groups=()), clients.MISSING_EXTENSION, id="no-groups"),
        pytest.param(client_hello(compression=b"\1\0"), clients.ILLEGAL_PARAMETER, id="compression"),
        pytest.param(client_hello(shares=[(0x001D, b"short")]), clients.ILLEGAL_PARAMETER, id="short-share"),
        pytest.param(client_hello(shares=[(0x001D, b"\0" * 32)]), clients.ILLEGAL_PARAMETER, id="zero-share"),
        pytest.param(
            client_hello(groups=(0x0017,), shares=[(0x0017, b"\4" * 65)]), clients.ILLEGAL_PARAMETER, id="off-curve"
        ),
    ],
)
def test_hello_that_cannot_be_accepted(victim: Daemon, hello: bytes, description: int) -> None:
    assert plaintext_alert(say(victim, hello)) == description


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_1", "TLSv1"])
def test_old_client_sees_protocol_version(victim: Daemon, version: str) -> None:
    """OpenSSL as a client that knows no TLS 1.3."""
    context = ssl.create_default_context(cafile=str(victim.ca))
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = ssl.TLSVersion[version]
    with MemoryClient(victim.address, victim.ca, context=context) as client, pytest.raises(ssl.SSLError) as caught:
        client.handshake()
    assert caught.value.reason == "TLSV1_ALERT_PROTOCOL_VERSION"


@pytest.mark.parametrize("length", [(1 << 14) + 1, (1 << 14) + 257, 0xFFFF])
def test_oversized_plaintext_record(victim: Daemon, length: int) -> None:
    """RFC 8446 section 5.1: more than 2^14 bytes is record_overflow; the header is enough to know."""
    header = struct.pack(">BHH", clients.CONTENT_HANDSHAKE, 0x0301, length)
    assert plaintext_alert(say(victim, header + b"\1" * 64)) == clients.RECORD_OVERFLOW


def test_huge_client_hello_is_refused(victim: Daemon) -> None:
    """A handshake message may claim 16 MiB; nobody keeps that for a stranger."""
    with victim.connect() as connection:
        piece = record(clients.CONTENT_HANDSHAKE, b"\0" * (1 << 14))
        try:
            connection.sendall(record(clients.CONTENT_HANDSHAKE, b"\x01\xff\xff\xff" + b"\0" * 1000))
            for _ in range(64):
                connection.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass
        answer = receive_to_end(connection)
    assert not answer or plaintext_alert(answer) is not None


def test_wrong_finished_gets_decrypt_error(victim: Daemon) -> None:
    """The client's Finished with one bit turned: its tag is wrong."""
    with MemoryClient(victim.address, victim.ca) as client:
        client.handshake()
        flight = bytearray(client.flight)
        flight[-1] ^= 1
        client.socket.sendall(flight)
        assert client.alert() == "SSLV3_ALERT_BAD_RECORD_MAC"


def test_plaintext_where_ciphertext_belongs(victim: Daemon) -> None:
    """An unprotected record after the server's flight."""
    with MemoryClient(victim.address, victim.ca) as client:
        client.handshake()
        client.socket.sendall(record(clients.CONTENT_HANDSHAKE, b"\x14\0\0\x20" + b"\0" * 32))
        assert client.alert() == "SSLV3_ALERT_UNEXPECTED_MESSAGE"


@pytest.mark.parametrize("sent", [b"", b"\x16", b"\x16\x03\x01\x02\x00", client_hello()[:-1]], ids=len)
def test_silence_meets_the_handshake_deadline(impatient: Daemon, sent: bytes) -> None:
    """Closed by the deadline, and not long before it."""
    begin = time.monotonic()
    with hello_then_silence(impatient, sent) as connection:
        answer = receive_to_end(connection)
    assert time.monotonic() - begin >= HANDSHAKE_DEADLINE_MS / 1000 / 2
    assert not answer or plaintext_alert(answer) is not None


def test_silence_after_the_servers_flight_meets_the_handshake_deadline(impatient: Daemon) -> None:
    with MemoryClient(impatient.address, impatient.ca) as client:
        client.handshake()  # Finished is not sent
        receive_to_end(client.socket)  # TimeoutError if the daemon does not close


def test_slow_hello_does_not_renew_the_deadline(impatient: Daemon) -> None:
    """One byte at a time, each before the deadline: the whole handshake has one deadline, not each byte."""
    hello = client_hello()
    with impatient.connect() as connection:
        for position in range(len(hello) - 1):
            try:
                connection.sendall(hello[position : position + 1])
                connection.settimeout(0.05)
                if not connection.recv(16):
                    break
            except TimeoutError:
                continue
            except (BrokenPipeError, ConnectionResetError):
                break
        else:
            pytest.fail("the connection outlived every byte")


def test_hundreds_of_silent_peers_disturb_nobody(victim: Daemon, still_serves: Callable[[], None]) -> None:
    connections = [victim.connect() for _ in range(400)]
    for _ in range(5):
        still_serves()
    for connection in connections:
        connection.close()
    victim.wait_idle()
