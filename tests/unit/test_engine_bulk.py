"""User record layer, much at once: buffers for many records, ciphertext that waits for the service, what is between."""

import random
import threading
from collections.abc import Iterator

import pytest
from kdaemon_pyx import engine as e
from support.records import CLOSE_NOTIFY, Keys, RecordPeer, RunningEngine, established, start
from support.waiting import eventually

KEY_UPDATE = b"\x18\x00\x00\x01\x00"


@pytest.fixture(params=[False, True], ids=["push", "pull"])
def running(request: pytest.FixtureRequest) -> Iterator[RunningEngine]:
    engine = start("off", pull=request.param, deadlines_ms={"close": 2000})
    yield engine
    engine.stop()


def records(peer: RecordPeer, count: int) -> tuple[bytes, bytes]:
    """Records of many sizes: what is in them, and as they are on the wire."""
    chosen = random.Random(count)
    noise = chosen.randbytes(16384)
    pieces = [noise[:size] for size in chosen.choices([1, 100, 5000, 16383, 16384], [1, 1, 2, 2, 10], k=count)]
    return b"".join(pieces), b"".join(peer.tx.seal(23, piece) for piece in pieces)


def sending(peer: RecordPeer, wire: bytes) -> threading.Thread:
    thread = threading.Thread(target=peer.sock.sendall, args=(wire,))
    thread.start()
    return thread


@pytest.mark.parametrize("late", [False, True], ids=["reads", "reads-late"])
def test_a_flood_of_records_comes_back_whole(running: RunningEngine, late: bool) -> None:
    peer, _ = established(running)
    data, wire = records(peer, 600)
    sender = sending(peer, wire)
    if late:  # the service has taken what it can, and the rest waits as it is
        eventually(lambda: running.engine.counters()["bulk_receives"] > 0, "as much was received as one buffer takes")
    assert peer.receive_data(len(data)) == data
    sender.join()
    assert running.engine.counters()["bulk_receives"] > 0


def test_a_key_update_in_the_middle_of_a_flood(running: RunningEngine) -> None:
    peer, conn = established(running)
    before, wire = records(peer, 100)
    wire += peer.seal(KEY_UPDATE, 22)
    key = Keys(0x1301, 3)
    peer.rekey(tx=key)
    after, rest = records(peer, 101)
    sender = sending(peer, wire + rest)
    assert peer.receive_data(len(before)) == before
    assert running.event(e.EVENT_CONTROL_RECORD, conn)[2:4] == (22, KEY_UPDATE)
    running.engine.rekey(conn, 0, key.key, key.iv, key.secret)
    running.engine.flush()
    assert peer.receive_data(len(after)) == after
    sender.join()


def test_an_end_behind_a_flood_comes_last(running: RunningEngine) -> None:
    peer, conn = established(running)
    data, wire = records(peer, 60)
    sender = sending(peer, wire + peer.tx.seal(*CLOSE_NOTIFY))
    assert peer.receive_data(len(data)) == data
    assert peer.receive_to_end() == [CLOSE_NOTIFY]
    sender.join()
    peer.sock.close()
    assert running.event(e.EVENT_CLOSED, conn)[2] in ("peer", "service")


def test_a_forged_record_in_a_flood_ends_it(running: RunningEngine) -> None:
    peer, conn = established(running)
    data, wire = records(peer, 60)
    forged = bytearray(peer.tx.seal(23, b"forged"))
    forged[-1] ^= 1
    _, more = records(peer, 61)
    sender = threading.Thread(target=lambda: [peer.sock.sendall(wire + forged), _try_to_send(peer, more)])
    sender.start()
    received = b""
    while (record := peer.receive_record())[0] == 23:
        received += record[1]
    assert record == (21, b"\x02\x14")  # bad_record_mac
    assert data.startswith(received)  # and nothing of what came behind it
    peer.sock.close()
    sender.join()
    assert running.event(e.EVENT_CLOSED, conn)[2] == "record"


def _try_to_send(peer: RecordPeer, wire: bytes) -> None:
    try:
        peer.sock.sendall(wire)
    except OSError:
        pass


def test_waiting_connections_keep_no_buffer(running: RunningEngine) -> None:
    peers = [established(running)[0] for _ in range(80)]  # more than there are buffers for bulk
    for peer in peers:
        data, wire = records(peer, 40)
        sender = sending(peer, wire + peer.tx.seal(23, b"end")[:-1])  # a partial record is held
        assert peer.receive_data(len(data)) == data
        sender.join()
    assert running.engine.counters()["bulk_receives"] >= 40
    eventually(lambda: running.engine.counters()["buffers_in_use"] <= 80, "a small buffer each")
    for peer in peers:
        peer.sock.close()
    eventually(lambda: running.engine.counters()["buffers_in_use"] == 0, "all buffers are back")
