"""The programs under test: TLS servers that echo, swallow (`sink`) or pour out (`source`), each in its fastest form.

python -m benchmarks.rings.programs NAME MODE CERT KEY     prints its port, serves until standard input ends
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any

PIECE = bytes(262144)
PIECES_PER_TURN = 16
READ_BYTES = {"echo": 16384, "sink": 262144, "source": 16384}


class Echo(asyncio.Protocol):
    """As in uvloop's examples/bench/echoserver.py."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.write = transport.write  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        del self.write


class BufferedEcho(asyncio.BufferedProtocol):
    """The same without a bytes object per read."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.buffer = memoryview(bytearray(262144))

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.transport.write(self.buffer[:nbytes])  # type: ignore[attr-defined]


class Sink(asyncio.Protocol):
    def data_received(self, data: bytes) -> None:
        pass


class BufferedSink(BufferedEcho):
    def buffer_updated(self, nbytes: int) -> None:
        pass


class Source(asyncio.Protocol):
    """Writes until the transport says that it has enough. uvloop's says nothing after a reset, told later."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.paused = self.lost = False
        asyncio.get_running_loop().call_soon(self.pour)

    def pour(self) -> None:
        for _ in range(PIECES_PER_TURN):
            if self.paused or self.lost:
                return
            self.transport.write(PIECE)  # type: ignore[attr-defined]
        asyncio.get_running_loop().call_soon(self.pour)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self.pour()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True


PROTOCOLS: dict[tuple[str, bool], type[asyncio.BaseProtocol]] = {
    ("echo", False): Echo,
    ("echo", True): BufferedEcho,
    ("sink", False): Sink,
    ("sink", True): BufferedSink,
    ("source", False): Source,
    ("source", True): Source,
}


def server_context(certificate: str, key: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(certificate, key)
    return context


def say(port: int) -> None:
    print(port, flush=True)


async def until_standard_input_ends() -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(0, ended.set)
    await ended.wait()


async def over_ssl(protocol: type[asyncio.BaseProtocol], context: ssl.SSLContext) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(protocol, "127.0.0.1", 0, ssl=context, backlog=1024)
    say(server.sockets[0].getsockname()[1])
    await until_standard_input_ends()


async def over_libtls(protocol: type[asyncio.BaseProtocol]) -> None:
    from libtls import aio, tls_init  # noqa: PLC0415 - the others measure without it

    tls_init(operations=4096)
    server = await aio.create_server(protocol, certificate="localhost", backlog=1024)
    say(server.port)
    await until_standard_input_ends()


def serve_blocking(connection: ssl.SSLSocket, mode: str) -> None:
    """One thread per connection."""
    buffer = memoryview(bytearray(READ_BYTES[mode]))
    with contextlib.suppress(OSError), connection:
        while True:
            if mode == "source":
                connection.sendall(PIECE)
            elif not (count := connection.recv_into(buffer)):
                return
            elif mode == "echo":
                connection.sendall(buffer[:count])


def blocking_ssl(mode: str, context: ssl.SSLContext) -> None:
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    say(listener.getsockname()[1])

    def accept() -> None:
        while True:
            plain, _ = listener.accept()
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = context.wrap_socket(plain, server_side=True)
            threading.Thread(target=serve_blocking, args=(connection, mode), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    sys.stdin.read()


def blocking_libtls(mode: str) -> None:
    import libtls  # noqa: PLC0415

    libtls.tls_init(operations=4096)
    listener = libtls.tls_wait(libtls.tls_listen(certificate="localhost", backlog=1024))
    say(listener.port)

    def serve(connection: libtls.Connection) -> None:
        buffer = memoryview(bytearray(READ_BYTES[mode]))
        with contextlib.suppress(OSError), connection:
            while True:
                if mode == "source":
                    connection.write(PIECE)
                elif not (count := connection.readinto(buffer)):
                    return
                elif mode == "echo":
                    connection.write(buffer[:count])

    def accept() -> None:
        while True:
            threading.Thread(target=serve, args=(listener.accept(),), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    sys.stdin.read()


def run_uvloop(main: Coroutine[Any, Any, None]) -> None:
    import uvloop  # noqa: PLC0415

    uvloop.run(main)


def run(name: str, mode: str, certificate: str, key: str) -> None:
    library, *forms = name.split("-")
    if "blocking" in forms:
        if library == "libtls":
            blocking_libtls(mode)
        else:
            blocking_ssl(mode, server_context(certificate, key))
        return
    protocol = PROTOCOLS[mode, "buffered" in forms]
    loop: Callable[[Coroutine[Any, Any, None]], None] = run_uvloop if "uvloop" in (library, *forms) else asyncio.run
    loop(over_libtls(protocol) if library == "libtls" else over_ssl(protocol, server_context(certificate, key)))


if __name__ == "__main__":
    run(*sys.argv[1:])
    os._exit(0)  # threads that wait for connections do not matter any more
