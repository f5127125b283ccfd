"""Connections that end at random points of handshake and transfer: the engine gives everything back."""

import random
import socket
import struct

import pytest
from kdaemon_pyx import engine as e
from support.records import HELLO, LAYERS, RecordPeer, RunningEngine, install_arguments, start

ABORT = struct.pack("ii", 1, 0)  # SO_LINGER 0: close sends a reset


def act(running: RunningEngine, chance: random.Random, sock: socket.socket) -> None:
    """One connection's life, cut somewhere."""
    sock.settimeout(0.2)
    sock.sendall(HELLO[: chance.randrange(1, len(HELLO) + 1)] if chance.random() < 0.1 else HELLO)
    if chance.random() < 0.1:
        return
    peer = RecordPeer(sock)
    glued = peer.seal(bytes(chance.randrange(1, 3000)))
    if chance.random() < 0.3:
        sock.sendall(glued[: chance.randrange(len(glued))])
    try:
        conn = running.event(e.EVENT_RECORDS, timeout_s=0.2)[1]
    except TimeoutError:
        return
    if chance.random() < 0.1:
        running.engine.send(conn, bytes(5000))
        running.engine.close(conn, b"alert")
        running.engine.flush()
        return
    running.engine.install(conn, **install_arguments())
    running.engine.flush()
    if chance.random() < 0.2:
        return
    for _ in range(chance.randrange(6)):
        choice = chance.random()
        data = peer.seal(bytes(chance.randrange(1, 60000)))
        if choice < 0.5:
            sock.sendall(data)
        elif choice < 0.6:
            sock.sendall(data[: chance.randrange(len(data))])
            return
        elif choice < 0.7:
            peer.send(b"\x01\x00", 21)
        elif choice < 0.8:
            peer.send(b"\x18\x00\x00\x01\x00", 22)
        elif choice < 0.9:
            sock.sendall(bytes(chance.randrange(1, 300)))
        else:
            running.engine.close(conn)
            running.engine.flush()
        if chance.random() < 0.3:
            sock.recv(chance.randrange(1, 100000))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("seed", range(3))
def test_everything_is_given_back(layer: str, seed: int) -> None:
    chance = random.Random(seed)
    running = start(layer, deadlines_ms={"close": 100, "send": 500, "handshake": 2000})
    waiting: list[socket.socket] = []
    for _ in range(40):
        sock = running.connect()
        try:
            act(running, chance, sock)
        except OSError:
            pass  # the engine was right to end it
        if chance.random() < 0.3:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
        waiting.append(sock)
        if len(waiting) > 15:
            waiting.pop(chance.randrange(len(waiting))).close()
    for sock in waiting[10:]:
        sock.close()
    # The rest is still open and in the middle of something: stop() joins it all, and checks the counters.
    running.stop()
    assert running.error is None
    counters = running.engine.counters()
    assert sum(count for name, count in counters.items() if name.startswith("closed_")) == counters["accepted"]
    for sock in waiting[:10]:
        sock.close()
