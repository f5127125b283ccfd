"""libtls.aio: asyncio's streams and protocols over the rings."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import uvloop
from support.certificates import Issued
from support.daemon import Daemon, serve
from support.protocols import Recorder
from support.rings import Peer, server_context
from support.waiting import DEADLINE_S

from libtls import Lane, aio, errors


@pytest.fixture(scope="module", params=["off", pytest.param("require", marks=pytest.mark.guest)])
def daemon(
    request: pytest.FixtureRequest, issued: Issued, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Daemon]:
    directory: Path = tmp_path_factory.mktemp("site")
    (directory / "index.html").write_bytes(b"<!doctype html><title>kdaemon</title>\n")
    arguments = ("--workers", "1", "--ktls", request.param)
    with serve(directory, *arguments, issued=issued, ends_by_itself=True) as daemon:
        yield daemon
        daemon.stop()


def run(
    daemon: Daemon,
    main: Callable[[Lane], Awaitable[None]],
    new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
) -> None:
    """`main` in an event loop of its own, with a lane of its own."""

    async def bounded() -> None:
        lane = Lane.attach(daemon.socket_path, operations=4096)
        try:
            async with asyncio.timeout(DEADLINE_S):
                await main(lane)
        finally:
            lane.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(bounded())


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_streams_both_ends(daemon: Daemon, new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def main(lane: Lane) -> None:
        async with await aio.start_server(echo, certificate="localhost", lane=lane) as server:
            reader, writer = await aio.open_connection("localhost", server.port, cafile=daemon.ca, lane=lane)
            data = os.urandom(3 << 20)

            async def send() -> None:
                for begin in range(0, len(data), 100_000):
                    writer.write(data[begin : begin + 100_000])
                    await writer.drain()
                writer.write_eof()

            sender = asyncio.create_task(send())
            assert hashlib.sha256(await reader.read()).digest() == hashlib.sha256(data).digest()
            await sender
            writer.close()
            await writer.wait_closed()

    run(daemon, main, new_loop)


def test_a_server_that_asyncio_and_ssl_talk_to(daemon: Daemon) -> None:
    async def main(lane: Lane) -> None:
        context = ssl.create_default_context(cafile=str(daemon.ca))
        async with await aio.start_server(echo, certificate="localhost", lane=lane) as server:
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", server.port, ssl=context, server_hostname="localhost"
            )
            for size in (1, 1000, 100_000, 1_000_000):
                data = os.urandom(size)
                writer.write(data)
                assert await reader.readexactly(size) == data
            writer.close()

    run(daemon, main)


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        ("close_notify", type(None)),
        ("FIN", errors.Truncated),
        ("RST", ConnectionResetError),
        ("broken record", errors.HandshakeError),
    ],
)
def test_how_a_connection_was_lost(daemon: Daemon, peer: Peer, ending: str, expected: type) -> None:
    """connection_lost() is told once, and why."""

    def end() -> None:
        plain, _ = peer.listener.accept()
        assert daemon.issued is not None
        tls = server_context(daemon.issued).wrap_socket(plain, server_side=True)
        tls.sendall(b"x")
        assert tls.recv(1) == b"y"
        if ending == "close_notify":
            tls.unwrap().close()
        elif ending == "FIN":
            tls.shutdown(socket.SHUT_WR)
        elif ending == "RST":
            tls.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            with socket.socket(fileno=tls.detach()) as raw:
                raw.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))  # a record that nobody can open
        tls.close()

    async def main(lane: Lane) -> None:
        ended = asyncio.get_running_loop().run_in_executor(None, end)
        transport, protocol = await aio.create_connection(Recorder, "localhost", peer.port, cafile=daemon.ca, lane=lane)
        assert isinstance(protocol, Recorder)
        assert await protocol.has(1) == b"x"
        transport.write(b"y")
        assert isinstance(await protocol.lost, expected)
        await ended
        transport.write(b"ignored")
        transport.close()
        transport.abort()
        await asyncio.sleep(0)
        assert protocol.calls.count("lost") == 1

    run(daemon, main)


def test_addresses(daemon: Daemon) -> None:
    """Both ends tell the same of an IPv6 connection, and a server its callers apart."""

    async def main(lane: Lane) -> None:
        callers: set[tuple[str, int]] = set()

        async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            callers.add(writer.get_extra_info("peername"))
            writer.write(repr(writer.get_extra_info("sockname")).encode())
            writer.close()

        async with await aio.start_server(note, "::1", certificate="localhost", lane=lane) as server:
            own = set()
            for _ in range(3):
                reader, writer = await aio.open_connection("::1", server.port, cafile=daemon.ca, lane=lane)
                assert writer.get_extra_info("peername") == ("::1", server.port)
                own.add(writer.get_extra_info("sockname"))
                assert await reader.read() == repr(("::1", server.port)).encode()
                writer.close()
        assert callers == own
        assert {host for host, _ in own} == {"::1"}

    run(daemon, main)


def test_a_page(daemon: Daemon) -> None:
    async def main(lane: Lane) -> None:
        reader, writer = await aio.open_connection("localhost", daemon.port, cafile=daemon.ca, lane=lane)
        writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200 OK")
        writer.close()
        await writer.wait_closed()

    run(daemon, main)


def test_pause_reading_is_back_pressure(daemon: Daemon) -> None:
    async def main(lane: Lane) -> None:
        server_side: list[Recorder] = []

        def factory() -> Recorder:
            server_side.append(Recorder())
            return server_side[-1]

        async with await aio.create_server(factory, certificate="localhost", lane=lane) as server:
            reader, writer = await aio.open_connection("localhost", server.port, cafile=daemon.ca, lane=lane)
            while not server_side:
                await asyncio.sleep(0)
            peer = server_side[0]
            while "made" not in peer.calls:
                await asyncio.sleep(0)
            assert isinstance(peer.transport, aio.Transport)
            peer.transport.pause_reading()
            payload = bytes(16 << 20)
            writer.write(payload)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await writer.drain()
            assert len(peer.data) <= 1 << 20
            peer.transport.resume_reading()
            writer.close()
            await peer.lost
            assert len(peer.data) == len(payload)
            assert await reader.read() == b""

    run(daemon, main)


def test_a_chat_with_a_thousand_clients(daemon: Daemon) -> None:
    """Everybody gets what one of them says."""
    clients = 1000 if "CI" in os.environ and "KDAEMON_GUEST" not in os.environ else 200

    async def main(lane: Lane) -> None:
        writers: set[asyncio.StreamWriter] = set()

        async def member(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.add(writer)
            while line := await reader.readline():
                for other in writers:
                    other.write(line)
            writers.discard(writer)
            writer.close()

        gate = asyncio.Semaphore(50)

        async def join(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            async with gate:
                return await aio.open_connection("localhost", port, cafile=daemon.ca, lane=lane)

        async with await aio.start_server(member, certificate="localhost", lane=lane) as server:
            members = await asyncio.gather(*(join(server.port) for _ in range(clients)))
            while len(writers) < clients:
                await asyncio.sleep(0)
            members[0][1].write(b"hello, all\n")
            lines = await asyncio.gather(*(reader.readline() for reader, _ in members))
            assert set(lines) == {b"hello, all\n"}
            for _, writer in members:
                writer.close()

    run(daemon, main)
