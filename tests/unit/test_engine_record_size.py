"""RFC 8449 in the engine: no record is larger than the peer takes, whatever is sent."""

import errno
import socket
from collections.abc import Iterator

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from kdaemon_pyx import engine as e
from kdaemon_pyx.record import RecordError, RecordProtection
from support.records import HELLO, Keys, RecordPeer, RunningEngine, install_arguments, start

from kdaemon import ktls

RECORD_OVERFLOW = 22
DATA = bytes(i * i % 251 for i in range(70000))


@pytest.fixture(params=["push", "pull"])
def running(request: pytest.FixtureRequest) -> Iterator[RunningEngine]:
    engine = start("off", pull=request.param == "pull", deadlines_ms={"close": 2000})
    yield engine
    engine.stop()


def established(running: RunningEngine, record_size_max: int) -> tuple[RecordPeer, int]:
    sock = running.connect()
    sock.sendall(HELLO)
    conn = running.event(e.EVENT_RECORDS)[1]
    running.engine.install(conn, **install_arguments(record_size_max=record_size_max))
    running.engine.flush()
    running.event(e.EVENT_INSTALLED, conn)
    return RecordPeer(sock), conn


@pytest.mark.parametrize("limit", [64, 65, 100, 1000, 4097, 16384, 16385])
def test_no_record_is_larger_than_the_limit(running: RunningEngine, limit: int) -> None:
    peer, _ = established(running, limit)
    for size in (1, limit - 2, limit - 1, limit, 2 * limit + 1, 16384, len(DATA)):
        peer.send(DATA[:size])
        echoed = b""
        sizes = []
        while len(echoed) < size:
            content_type, piece = peer.receive_record()
            assert content_type == 23
            sizes.append(len(piece))
            echoed += piece
        assert echoed == DATA[:size]
        assert max(sizes) <= limit - 1  # the type is a byte of it
        if size >= limit - 1:
            assert max(sizes) == min(limit - 1, size)
    peer.sock.close()


def test_many_small_answers_share_a_record_up_to_the_limit(running: RunningEngine) -> None:
    peer, _ = established(running, 200)
    peer.sock.sendall(b"".join(peer.seal(DATA[i : i + 30]) for i in range(0, 3000, 30)))
    echoed, sizes = b"", []
    while len(echoed) < 3000:
        piece = peer.receive_record()[1]
        sizes.append(len(piece))
        echoed += piece
    assert echoed == DATA[:3000]
    assert max(sizes) <= 199
    peer.sock.close()


def test_control_records_are_cut(running: RunningEngine) -> None:
    peer, conn = established(running, 64)
    running.engine.send_control(conn, 22, DATA[:1000])
    running.engine.flush()
    received = []
    while sum(map(len, received)) < 1000:
        content_type, piece = peer.receive_record()
        assert content_type == 22
        received.append(piece)
    assert b"".join(received) == DATA[:1000]
    assert [len(piece) for piece in received] == [63] * 15 + [55]
    peer.send(b"\x01\x00", 21)
    assert peer.receive_to_end() == [(21, b"\x01\x00")]


@pytest.mark.parametrize("limit", [0, 63, 16386, -1])
def test_limits_that_no_peer_may_have(running: RunningEngine, limit: int) -> None:
    with pytest.raises(ValueError, match="record_size_max"):
        running.engine.install(1, **install_arguments(record_size_max=limit))


def padded(data_size: int, padding: int) -> bytes:
    """The first record under a client's key, sealed by `cryptography`."""
    keys = Keys(0x1301, 1)
    inner = DATA[:data_size] + b"\x17" + bytes(padding)
    header = b"\x17\x03\x03" + (len(inner) + 16).to_bytes(2, "big")
    return header + AESGCM(keys.key).encrypt(keys.iv, inner, header)


def test_padding_counts(running: RunningEngine) -> None:
    """RFC 8446 §5.4: content, type and padding are 2^14 + 1 bytes at most; one more is a record_overflow."""
    peer, _ = established(running, 16385)
    peer.sock.sendall(padded(100, 16284))
    assert peer.receive_data(100) == DATA[:100]
    peer.sock.close()
    peer, conn = established(running, 16385)
    peer.sock.sendall(padded(100, 16285))
    assert peer.receive_to_end() == [(21, bytes((2, RECORD_OVERFLOW)))]
    assert running.event(e.EVENT_CLOSED, conn)[2] == "record"
    keys = Keys(0x1301, 1)
    with pytest.raises(RecordError) as raised:
        RecordProtection(0x1301, keys.key, keys.iv, encrypt=False).open(padded(100, 16285))
    assert raised.value.errno == errno.EMSGSIZE


# --- where the kernel does the records, or would: old ones can make none that are small enough ---


SMALLER_RECORDS = ktls.probe().tx_max_payload


@pytest.mark.guest
@pytest.mark.guest_new
@pytest.mark.skipif(not SMALLER_RECORDS, reason="TLS_TX_MAX_PAYLOAD_LEN is in Linux since 6.19")
@pytest.mark.parametrize("pull", [False, True])
def test_the_kernel_makes_smaller_records(pull: bool) -> None:
    running = start("require", pull=pull, ktls_record_size=True)
    for limit in (64, 1000, 16384):
        peer, conn = established(running, limit)
        peer.send(DATA[:5000])
        echoed, sizes = b"", []
        while len(echoed) < 5000:
            piece = peer.receive_record()[1]
            sizes.append(len(piece))
            echoed += piece
        assert echoed == DATA[:5000]
        assert max(sizes) <= limit - 1
        running.engine.send_control(conn, 22, DATA[:200])
        running.engine.flush()
        handshake = b""
        while len(handshake) < 200:
            content_type, piece = peer.receive_record()
            assert content_type == 22
            assert len(piece) <= limit - 1
            handshake += piece
        assert handshake == DATA[:200]
        peer.sock.close()
    running.stop()


def installed_small(layer: str) -> tuple[RunningEngine, socket.socket, int]:
    running = start(layer)
    sock = running.connect()
    sock.sendall(HELLO)
    conn = running.event(e.EVENT_RECORDS)[1]
    running.engine.install(conn, **install_arguments(record_size_max=1000))
    running.engine.flush()
    return running, sock, conn


@pytest.mark.guest
def test_auto_gives_the_connection_to_the_user_layer_and_says_why() -> None:
    running, sock, conn = installed_small("auto")
    assert running.event(e.EVENT_INSTALLED, conn)[2:] == ("user", "record-size")
    peer = RecordPeer(sock)
    peer.send(DATA[:5000])
    assert len(peer.receive_record()[1]) == 999
    sock.close()
    running.stop()


@pytest.mark.guest
def test_require_refuses_it() -> None:
    running, sock, conn = installed_small("require")
    assert running.event(e.EVENT_CLOSED, conn)[3] == errno.EOPNOTSUPP
    sock.close()
    running.stop()
