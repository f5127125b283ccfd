"""libtls for asyncio: streams, and a Transport under which existing protocols run unchanged.

A lane belongs to the event loop that uses it first, which watches the lane's doorbell. What moves a connection's
bytes is compiled (kdaemon_pyx.client_stream); the transport here is what begins and ends.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from kdaemon_pyx import client_abi as abi
from kdaemon_pyx.client_ring import Operation as RingOperation
from kdaemon_pyx.client_stream import LaneReader, Stream

from libtls.connection import Connection, Listener
from libtls.errors import DaemonGone, RingFull, TlsError, error_from
from libtls.functions import current_lane, tls_connect, tls_listen, tls_open
from libtls.operation import Lane, Operation
from libtls.plain_transport import PlainTransport, start_tls, start_tls_streams

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = [
    "PlainTransport", "Server", "Transport", "create_connection", "create_server", "open_connection", "start_server",
    "start_tls", "start_tls_streams", "wait",
]  # fmt: skip

Value = TypeVar("Value")

ACCEPTS_IN_FLIGHT = 16


def _reader(lane: Lane) -> LaneReader:
    loop = asyncio.get_running_loop()
    reader = lane.asyncio_reader
    if reader is None or reader.loop.is_closed():
        reader = lane.asyncio_reader = LaneReader(lane.ring, loop)
    elif reader.loop is not loop:
        raise RuntimeError("this lane belongs to another event loop: attach one per loop")
    assert isinstance(reader, LaneReader)
    return reader


async def wait(operation: Operation[Value]) -> Value:
    """The operation's value when it is done. Cancelling the task cancels the operation."""
    lane, raw = operation.lane, operation.raw
    reader = _reader(lane)
    if not raw.done:
        future = reader.loop.create_future()
        lane.ring.on_done(raw, lambda _: _resolve(future))
        reader.soon()
        try:
            await future
        except asyncio.CancelledError:
            if not raw.done and not lane.ring.is_dead:
                lane.cancel(raw)
            raise
    return operation.value


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Transport(asyncio.Transport):
    """A libtls connection as an asyncio transport. Extra info: `libtls`, the Connection. Not thread-safe."""

    def __init__(self, loop: asyncio.AbstractEventLoop, connection: Connection, protocol: asyncio.BaseProtocol) -> None:
        super().__init__({"libtls": connection})
        self._loop = loop
        self._lane = connection.lane
        self._handle = connection.handle
        self._protocol = protocol
        self._reader = _reader(connection.lane)
        self._stream = stream = Stream(connection.lane.ring, self._reader, connection.handle, self)
        stream.set_protocol(protocol)
        # The stream's own methods, called without a frame in between.
        self.write = stream.write  # type: ignore[method-assign]
        self.pause_reading = stream.pause_reading  # type: ignore[method-assign]
        self.resume_reading = stream.resume_reading  # type: ignore[method-assign]
        self.is_reading = stream.is_reading  # type: ignore[method-assign]
        self.get_write_buffer_size = stream.write_buffer_size  # type: ignore[method-assign]
        self.get_write_buffer_limits = stream.write_buffer_limits  # type: ignore[method-assign]
        self.set_write_buffer_limits = stream.set_write_buffer_limits  # type: ignore[method-assign]
        self._closing = False
        self._eof_wanted = False
        self._close_posted = False
        self._lost = False
        loop.call_soon(protocol.connection_made, self)
        loop.call_soon(stream.start)

    def writelines(self, list_of_data: Iterable[ReadableBuffer]) -> None:
        self.write(b"".join(list_of_data))

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        if not self._eof_wanted and not self._closing:
            self._eof_wanted = True
            self._stream.end_writing()
            self._stream.flush()

    # What the stream tells

    def ended(self, result: int, detail: int) -> None:
        if self._lost or self._closing:
            return
        if result < 0:
            self._fail(error_from(result, detail, abi.READ))
        elif not self._protocol.eof_received():  # type: ignore[attr-defined]
            self.close()

    def failed(self, result: int, detail: int) -> None:
        self._fail(error_from(result, detail, abi.WRITE))

    def raised(self, error: Exception, what: str) -> None:
        self._loop.call_exception_handler(
            {"message": f"protocol.{what}() failed", "exception": error, "transport": self, "protocol": self._protocol}
        )
        if what in ("data_received", "buffer_updated"):
            self._fail(error)

    def flushed(self) -> None:
        """Everything is posted: what ends this direction queues up behind it."""
        if self._closing and not self._close_posted:
            self._post_close(0)
        elif self._eof_wanted and not self._closing:
            self._post_eof()

    # The end

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if not self._closing and not self._lost:
            self._closing = True
            self._stream.stop()
            self._stream.flush()

    def abort(self) -> None:
        self._fail(None)

    def _post_eof(self) -> None:
        try:
            self._lane.post(abi.SHUTDOWN, self._handle, argument=abi.SHUTDOWN_WRITE)
        except RingFull:
            self._loop.call_later(0.001, self._stream.flush)
        except TlsError as error:
            self._fail(error)

    def _post_close(self, timeout_ns: int) -> None:
        try:
            raw = self._lane.ring.post(abi.CLOSE, self._handle, 0, None, timeout_ns)
        except BlockingIOError:
            self._loop.call_later(0.001, self._post_close, timeout_ns)
            return
        except OSError:
            self._gone(None)
            return
        self._close_posted = True
        self._lane.ring.on_done(raw, lambda _: self._gone(None))
        self._reader.soon()

    def _fail(self, error: Exception | None) -> None:
        """Broken, or aborted: what is queued is given up."""
        if self._lost:
            return
        self._closing = True
        self._stream.give_up()
        if not self._close_posted and not self._lane.ring.is_dead:
            self._post_close(1)
        self._gone(error)

    def _gone(self, error: Exception | None) -> None:
        if not self._lost:
            self._lost = True
            self._stream.give_up()
            self._loop.call_soon(self._protocol.connection_lost, error)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol
        self._stream.set_protocol(protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol


def _transport(
    loop: asyncio.AbstractEventLoop, connection: Connection, protocol: asyncio.BaseProtocol, tls: bool
) -> Transport | PlainTransport:
    return Transport(loop, connection, protocol) if tls else PlainTransport(loop, connection, protocol, wait, Transport)


class Server:
    """A listener that hands its connections to protocols; closed at the end of an `async with` block."""

    def __init__(self, listener: Listener, factory: Callable[[], asyncio.BaseProtocol], tls: bool = True) -> None:
        self._tls = tls
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
            self._loop.call_later(0.01, self._accept)
            return
        except DaemonGone:
            self._stop()
            return
        lane.ring.on_done(raw, self._accepted)
        _reader(lane).soon()

    def _accepted(self, raw: RingOperation) -> None:
        if raw.result > 0:
            _transport(self._loop, Connection(self.listener.lane, raw.result), self._factory(), self._tls)
            self._accept()
        elif raw.result == -errno.EMFILE:
            self._loop.call_later(0.01, self._accept)
        else:
            self._stop()

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
            _reader(self.listener.lane).soon()

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
) -> tuple[Transport | PlainTransport, asyncio.BaseProtocol]:
    """Like the loop's `create_connection(ssl=...)`; options as of `tls_open`. tls=False: bytes as they are, until
    `start_tls`; options as of `tls_connect`.
    """
    connect = tls_open if tls else tls_connect
    connection = await wait(connect(host, port, lane=lane or current_lane(), **options))
    protocol = protocol_factory()
    return _transport(asyncio.get_running_loop(), connection, protocol, tls), protocol


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
    return Server(await wait(raw), protocol_factory, options.get("tls", True))


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
