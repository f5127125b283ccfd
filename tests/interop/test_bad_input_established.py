"""What peers do after the handshake: bytes glued to Finished, early ends, bad records, readers that stop reading."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
from collections.abc import Callable

import pytest
from support import clients
from support.clients import MemoryClient, record
from support.content import pattern
from support.daemon import Daemon, resident_bytes

pytestmark = pytest.mark.usefixtures("still_serves")


def glued_flight(victim: Daemon) -> tuple[MemoryClient, bytes]:
    """A client whose Finished and request are one string of bytes, not yet sent."""
    client = MemoryClient(victim.address, victim.ca)
    client.handshake()
    client.request()
    return client, client.flight


def assert_answered(client: MemoryClient, what: str) -> None:
    response = client.response()
    assert (response.status, response.body) == (200, pattern(1024)), what
    assert not response.truncated, f"{what}: no close_notify"


def test_request_glued_to_finished_split_at_every_byte(victim: Daemon, still_serves: Callable[[], None]) -> None:
    """Not a byte may be lost at the hand-over from handshake to record layer, wherever the segments are cut.

    The first parts of all connections are sent before any second part; the requests in between prove that they were
    taken.
    """
    first, flight = glued_flight(victim)
    length = len(flight)
    with contextlib.ExitStack() as stack:
        waiting = []
        for position in range(1, length):
            client, flight = glued_flight(victim)
            stack.enter_context(client)
            client.socket.sendall(flight[:position])
            waiting.append((position, client, flight[position:]))
        for _ in range(3):
            still_serves()
        for position, client, rest in waiting:
            client.socket.sendall(rest)
            assert_answered(client, f"split at {position} of {length}")
    first.socket.close()


def test_request_glued_to_finished_one_byte_at_a_time(victim: Daemon, still_serves: Callable[[], None]) -> None:
    client, flight = glued_flight(victim)
    with client:
        for position in range(len(flight)):
            client.socket.sendall(flight[position : position + 1])
            if position % 16 == 0:
                still_serves()
        assert_answered(client, "byte by byte")


@pytest.mark.parametrize("requests", [2, 40, 400])
def test_many_requests_glued_to_finished(victim: Daemon, requests: int) -> None:
    """Pipelined behind Finished, in one record and in one each; every one is answered in order."""
    keep_alive = b"GET /small.txt HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with MemoryClient(victim.address, victim.ca) as client:
        client.handshake()
        client.request(keep_alive * (requests // 2))
        for _ in range(requests - requests // 2 - 1):
            client.request(keep_alive)
        client.request()
        client.send()
        data, truncated = client.read_to_end()
    assert data.count(b"HTTP/1.1 200 ") == requests
    assert data.count(pattern(1024)) == requests
    assert not truncated


def test_finished_and_request_followed_at_once_by_fin(victim: Daemon) -> None:
    """The client half-closes right behind the request, without close_notify: it is answered all the same."""
    for _ in range(20):
        client, flight = glued_flight(victim)
        with client:
            client.socket.sendall(flight)
            client.socket.shutdown(socket.SHUT_WR)
            assert_answered(client, "FIN behind the request")


def test_finished_request_close_notify_and_fin_at_once(victim: Daemon) -> None:
    for _ in range(20):
        client, flight = glued_flight(victim)
        with client:
            with contextlib.suppress(ssl.SSLWantReadError):
                client.tls.unwrap()
            client.socket.sendall(flight + client.flight)
            client.socket.shutdown(socket.SHUT_WR)
            data, _ = _read_raw(client)
            assert len(data) > 1024, "no answer behind close_notify"


def _read_raw(client: MemoryClient) -> tuple[bytes, bool]:
    """Ciphertext to the end: OpenSSL gives no more plaintext after it has sent close_notify itself."""
    return clients.receive_to_end(client.socket), True


def test_finished_alone_then_fin(victim: Daemon) -> None:
    """A connection that ends without a request ends quietly."""
    with MemoryClient(victim.address, victim.ca) as client:
        client.handshake(send_finished=True)
        client.socket.shutdown(socket.SHUT_WR)
        data, _ = client.read_to_end()
        assert data == b""
    victim.wait_idle()


@pytest.mark.parametrize("reset", [False, True], ids=["fin", "reset"])
def test_close_without_close_notify(victim: Daemon, reset: bool) -> None:
    """Idle, in the middle of a request, and in the middle of a response."""
    for sent in (b"", b"GET /small.txt HT", b"GET /sparse.bin HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        with MemoryClient(victim.address, victim.ca) as client:
            client.handshake()
            if sent:
                client.request(sent)
            client.send()
            if sent.endswith(b"\r\n\r\n"):
                assert client.receive()
            if reset:
                client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    victim.wait_idle()


def test_half_request_then_fin_is_not_answered_with_the_file(victim: Daemon) -> None:
    with MemoryClient(victim.address, victim.ca) as client:
        client.handshake()
        client.request(b"GET /small.txt HTTP/1.1\r\nHost: local")
        client.send()
        client.socket.shutdown(socket.SHUT_WR)
        data, _ = client.read_to_end()
    assert b" 200 " not in data


def _established(victim: Daemon) -> MemoryClient:
    """A client with one request answered on a connection that stays open."""
    client = MemoryClient(victim.address, victim.ca)
    client.handshake()
    client.request(b"GET /small.txt HTTP/1.1\r\nHost: localhost\r\n\r\n")
    client.send()
    data = b""
    while not data.endswith(pattern(1024)):
        try:
            data += client.tls.read(65536)
        except ssl.SSLWantReadError:
            assert client.receive(), "closed"
    return client


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("bad tag", {"SSLV3_ALERT_BAD_RECORD_MAC"}),
        ("short", {"SSLV3_ALERT_BAD_RECORD_MAC", "TLSV1_ALERT_DECODE_ERROR", "TLSV1_ALERT_RECORD_OVERFLOW"}),
        ("oversized", {"TLSV1_ALERT_RECORD_OVERFLOW"}),
        ("plaintext alert", {"SSLV3_ALERT_UNEXPECTED_MESSAGE", "SSLV3_ALERT_BAD_RECORD_MAC"}),
        ("change_cipher_spec", {"SSLV3_ALERT_UNEXPECTED_MESSAGE", "SSLV3_ALERT_BAD_RECORD_MAC"}),
        ("unknown type", {"SSLV3_ALERT_UNEXPECTED_MESSAGE", "SSLV3_ALERT_BAD_RECORD_MAC"}),
    ],
)
def test_bad_record(victim: Daemon, name: str, reasons: set[str]) -> None:
    """The connection ends with the alert of RFC 8446 section 5.2; in kernel mode an end without one is accepted."""
    with _established(victim) as client:
        client.request()
        good = client.flight
        bad = {
            "bad tag": good[:-1] + bytes([good[-1] ^ 1]),
            "short": record(clients.CONTENT_APPLICATION_DATA, b"\0" * 8),
            "oversized": struct.pack(">BHH", clients.CONTENT_APPLICATION_DATA, 0x0303, (1 << 14) + 257) + b"\0" * 17000,
            "plaintext alert": record(clients.CONTENT_ALERT, b"\1\0"),
            "change_cipher_spec": record(20, b"\1"),
            "unknown type": record(99, b"abc"),
        }[name]
        client.socket.sendall(bad)
        reason = client.alert()
    kernel = victim.ready[0].backend == "kernel"
    assert reason in reasons or (kernel and reason in {"", "UNEXPECTED_EOF_WHILE_READING"}), reason


def test_readers_that_stop_reading_cost_bounded_memory(victim: Daemon, still_serves: Callable[[], None]) -> None:
    """32 clients each ask twice for 64 MiB and read nothing more than the beginning."""
    before = resident_bytes(victim.pids)
    with contextlib.ExitStack() as stack:
        for _ in range(32):
            client = stack.enter_context(MemoryClient(victim.address, victim.ca))
            client.handshake()
            client.request(b"GET /sparse.bin HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2)
            client.send()
            assert client.receive()
        for _ in range(10):
            still_serves()
        grown = resident_bytes(victim.pids) - before
        assert grown < 32 * (1 << 20), f"{grown / 32 / 1024:.0f} KiB for each reader that does not read"
    victim.wait_idle()


def test_requests_without_end_and_nothing_read(victim: Daemon, still_serves: Callable[[], None]) -> None:
    """A client that only writes costs bounded memory, whether the daemon stops taking or ends the connection."""
    before = resident_bytes(victim.pids)
    with MemoryClient(victim.address, victim.ca) as client:
        client.handshake()
        client.send()
        client.socket.settimeout(1.0)
        request = b"GET /small.txt HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000
        with contextlib.suppress(TimeoutError, BrokenPipeError, ConnectionResetError):
            for _ in range(2000):
                client.request(request)
                client.send()
        still_serves()
        assert resident_bytes(victim.pids) - before < 8 << 20
    victim.wait_idle()
