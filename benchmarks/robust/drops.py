"""Connections opened and dropped at random points of handshake and transfer, by FIN and by RST."""

from __future__ import annotations

import random
import socket
import ssl
import threading
from collections import Counter

from benchmarks.robust.client import PATIENCE_S, context
from benchmarks.robust.server import Server

POINTS = (
    "before a byte", "in the ClientHello", "behind the ClientHello", "in the server's flight", "in the Finished",
    "behind the Finished", "in the request", "in the response", "behind close_notify",
)  # fmt: skip
REQUEST = b"GET /%b HTTP/1.1\r\nHost: localhost\r\nUser-Agent: %b\r\n\r\n"


class _Client:
    """One connection whose bytes are in our hands."""

    def __init__(self, address: tuple[str, int], tls: ssl.SSLContext) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = tls.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")
        self.socket = socket.create_connection(address, PATIENCE_S)

    def flight(self) -> bytes:
        return self._outgoing.read()

    def receive(self, size: int = 65536) -> int:
        data = self.socket.recv(size)
        self._incoming.write(data)
        return len(data)

    def drop(self, reset: bool) -> None:
        if reset:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.socket.close()


def _handshake(client: _Client) -> bytes:
    """Up to the Finished, which is given back."""
    while True:
        try:
            client.tls.do_handshake()
            return client.flight()
        except ssl.SSLWantReadError:
            if flight := client.flight():
                client.socket.sendall(flight)
            if not client.receive():
                raise ConnectionError("the daemon closed in the middle of a good handshake") from None


def _go_to(client: _Client, point: str, chance: random.Random, name: bytes) -> None:
    if point == POINTS[0]:
        return
    try:
        client.tls.do_handshake()
    except ssl.SSLWantReadError:
        hello = client.flight()
    if point == POINTS[1]:
        client.socket.sendall(hello[: chance.randrange(1, len(hello))])
        return
    client.socket.sendall(hello)
    if point == POINTS[2]:
        return
    if point == POINTS[3]:
        client.receive(chance.randrange(1, 1000))
        return
    finished = _handshake(client)
    if point == POINTS[4]:
        client.socket.sendall(finished[: chance.randrange(1, len(finished))])
        return
    client.socket.sendall(finished)
    if point == POINTS[5]:
        return
    # Of a response that is dropped there is always more to come.
    client.tls.write(REQUEST % (b"huge.bin" if point in POINTS[7:] else name, b"x" * chance.randrange(3000)))
    request = client.flight()
    if point == POINTS[6]:
        client.socket.sendall(request[: chance.randrange(1, len(request))])
        return
    client.socket.sendall(request)
    for _ in range(chance.randrange(0, 10)):
        client.receive(chance.randrange(1, 100_000))
    if point == POINTS[8]:
        try:
            client.tls.unwrap()
        except ssl.SSLError:
            pass  # no answer is waited for
        client.socket.sendall(client.flight())


def drop_connections(server: Server, count: int, names: list[str], seed: int, threads: int) -> Counter[str]:
    """Opens and drops `count` connections; how many at each point. A point "failed" holds what went wrong before it."""
    dropped: Counter[str] = Counter()
    lock = threading.Lock()

    def run(number: int) -> None:
        chance = random.Random(seed + number)
        tls = context(server.ca)
        for _ in range(count // threads + (number < count % threads)):
            point = chance.choice(POINTS)
            client = _Client(server.address, tls)
            try:
                _go_to(client, point, chance, chance.choice(names).encode())
            except (OSError, ssl.SSLError) as error:
                point = f"failed: {point}: {type(error).__name__}: {error}"
            client.drop(chance.random() < 0.5)
            with lock:
                dropped[point] += 1

    running = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return dropped
