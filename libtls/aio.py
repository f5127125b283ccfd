"""libtls for asyncio: streams, and transports under which existing protocols run unchanged.

A lane belongs to the event loop that uses it first, which watches the lane's doorbell.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from typing import Any

from kdaemon_pyx import client_abi as abi
from kdaemon_pyx.client_ring import Operation as RingOperation

from libtls.connection import Connection, Info, Listener
from libtls.errors import ArenaFull, DaemonGone, RingFull, TlsError
from libtls.functions import current_lane, tls_connect, tls_listen, tls_open
from libtls.operation import Lane, Operation
from libtls.transport import Transport, close_unwanted, lane_reader, wait

__all__ = [
    "Server", "Transport", "create_connection", "create_server", "open_connection", "start_server", "start_tls",
    "start_tls_streams", "wait",
]  # fmt: skip

ACCEPTS_IN_FLIGHT = 16
RETRY_S = 0.01  # ring or arena were full, or the daemon has no room for another connection


class Server:
    """A listener that hands its connections to protocols; closed at the end of an `async with` block."""

    def __init__(self, listener: Listener, factory: Callable[[], asyncio.BaseProtocol]) -> None:
        self.listener = listener
        self.port = listener.port
        self._factory = factory
        self._loop = asyncio.get_running_loop()
        self._closed = self._loop.create_future()
        for _ in range(ACCEPTS_IN_FLIGHT):
            self._accept()

    def is_serving(self) -> bool:
        return not self._closed.done()

    def _accept(self) -> None:
        if self._closed.done():
            return
        lane = self.listener.lane
        try:
            raw = lane.post(abi.ACCEPT, self.listener.handle)
        except RingFull:
            self._loop.call_later(RETRY_S, self._accept)
            return
        except DaemonGone:
            self._stop()
            return
        lane.ring.on_done(raw, self._accepted)
        lane_reader(lane).soon()

    def _accepted(self, raw: RingOperation) -> None:
        if raw.result > 0:
            self._ask(Connection(self.listener.lane, raw.result))
            self._accept()
        elif raw.result == -errno.EMFILE:
            self._loop.call_later(RETRY_S, self._accept)
        else:
            self._stop()

    def _ask(self, connection: Connection) -> None:
        """Who is there? Then its protocol begins."""
        try:
            asked = connection.info_operation()
        except (RingFull, ArenaFull):
            self._loop.call_later(RETRY_S, self._ask, connection)
            return
        except DaemonGone:
            return
        connection.lane.ring.on_done(asked.raw, lambda _: self._begin(connection, asked))

    def _begin(self, connection: Connection, asked: Operation[Info]) -> None:
        try:
            Transport(self._loop, connection, self._factory(), asked.value)
        except Exception as error:  # noqa: BLE001 - the factory's; the server goes on
            close_unwanted(connection.lane, connection.handle)
            if not isinstance(error, TlsError):
                self._loop.call_exception_handler(
                    {"message": "Error on transport creation for incoming connection", "exception": error}
                )

    def _stop(self) -> None:
        if not self._closed.done():
            self._closed.set_result(None)

    def close(self) -> None:
        """Stops accepting; connections go on."""
        if not self._closed.done():
            self._stop()
            try:
                self.listener.lane.post(abi.CLOSE, self.listener.handle)
            except TlsError:
                return  # the daemon is gone, and the listener with it
            lane_reader(self.listener.lane).soon()

    async def wait_closed(self) -> None:
        await asyncio.shield(self._closed)

    async def serve_forever(self) -> None:
        """Until the server is closed or the task is cancelled."""
        try:
            await self.wait_closed()
        finally:
            self.close()

    async def __aenter__(self) -> Server:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()
        await self.wait_closed()


async def create_connection(
    protocol_factory: Callable[[], asyncio.BaseProtocol],
    host: str,
    port: int,
    *,
    tls: bool = True,
    lane: Lane | None = None,
    **options: Any,
) -> tuple[Transport, asyncio.BaseProtocol]:
    """Like the loop's `create_connection(ssl=...)`; options as of `tls_open`. tls=False: bytes as they are, until
    `start_tls`; options as of `tls_connect`.
    """
    connect = tls_open if tls else tls_connect
    connection = await wait(connect(host, port, lane=lane or current_lane(), **options))
    try:
        info = await wait(connection.info_operation())
        protocol = protocol_factory()
        return Transport(asyncio.get_running_loop(), connection, protocol, info), protocol
    except BaseException:
        close_unwanted(connection.lane, connection.handle)
        raise


async def create_server(
    protocol_factory: Callable[[], asyncio.BaseProtocol],
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    lane: Lane | None = None,
    **options: Any,
) -> Server:
    """Like the loop's `create_server(ssl=...)`; options as of `tls_listen`, `tls=False` among them."""
    raw = tls_listen(host, port, lane=lane or current_lane(), **options)
    return Server(await wait(raw), protocol_factory)


async def open_connection(
    host: str, port: int, *, limit: int = 65536, lane: Lane | None = None, **options: Any
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Like `asyncio.open_connection(ssl=...)`; options as of `create_connection`."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=limit, loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport, _ = await create_connection(lambda: protocol, host, port, lane=lane, **options)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


async def start_server(
    client_connected: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None],
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    limit: int = 65536,
    lane: Lane | None = None,
    **options: Any,
) -> Server:
    """Like `asyncio.start_server(ssl=...)`; options as of `tls_listen`."""
    loop = asyncio.get_running_loop()

    def factory() -> asyncio.StreamReaderProtocol:
        reader = asyncio.StreamReader(limit=limit, loop=loop)
        return asyncio.StreamReaderProtocol(reader, client_connected, loop=loop)

    return await create_server(factory, host, port, lane=lane, **options)


async def start_tls(transport: asyncio.BaseTransport, server_name: str = "", **options: Any) -> Transport:
    """Like the loop's `start_tls`, but the transport to use from here on is the same; options as of `tls_start`.

    `transport` is one of `create_connection(tls=False)` or `create_server(tls=False)`. What is written meanwhile goes
    out with TLS. If the handshake fails, the connection is closed.
    """
    if not isinstance(transport, Transport):
        raise TypeError(f"only a transport of libtls.aio without TLS can start it, not {transport!r}")
    await transport.start_tls(server_name, **options)
    return transport


async def start_tls_streams(writer: asyncio.StreamWriter, server_name: str = "", **options: Any) -> None:
    """Like `StreamWriter.start_tls`: the streams go on with TLS. TlsError (EPROTO): the reader has unread bytes."""
    await writer.drain()
    await start_tls(writer.transport, server_name, **options)
