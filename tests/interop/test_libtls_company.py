"""Held waits: messages that come in quick succession wait for each other, a conversation of two does not."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Iterator

import pytest
from support.certificates import Issued
from support.daemon import Daemon, serve, status
from support.waiting import DEADLINE_S

from libtls import Lane, aio

KERNEL = tuple(int(part) for part in os.uname().release.split("-")[0].split("+")[0].split(".")[:2])
PEERS = 32
MESSAGES = 200


@pytest.fixture
def daemon(issued: Issued, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    directory = tmp_path_factory.mktemp("site")
    with serve(directory, "--workers", "1", "--ktls", "off", issued=issued, ends_by_itself=True) as daemon:
        yield daemon
        daemon.stop()


def engine(daemon: Daemon) -> dict[str, int]:
    counters: dict[str, int] = status(daemon)["workers"][0]["engine"]
    return counters


class Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)  # type: ignore[attr-defined]


async def converse(daemon: Daemon, port: int, messages: int) -> None:
    context = ssl.create_default_context(cafile=str(daemon.ca))
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="localhost")
    for number in range(messages):
        writer.write(number.to_bytes(64, "big"))
        assert await reader.readexactly(64) == number.to_bytes(64, "big")
    writer.close()


def run(daemon: Daemon, peers: int, messages: int) -> tuple[int, int]:
    """How many waits were held, and the turns in all."""

    async def main() -> tuple[int, int]:
        lane = Lane.attach(daemon.socket_path)
        try:
            server = await aio.create_server(Echo, "127.0.0.1", lane=lane)
            before = engine(daemon)
            async with asyncio.timeout(DEADLINE_S):
                await asyncio.gather(*(converse(daemon, server.port, messages) for _ in range(peers)))
            after = engine(daemon)
            server.close()
            return after["held_waits"] - before["held_waits"], after["turns"] - before["turns"]
        finally:
            lane.close()

    return asyncio.run(main())


def test_one_conversation_is_hardly_ever_held(daemon: Daemon) -> None:
    held, turns = run(daemon, 1, 1000)
    assert turns > 1000
    assert held <= turns // 32  # a trial now and then


@pytest.mark.skipif(KERNEL < (6, 12), reason="io_uring_enter takes a least wait since Linux 6.12")
def test_many_are_held(daemon: Daemon) -> None:
    assert run(daemon, PEERS, MESSAGES)[0] > 10


def test_no_program_no_hold(daemon: Daemon, issued: Issued) -> None:
    context = ssl.create_default_context(cafile=str(daemon.ca))
    before = engine(daemon)["held_waits"]
    for _ in range(3):
        plain = socket.create_connection((daemon.host, daemon.port))
        with context.wrap_socket(plain, server_hostname="localhost") as sock:
            sock.sendall(b"GET /missing HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert sock.recv(4096).startswith(b"HTTP/1.1 404")
    assert engine(daemon)["held_waits"] == before
