"""Records and post-handshake messages that are sealed right and say the wrong thing."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import clients
from support.clients import MemoryClient
from support.content import pattern
from support.daemon import Daemon
from support.sealing import Sealer

pytestmark = pytest.mark.usefixtures("still_serves")

KEEP_ALIVE = b"GET /small.txt HTTP/1.1\r\nHost: localhost\r\n\r\n"
KEY_UPDATE, KEY_UPDATE_REQUESTED = b"\x18\0\0\1\0", b"\x18\0\0\1\1"
PIECES = 100  # a flood is sent in so many parts, so that the daemon can end it before all is said

Connected = tuple[MemoryClient, Sealer]


@pytest.fixture
def connected(victim: Daemon, tmp_path: Path) -> Iterator[Connected]:
    """A client whose handshake is complete and the means to seal anything under its keys."""
    context = ssl.create_default_context(cafile=str(victim.ca))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.keylog_filename = str(tmp_path / "keys")
    with MemoryClient(victim.address, victim.ca, context=context) as client:
        client.handshake(send_finished=True)
        cipher = client.tls.cipher()
        assert cipher is not None
        yield client, Sealer(cipher[0], tmp_path / "keys")


def test_sealed_requests_are_answered(connected: Connected) -> None:
    """The means themselves: padded, cut into records of one byte, and after a KeyUpdate of the client's own."""
    client, sealer = connected
    pieces = [sealer.seal(23, KEEP_ALIVE, padding=100)]
    pieces += [sealer.seal(23, KEEP_ALIVE[i : i + 1]) for i in range(len(KEEP_ALIVE))]
    pieces += [sealer.seal(23, b""), sealer.seal(23, clients.REQUEST)]
    client.socket.sendall(b"".join(pieces))
    data, truncated = client.read_to_end()
    assert data.count(pattern(1024)) == 3
    assert not truncated


def test_largest_record_is_taken(connected: Connected) -> None:
    """2^14 bytes of content: 380 requests in one record, padding none."""
    client, sealer = connected
    requests = (KEEP_ALIVE * 400)[: (1 << 14) // len(KEEP_ALIVE) * len(KEEP_ALIVE)]
    client.socket.sendall(
        sealer.seal(23, requests, padding=(1 << 14) - len(requests)) + sealer.seal(23, clients.REQUEST)
    )
    data, _ = client.read_to_end()
    assert data.count(pattern(1024)) == len(requests) // len(KEEP_ALIVE) + 1


@pytest.mark.parametrize(
    ("content_type", "content", "reasons"),
    [
        pytest.param(23, b"x" * ((1 << 14) + 1), {"TLSV1_ALERT_RECORD_OVERFLOW"}, id="content-over-2^14"),
        pytest.param(None, b"\0" * 10, {"SSLV3_ALERT_UNEXPECTED_MESSAGE"}, id="padding-only"),
        pytest.param(20, b"\1", {"SSLV3_ALERT_UNEXPECTED_MESSAGE"}, id="change-cipher-spec-inside"),
        pytest.param(24, b"\1\0\1x", {"SSLV3_ALERT_UNEXPECTED_MESSAGE"}, id="heartbeat"),
        pytest.param(22, b"", {"SSLV3_ALERT_UNEXPECTED_MESSAGE"}, id="empty-handshake"),
        pytest.param(
            22, b"\x01\0\0\0", {"SSLV3_ALERT_UNEXPECTED_MESSAGE", "TLSV1_ALERT_DECODE_ERROR"}, id="client-hello"
        ),
        pytest.param(22, b"\x14\0\0\x20" + b"f" * 32, {"SSLV3_ALERT_UNEXPECTED_MESSAGE"}, id="finished-again"),
        pytest.param(22, b"\x04\0\0\0", {"SSLV3_ALERT_UNEXPECTED_MESSAGE", "TLSV1_ALERT_DECODE_ERROR"}, id="ticket"),
        pytest.param(22, b"\x18\0\0\1\2", {"SSLV3_ALERT_ILLEGAL_PARAMETER"}, id="key-update-with-2"),
        pytest.param(22, b"\x18\0\0\0", {"TLSV1_ALERT_DECODE_ERROR"}, id="key-update-empty"),
        pytest.param(22, b"\x18\0\0\2\0\0", {"TLSV1_ALERT_DECODE_ERROR"}, id="key-update-too-long"),
        pytest.param(22, KEY_UPDATE * 2, {"SSLV3_ALERT_UNEXPECTED_MESSAGE"}, id="message-behind-key-update"),
        pytest.param(21, b"\2", {"TLSV1_ALERT_DECODE_ERROR"}, id="half-an-alert"),
        pytest.param(21, b"\1\x5a\1\0", {"TLSV1_ALERT_DECODE_ERROR"}, id="two-alerts"),
        pytest.param(21, b"", {"SSLV3_ALERT_UNEXPECTED_MESSAGE"}, id="empty-alert"),
        # Refused at their headers: the bodies never come.
        pytest.param(22, b"\x0b\1\0\0", {"SSLV3_ALERT_UNEXPECTED_MESSAGE"}, id="header-of-a-certificate"),
        pytest.param(22, b"\x04\0\xff\0", {"SSLV3_ALERT_UNEXPECTED_MESSAGE"}, id="header-of-a-ticket"),
        pytest.param(22, b"\x18\0\0\2\0", {"TLSV1_ALERT_DECODE_ERROR"}, id="header-of-a-long-key-update"),
    ],
)
def test_wrong_content_ends_the_connection_with_its_alert(
    victim: Daemon, connected: Connected, content_type: int | None, content: bytes, reasons: set[str]
) -> None:
    """The kernel refuses some of these itself, and says only that: an end without an alert or with bad_record_mac."""
    client, sealer = connected
    client.socket.sendall(sealer.seal(content_type, content) + sealer.seal(23, KEEP_ALIVE))
    reason = client.alert()
    kernel = victim.ready[0].backend == "kernel"
    by_kernel = {"", "UNEXPECTED_EOF_WHILE_READING", "SSLV3_ALERT_BAD_RECORD_MAC"}
    assert reason in reasons or (kernel and reason in by_kernel), reason


@pytest.mark.parametrize("alert", [b"\2\x28", b"\1\x28", b"\2\x00", b"\1\0", b"\7\7"], ids=bytes.hex)
def test_alert_of_the_client_ends_the_connection(connected: Connected, alert: bytes) -> None:
    """RFC 8446 section 6: whatever its level, every error alert is fatal, known or not; close_notify ends it, too."""
    client, sealer = connected
    client.socket.sendall(sealer.seal(21, alert))
    assert clients.receive_to_end(client.socket) is not None  # TimeoutError if it does not end


def test_user_canceled_goes_before_close_notify(connected: Connected) -> None:
    """RFC 8446 section 6.1: user_canceled says why; it is the close_notify behind it that ends the connection."""
    client, sealer = connected
    client.socket.sendall(sealer.seal(21, b"\1\x5a") + sealer.seal(21, b"\1\0"))
    data, truncated = client.read_to_end()
    assert (data, truncated) == (b"", False)


def test_data_behind_close_notify_is_ignored(connected: Connected) -> None:
    client, sealer = connected
    client.socket.sendall(sealer.seal(21, b"\1\0") + sealer.seal(23, KEEP_ALIVE))
    data, _ = client.read_to_end()
    assert data == b""


def _flood(client: MemoryClient, piece: Callable[[], bytes]) -> bool:
    """Sends pieces until the daemon ends the connection; False if it took all of them."""
    client.socket.settimeout(10.0)
    try:
        for _ in range(PIECES):
            client.socket.sendall(piece())
    except (BrokenPipeError, ConnectionResetError):
        return True
    except TimeoutError:
        return True  # it stopped reading: no core is lost either
    client.socket.settimeout(1.0)
    try:
        while client.socket.recv(65536):
            continue
    except TimeoutError:
        return False
    except ConnectionResetError:
        return True
    return True


def test_flood_of_empty_records_ends_the_connection(victim: Daemon, connected: Connected) -> None:
    """RFC 8446 section 5.1 allows empty application data records; a hundred thousand of them say nothing.

    The kernel's receive path passes over them without telling anyone: there the others must still be served.
    """
    client, sealer = connected
    ended = _flood(client, lambda: b"".join(sealer.seal(23, b"") for _ in range(1000)))
    assert ended or victim.ready[0].backend == "kernel"


def test_flood_of_key_updates_ends_the_connection(connected: Connected) -> None:
    client, sealer = connected

    def piece() -> bytes:
        sealed = b""
        for _ in range(100):
            sealed += sealer.seal(22, KEY_UPDATE_REQUESTED)
            sealer.update_key()
        return sealed

    assert _flood(client, piece)


def test_flood_of_padding_is_no_worse_than_data(connected: Connected, still_serves: Callable[[], None]) -> None:
    """Records of one byte and 16 KiB of padding: a request so wrapped is answered, slowly or not."""
    client, sealer = connected
    for position in range(len(clients.REQUEST)):
        client.socket.sendall(sealer.seal(23, clients.REQUEST[position : position + 1], padding=(1 << 14) - 2))
    assert client.response().body == pattern(1024)
    still_serves()


def test_key_update_cut_into_records(victim: Daemon, connected: Connected) -> None:
    """A handshake message may span records (RFC 8446 section 5.1), one byte each here; then the next key is used."""
    client, sealer = connected
    pieces = [sealer.seal(22, KEY_UPDATE[i : i + 1]) for i in range(len(KEY_UPDATE))]
    sealer.update_key()
    client.socket.sendall(b"".join(pieces) + sealer.seal(23, clients.REQUEST))
    data, _ = client.read_to_end()
    if victim.ready[0].backend == "user":
        assert pattern(1024) in data


def test_data_between_the_parts_of_a_message(victim: Daemon, connected: Connected) -> None:
    client, sealer = connected
    client.socket.sendall(
        sealer.seal(22, KEY_UPDATE[:2]) + sealer.seal(23, KEEP_ALIVE) + sealer.seal(22, KEY_UPDATE[2:])
    )
    reason = client.alert()
    assert reason == "SSLV3_ALERT_UNEXPECTED_MESSAGE" or victim.ready[0].backend == "kernel"
