"""New keys on established connections, the peer's KeyUpdate and our own, in both record layers (RFC 8446 4.6.3).

The kernel's record layer takes new keys since Linux 6.14; before, a KeyUpdate is the orderly end of the connection.
"""

import pytest
from kdaemon_pyx import engine as e
from kdaemon_pyx.record import RecordProtection
from support.records import AEAD_LIMIT, CLOSE_NOTIFY, LAYERS, REKEY, Keys, established, start

REKEYING = [
    LAYERS[0],
    pytest.param("require", id="kernel", marks=[
        pytest.mark.guest, pytest.mark.guest_new, pytest.mark.skipif(not REKEY, reason="this kernel takes no new keys"),
    ]),
]  # fmt: skip


@pytest.mark.parametrize("pull", [False, True])
@pytest.mark.parametrize("layer", REKEYING)
def test_key_update_both_ways(layer: str, pull: bool) -> None:
    running = start(layer, pull=pull)
    peer, conn = established(running)
    key_update = b"\x18\x00\x00\x01\x01"
    peer.sock.sendall(peer.seal(b"old key") + peer.seal(key_update, 22))
    _, _, content_type, data, keys = running.event(e.EVENT_CONTROL_RECORD, conn)
    assert (content_type, data) == (22, key_update)
    assert keys == (0x1301, Keys(0x1301, 2).secret, Keys(0x1301, 1).secret, b"\x09" * 32)
    peer.rekey(tx=Keys(0x1301, 3))
    peer.send(b"new key")
    assert peer.receive_data(7) == b"old key"
    new_rx, new_tx = Keys(0x1301, 3), Keys(0x1301, 4)
    running.engine.rekey(conn, 0, new_rx.key, new_rx.iv, new_rx.secret)
    running.engine.rekey(conn, 1, new_tx.key, new_tx.iv, new_tx.secret, b"\x18\x00\x00\x01\x00")
    running.engine.flush()
    assert running.event(e.EVENT_REKEYED, conn)[2:] == (0, 0)
    assert running.event(e.EVENT_REKEYED, conn)[2:] == (1, 0)
    received = [peer.receive_record()]
    if received == [(23, b"new key")]:  # the answer and the echo are independent: either may come first
        received.append(peer.receive_record())
        peer.rekey(rx=new_tx)
    else:
        peer.rekey(rx=new_tx)
        received.append(peer.receive_record())
    assert sorted(received) == [(22, b"\x18\x00\x00\x01\x00"), (23, b"new key")]
    peer.send(b"still here")
    assert peer.receive_data(10) == b"still here"
    peer.send(key_update, 22)
    assert running.event(e.EVENT_CONTROL_RECORD, conn)[4][1:3] == (new_tx.secret, new_rx.secret)
    peer.sock.close()
    running.stop()


@pytest.mark.parametrize("layer", REKEYING)
def test_no_data_stands_between_a_key_update_and_its_key(layer: str) -> None:
    """Echoes go out all the time while the key changes: each is under the key that its place in the stream says."""
    running = start(layer)
    peer, conn = established(running)
    data = b"x" * 100
    for round_ in range(20):
        peer.sock.sendall(b"".join(peer.seal(data) for _ in range(10)))
        new = Keys(0x1301, 10 + round_)
        running.engine.rekey(conn, 1, new.key, new.iv, new.secret, b"\x18\x00\x00\x01\x00")
        running.engine.rekey(conn, 1, new.key, new.iv, new.secret, b"\x18\x00\x00\x01\x00")  # decided already
        running.engine.flush()
    updates = echoed = 0
    while updates < 20 or echoed < 20 * 10 * len(data):
        content_type, content = peer.receive_record()
        if content_type == 22:
            assert content == b"\x18\x00\x00\x01\x00"
            peer.rekey(rx=Keys(0x1301, 10 + updates))
            updates += 1
        else:
            echoed += len(content)
    assert (updates, echoed) == (20, 20 * 10 * len(data))
    peer.sock.close()
    running.stop()


@pytest.mark.parametrize("layer", [pytest.param("require", marks=pytest.mark.guest)])
@pytest.mark.skipif(REKEY, reason="this kernel takes new keys")
def test_key_update_without_rekey_is_an_orderly_end(layer: str) -> None:
    running = start(layer)
    peer, conn = established(running)
    peer.send(b"answered")
    assert peer.receive_data(8) == b"answered"
    peer.send(b"\x18\x00\x00\x01\x00", 22)
    assert peer.receive_to_end() == [CLOSE_NOTIFY]
    peer.sock.close()
    assert running.event(e.EVENT_CLOSED, conn)[2] == "key_update"
    running.stop()


@pytest.mark.parametrize("layer", REKEYING)
def test_a_new_key_is_asked_for_before_the_limit(layer: str) -> None:
    running = start(layer)
    peer, conn = established(running, tx_sequence=AEAD_LIMIT - 65536 - 1)
    peer.rx = RecordProtection(0x1301, Keys(0x1301, 2).key, Keys(0x1301, 2).iv, AEAD_LIMIT - 65536 - 1, False)
    for _ in range(3):
        peer.send(b"ping")
        assert peer.receive_data(4) == b"ping"
    assert running.event(e.EVENT_KEY_LIMIT, conn)[2][:2] == (0x1301, Keys(0x1301, 2).secret)
    new = Keys(0x1301, 5)
    running.engine.rekey(conn, 1, new.key, new.iv, new.secret, b"\x18\x00\x00\x01\x00")
    running.engine.flush()
    assert peer.receive_record()[0] == 22
    peer.rekey(rx=new)
    peer.send(b"on and on")
    assert peer.receive_data(9) == b"on and on"
    peer.sock.close()
    running.stop()
