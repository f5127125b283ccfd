"""Send buffers so small that TCP does not take the kernel's encrypted records at once: no response may end early.

A send over kTLS completes with what was encrypted. What TCP has no room for stays in the kernel's record layer, and a
FIN or CLOSE right then would overtake it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import select
import socket
import ssl
import struct
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.certificates import Issued
from support.content import pattern
from support.daemon import serve, status
from support.waiting import eventually

pytestmark = pytest.mark.guest

SIZES = (20_000, 33_000, 60_000, 100_001)
READERS = 8
RESPONSES_EACH = {"uml": 75, "qemu": 12}.get(os.environ.get("KDAEMON_GUEST", ""), 75)
WRITE_MEMORY = Path("/proc/sys/net/ipv4/tcp_wmem")


@pytest.fixture
def small_send_buffers() -> Iterator[None]:
    """TCP's send buffers of the whole guest: smaller than a record."""
    if not os.environ.get("KDAEMON_GUEST"):
        pytest.skip("changes the send buffers of the whole system: in guests only")
    before = WRITE_MEMORY.read_text()
    WRITE_MEMORY.write_text("4096 4096 4096\n")
    yield
    WRITE_MEMORY.write_text(before)


def stands_still(connection: socket.socket) -> bool:
    """Whether the receive queue has stopped growing: the window is full, and the sender's buffers behind it."""
    lengths = []
    for _ in range(2):
        select.select([], [], [], 0.001)
        lengths.append(struct.unpack("i", fcntl.ioctl(connection, termios.FIONREAD, bytes(4)))[0])
    return lengths[0] == lengths[1]


def read_slowly(address: tuple[str, int], context: ssl.SSLContext, chance: random.Random) -> str:
    """One response, `Connection: close`; what was wrong with it, or "".

    Everything that fits is let in before it is read, so that room comes in large pieces and wakes the kernel's own
    worker, which pushes records, and the daemon at the same time.
    """
    size = chance.choice(SIZES)
    with socket.socket() as plain:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, chance.choice([4096, 8192, 16384, 24000]))
        plain.settimeout(60)
        plain.connect(address)
        with context.wrap_socket(plain, server_hostname="localhost", suppress_ragged_eofs=False) as tls:
            tls.sendall(f"GET /{size}.bin HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            received = b""
            with contextlib.suppress(ssl.SSLEOFError):
                while piece := tls.recv(16384):
                    received += piece
                    if chance.random() < 0.5:
                        eventually(lambda: stands_still(tls), "the sender has filled what it can fill")
                _, _, body = received.partition(b"\r\n\r\n")
                return "" if body == pattern(size) else f"{len(body)} of {size} bytes, then close_notify"
    return f"{len(received)} bytes with head of {size}, without close_notify"


@pytest.mark.guest_core
def test_no_response_ends_early(small_send_buffers: None, issued: Issued, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    for size in SIZES:
        (site / f"{size}.bin").write_bytes(pattern(size))
    context = ssl.create_default_context(cafile=str(issued.ca))
    wrong: list[str] = []
    answered: list[int] = []
    with serve(site, "--ktls", "require", "--workers", "1", issued=issued) as daemon:

        def run(number: int) -> None:
            chance = random.Random(number)
            for _ in range(RESPONSES_EACH):
                found = read_slowly(daemon.address, context, chance)
                answered.append(1)
                if found:
                    wrong.append(found)

        readers = [threading.Thread(target=run, args=(number,)) for number in range(READERS)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        (worker,) = status(daemon)["workers"]  # type: ignore[misc]
        waits = worker["engine"]["flush_waits"]
        print(f"{len(answered)} responses, {len(wrong)} wrong, {waits} waits for TCP before an end")
    assert not wrong, f"{len(wrong)} of {len(answered)}: {wrong[:5]}"
    assert len(answered) == READERS * RESPONSES_EACH
    assert waits, "nothing was ever held back: this proves nothing"
