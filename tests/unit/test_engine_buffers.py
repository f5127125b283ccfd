"""The engine's buffers: a peak of connections costs memory while it lasts, and not for ever."""

from pathlib import Path

from kdaemon_pyx import engine as e
from support.records import RecordPeer, RunningEngine, established, start
from support.waiting import eventually

REST_MS = 50
PEAK = 150  # of connections; one look gives back the pages of 64 buffers
LENGTH = 16384
RECEIVED = 1 << 20  # at least, into the buffers that the kernel takes in turn


def anonymous_bytes() -> int:
    """Of this process."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no Anonymous: in smaps_rollup")


def hold_buffers(running: RunningEngine) -> list[tuple[RecordPeer, int, bytes]]:
    """Connections that wait in a buffer each for the end of a record; the last byte of each is given back with it."""
    held = []
    for number in range(PEAK):
        peer, conn = established(running)
        record = peer.seal(bytes([number]) * LENGTH)
        peer.sock.sendall(record[:-1])
        held.append((peer, conn, record[-1:]))
    eventually(lambda: running.engine.counters()["buffers_in_use"] >= PEAK, "every connection has a buffer")
    return held


def test_pages_of_a_peak_go_back_to_the_kernel() -> None:
    running = start("off", buffers_rest_ms=REST_MS)
    try:
        for _peak in range(2):  # the second takes the same buffers again
            held = hold_buffers(running)
            assert running.engine.counters()["buffers_resident"] >= PEAK
            before = anonymous_bytes()
            kept = PEAK // 2
            for number, (peer, conn, _last) in enumerate(held):
                if number != kept:
                    peer.sock.close()
                    running.event(e.EVENT_CLOSED, conn)
            assert running.engine.counters()["buffers_in_use"] == 1
            eventually(lambda: running.engine.counters()["buffers_resident"] == 1, "unwanted buffers have no pages")
            assert before - anonymous_bytes() > (PEAK - 1) * LENGTH * 3 // 4
            # The one in the middle was in use all the time
            peer, conn, last = held[kept]
            peer.sock.sendall(last)
            assert peer.receive_data(LENGTH) == bytes([kept]) * LENGTH
            before = anonymous_bytes()
            assert running.engine.counters()["receive_buffers_resident"] > 0  # the kernel may be filling them
            peer.sock.close()
            running.event(e.EVENT_CLOSED, conn)
            eventually(lambda: running.engine.counters()["receive_buffers_resident"] == 0, "an idle engine has none")
            assert before - anonymous_bytes() > RECEIVED
    finally:
        running.stop()
