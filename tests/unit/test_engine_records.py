"""The engine and both of its record layers: a client that knows the keys, an echo service, no TLS handshake.

The kernel's record layer is tested where there is one, in a guest kernel (scripts/guest).
"""

import os
import resource
import socket
import threading
from collections.abc import Iterator

import pytest
from kdaemon_pyx import engine as e
from kdaemon_pyx.echo_service import EchoService
from kdaemon_pyx.record import RecordProtection
from support.records import (
    AEAD_LIMIT,
    CLOSE_NOTIFY,
    HELLO,
    LAYERS,
    Keys,
    RecordPeer,
    RunningEngine,
    established,
    install_arguments,
    start,
)
from support.waiting import eventually


@pytest.fixture(params=LAYERS)
def layer_of_running(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["push", "pull"])
def running(request: pytest.FixtureRequest, layer_of_running: str) -> Iterator[RunningEngine]:
    engine = start(layer_of_running, pull=request.param == "pull", deadlines_ms={"close": 2000})
    yield engine
    engine.stop()


def test_events_are_taken_in_parts() -> None:
    running = start("off")
    socks = [running.connect() for _ in range(6)]
    for sock in socks:
        sock.sendall(HELLO)
    conns = {running.event(e.EVENT_RECORDS)[1] for _ in socks}  # all are there, and none is left in the queue
    assert len(conns) == 6 and not running.engine.events()
    for conn in conns:
        running.engine.close(conn)
    running.engine.flush()
    for sock in socks:
        assert sock.recv(1) == b""
        sock.close()
    eventually(lambda: running.engine.counters()["connections"] == 0, "the connections are gone")
    first, second, third = running.engine.events(4), running.engine.events(4), running.engine.events(4)
    assert [len(first), len(second), len(third)] == [4, 2, 0]
    assert {event[:2] for event in first + second} == {(e.EVENT_CLOSED, conn) for conn in conns}
    running.stop()


@pytest.mark.parametrize("suite", [0x1301, 0x1302, 0x1303])
def test_echoes_small_and_large(running: RunningEngine, suite: int) -> None:
    peer, conn = established(running, suite)
    for size in (1, 100, 16384, 16385, 40000):
        data = bytes(i % 253 for i in range(size))
        peer.send(data)
        assert peer.receive_data(size) == data
    peer.send(b"\x01\x00", 21)
    assert peer.receive_to_end() == [CLOSE_NOTIFY]
    assert running.event(e.EVENT_CLOSED, conn)[2] == "peer"


def test_bulk_both_ways_keeps_every_byte(running: RunningEngine) -> None:
    peer, _ = established(running)
    data = bytes(i * i % 251 for i in range(1 << 16)) * 64
    sender = threading.Thread(target=peer.send, args=(data,))
    sender.start()
    assert peer.receive_data(len(data)) == data
    sender.join()
    peer.sock.close()


def test_handshake_bytes_go_up_whole_and_down_in_order(running: RunningEngine) -> None:
    sock = running.connect()
    for byte in HELLO:
        sock.sendall(bytes([byte]))
    kind, conn, listener, data = running.event(e.EVENT_RECORDS)
    assert (kind, listener, data) == (e.EVENT_RECORDS, 7, HELLO)
    assert running.engine.counters()["events"] == 1
    running.engine.send(conn, b"one")
    running.engine.send(conn, b"two" * 10000)
    running.engine.receive(conn)
    running.engine.flush()
    assert RecordPeer(sock).receive_exactly(30003) == b"one" + b"two" * 10000
    sock.sendall(HELLO * 3 + HELLO[:7])
    assert running.event(e.EVENT_RECORDS, conn)[3] == HELLO * 3
    running.engine.receive(conn)
    running.engine.flush()
    sock.sendall(HELLO[7:])
    assert running.event(e.EVENT_RECORDS, conn)[3] == HELLO
    running.engine.close(conn, b"alert!!")
    running.engine.flush()
    assert RecordPeer(sock).receive_exactly(7) == b"alert!!"
    assert sock.recv(1) == b""
    sock.close()
    assert running.event(e.EVENT_CLOSED, conn)[2] == "control"


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01\x41\x01", b"\x16\x02\x00", b"\x00"])
def test_what_cannot_be_a_record_goes_up_at_once(running: RunningEngine, garbage: bytes) -> None:
    sock = running.connect()
    sock.sendall(garbage)
    assert running.event(e.EVENT_RECORDS)[3] == garbage
    sock.close()


def test_data_glued_to_the_last_handshake_record_at_every_split(running: RunningEngine) -> None:
    for suite in (0x1301, 0x1303):
        probe = RecordPeer(socket.socket(), suite)
        flight = HELLO + probe.seal(b"first") + probe.seal(b"second")
        probe.sock.close()
        for split in range(len(HELLO), len(flight) + 1):
            sock = running.connect()
            sock.sendall(flight[:split])
            _, conn, _, data = running.event(e.EVENT_RECORDS)
            running.engine.install(conn, **install_arguments(suite, leftover=data[len(HELLO) :]))
            running.engine.flush()
            running.event(e.EVENT_INSTALLED, conn)
            sock.sendall(flight[split:])
            assert RecordPeer(sock, suite).receive_data(11) == b"firstsecond"
            sock.close()
            running.event(e.EVENT_CLOSED, conn)


def test_records_cut_anywhere(running: RunningEngine) -> None:
    peer, _ = established(running)
    stream = peer.seal(b"a" * 50) + peer.seal(b"") + peer.seal(b"b" * 3)
    for byte in stream:
        peer.sock.sendall(bytes([byte]))
    assert peer.receive_data(53) == b"a" * 50 + b"b" * 3
    peer.sock.close()


def test_end_without_close_notify_is_truncation(running: RunningEngine) -> None:
    peer, conn = established(running)
    peer.send(b"ping")
    peer.sock.shutdown(socket.SHUT_WR)
    assert peer.receive_to_end() == [(23, b"ping"), CLOSE_NOTIFY]
    assert running.event(e.EVENT_CLOSED, conn)[2] == "truncated"


def test_forged_record_is_answered_with_bad_record_mac(running: RunningEngine) -> None:
    peer, conn = established(running)
    record = bytearray(peer.seal(b"ping"))
    record[-1] ^= 1
    peer.sock.sendall(record)
    assert peer.receive_to_end() == [(21, b"\x02\x14")]
    peer.sock.close()
    assert running.event(e.EVENT_CLOSED, conn)[2] == "record"


@pytest.mark.parametrize(
    ("wire", "alert"),
    [(b"\x17\x03\x03\x41\x01", 22), (b"\x14\x03\x03\x00\x01\x01", 10), (b"\x16\x03\x03\x00\x20" + b"x" * 32, 10)],
)
def test_malformed_records_have_their_alerts(running: RunningEngine, wire: bytes, alert: int) -> None:
    peer, conn = established(running)
    peer.sock.sendall(wire)
    # The kernel does not look at the outer type: for it these are records that do not decrypt.
    assert peer.receive_to_end() == [(21, bytes([2, 20 if running.layer == "require" and alert == 10 else alert]))]
    peer.sock.close()
    assert running.event(e.EVENT_CLOSED, conn)[2] == "record"


def adopted(running: RunningEngine) -> tuple[RecordPeer, int]:
    """A connection in the client role."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ours = socket.create_connection(listening.getsockname(), timeout=10)
        theirs, _ = listening.accept()
    theirs.settimeout(10)
    running.engine.adopt(ours.detach(), 1)
    running.engine.flush()
    conn = running.event(e.EVENT_CONNECTED)[1]
    running.engine.install(conn, **install_arguments())
    running.engine.flush()
    running.event(e.EVENT_INSTALLED, conn)
    return RecordPeer(theirs), conn


def test_handshake_messages_go_up_whole(running: RunningEngine) -> None:
    peer, conn = adopted(running)
    message = b"\x04\x00\x00\x0a0123456789"
    peer.send(message[:3], 22)
    peer.send(message[3:9], 22)
    peer.send(message[9:] + message, 22)
    assert running.event(e.EVENT_CONTROL_RECORD, conn)[3] == message * 2
    peer.send(message[:3], 22)
    peer.send(b"data between the pieces")
    assert peer.receive_to_end()[-1] == (21, b"\x02\x0a")
    peer.sock.close()


@pytest.mark.parametrize(
    ("client_role", "header"),
    [
        (False, b"\x04\x00\x00\x0a"),
        (False, b"\x0b\x00\x10\x00"),
        (True, b"\x01\x00\x00\x80"),
        (True, b"\x04\x02\x01\x0a"),
        (True, b"\x18\x00\x00\x09"),
    ],
    ids=["ticket for a server", "certificate", "hello", "ticket too long", "key update too long"],
)
def test_a_message_that_is_refused_goes_up_with_its_header(
    running: RunningEngine, client_role: bool, header: bytes
) -> None:
    """Nothing of its body is kept: the control thread judges it at once."""
    peer, conn = adopted(running) if client_role else established(running)
    peer.send(header[:2], 22)
    peer.send(header[2:] + b"body", 22)
    assert running.event(e.EVENT_CONTROL_RECORD, conn)[2:4] == (22, header + b"body")
    running.engine.close(conn)
    running.engine.flush()
    peer.sock.close()


@pytest.mark.parametrize("kind", [23, 22])
def test_floods_cost_the_connection(running: RunningEngine, kind: int) -> None:
    if kind == 23 and running.layer == "require":
        pytest.skip("the kernel skips empty records by itself")
    peer, conn = established(running)
    payload = b"" if kind == 23 else b"\x04\x00\x00\x00"
    peer.sock.sendall(b"".join(peer.seal(payload, kind) for _ in range(200)))
    assert peer.receive_to_end() == [(21, b"\x02\x0a")]
    peer.sock.close()
    assert running.event(e.EVENT_CLOSED, conn)[2] == "limit"


@pytest.mark.parametrize("layer", LAYERS)
def test_reader_that_stops_keeps_memory_bounded(layer: str) -> None:
    running = start(layer, deadlines_ms={"send": 300, "close": 200})
    try:
        peer, conn = established(running)
        peer.sock.settimeout(0.2)
        record, sent = peer.seal(b"x" * 16384), 0
        try:
            while True:
                peer.sock.sendall(record)
                sent += 16384
                record = peer.seal(b"x" * 16384)
        except OSError:
            pass
        assert running.engine.counters()["bytes_in"] < sent
        assert running.engine.counters()["buffers_in_use"] <= 4
        assert running.event(e.EVENT_CLOSED, conn)[2] == "deadline"
        peer.sock.close()
    finally:
        running.stop()


@pytest.mark.parametrize("layer", LAYERS)
def test_handshake_deadline(layer: str) -> None:
    running = start(layer, deadlines_ms={"handshake": 100})
    try:
        sock = running.connect()
        assert sock.recv(1) == b""
        assert running.event(e.EVENT_CLOSED)[2] == "deadline"
        sock.close()
    finally:
        running.stop()


@pytest.mark.parametrize("layer", LAYERS)
def test_descriptors_run_out_and_come_back(layer: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # io_uring's accept keeps the limit that held when it was armed: set it before there is an engine.
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))  # noqa: PTH208
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 40, hard))
    held: list[int] = []
    try:
        running = start(layer)
        first, _ = established(running)
        waiting = socket.socket()
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                held.append(os.dup(0))
        waiting.connect(running.listening.getsockname())
        assert running.event(e.EVENT_ACCEPT_PAUSED)[1:] == (7, 24)
        assert running.engine.counters()["accept_paused"] < 100  # it waits, it does not spin
        first.sock.close()  # frees two: the client's end and the engine's
        waiting.sendall(HELLO)
        assert running.event(e.EVENT_RECORDS)[3] == HELLO
        waiting.close()
        running.stop()
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("layer", LAYERS)
def test_slots_run_out_and_come_back(layer: str) -> None:
    running = start(layer, connections_max=2)
    first, second = established(running), established(running)
    third = running.connect()
    assert third.recv(1) == b""
    third.close()
    first[0].send(b"\x01\x00", 21)
    assert running.event(e.EVENT_CLOSED, first[1])[2] == "peer"
    again = established(running)
    assert again[1] != first[1]
    running.engine.close(first[1])  # a handle that is gone names nothing
    running.engine.flush()
    again[0].send(b"ping")
    assert again[0].receive_data(4) == b"ping"
    for peer, _ in (first, second, again):
        peer.sock.close()
    running.stop()


def test_drain_closes_the_idle_and_tells(running: RunningEngine) -> None:
    peer, _ = established(running)
    silent = running.connect()
    running.engine.drain(5000)
    running.engine.flush()
    assert running.event(e.EVENT_UNLISTENED) == (e.EVENT_UNLISTENED, 7)
    assert peer.receive_to_end() == [CLOSE_NOTIFY]
    peer.sock.close()
    silent.close()
    assert running.event(e.EVENT_DRAINED) == (e.EVENT_DRAINED, 0)


def test_drain_deadline_cuts(running: RunningEngine) -> None:
    peer, conn = established(running)
    peer.send(b"x" * 16384)
    assert len(peer.receive_data(16384)) == 16384
    running.engine.drain(100)
    running.engine.flush()
    # The peer never closes its side: lingering ends with the drain deadline.
    assert running.event(e.EVENT_DRAINED)[1] == 1
    assert running.event(e.EVENT_CLOSED, conn)[2] == "drain_deadline"
    peer.sock.close()


def test_many_connections_at_once(running: RunningEngine) -> None:
    peers = [established(running) for _ in range(200)]
    for i, (peer, _) in enumerate(peers):
        peer.send(b"%d" % i * 50)
    for i, (peer, _) in enumerate(peers):
        expected = b"%d" % i * 50
        assert peer.receive_data(len(expected)) == expected
    for peer, _ in peers:
        peer.sock.close()
    for _, conn in peers:
        assert running.event(e.EVENT_CLOSED, conn)[2] == "truncated"


def test_arguments_are_checked() -> None:
    engine = e.Engine(services={0: EchoService()})
    arguments = install_arguments()
    bad_arguments = {"tx_key": b"k" * 15, "rx_iv": b"i" * 11, "cipher_suite": 0x1399, "service": 1, "tx_secret": b""}
    for name, bad in bad_arguments.items():
        with pytest.raises(ValueError, match="install"):
            engine.install(1, **{**arguments, name: bad})
    with pytest.raises(ValueError, match="deadlines"):
        e.Engine(deadlines_ms={"lunch": 1})


@pytest.mark.parametrize("layer", LAYERS)
def test_nothing_is_sealed_beyond_the_limit(layer: str) -> None:
    running = start(layer)
    peer, conn = established(running, tx_sequence=AEAD_LIMIT - 70)
    peer.rx = RecordProtection(0x1301, Keys(0x1301, 2).key, Keys(0x1301, 2).iv, AEAD_LIMIT - 70, False)
    sealed = 0
    try:
        for _ in range(100):
            peer.send(b"ping")
            content_type, _ = peer.receive_record()
            sealed += 1
            if content_type != 23:
                break
    except (EOFError, OSError):
        pass
    assert 1 <= sealed <= 70
    peer.sock.close()
    assert running.event(e.EVENT_CLOSED, conn)[2] == "limit"
    running.stop()


def test_an_adopted_socket_that_does_not_block() -> None:
    """Its flags are shared with whoever passed it: the engine neither spins nor is blocked."""
    running = start("off")
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    running.engine.adopt(os.dup(theirs.fileno()), 5)
    running.engine.flush()
    conn, cookie, error = running.event(e.EVENT_CONNECTED)[1:]
    assert (cookie, error) == (5, 0)
    running.engine.install(conn, **install_arguments())
    running.engine.flush()
    running.event(e.EVENT_INSTALLED, conn)
    peer = RecordPeer(ours)
    peer.send(b"ping" * 1000)
    assert peer.receive_data(4000) == b"ping" * 1000
    assert running.engine.counters()["turns"] < 200
    for _ in range(100):
        theirs.setblocking(False)
        peer.send(b"ping")
        try:
            peer.receive_data(4)
        except EOFError:
            break
    ours.close()
    theirs.close()
    running.event(e.EVENT_CLOSED, conn)
    running.stop()
