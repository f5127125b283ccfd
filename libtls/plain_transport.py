"""The asyncio transport of a connection without TLS: what `libtls.aio` has with `tls=False`, until `aio.start_tls`.

One task reads and one writes, each with one operation in flight. For the few lines before STARTTLS, not for speed.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from libtls.connection import WRITE_PIECE_SIZE, Connection
from libtls.errors import ArenaFull, Cancelled, RingFull, TlsError
from libtls.functions import tls_start
from libtls.operation import Operation

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

READ_SIZE = 16384
HIGH_WATER = 65536
RETRY_S = 0.001  # ring or arena were full

Wait = Callable[[Operation[Any]], Awaitable[Any]]
Secured = Callable[[asyncio.AbstractEventLoop, Connection, asyncio.BaseProtocol], asyncio.Transport]


class PlainTransport(asyncio.Transport):
    """A libtls connection without TLS as a transport. Extra info: `libtls`, the Connection. Not thread-safe."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connection: Connection,
        protocol: asyncio.BaseProtocol,
        wait: Wait,
        secured: Secured,
    ) -> None:
        super().__init__({"libtls": connection})
        self._loop = loop
        self._connection = connection
        self._protocol = protocol
        self._wait = wait
        self._secured = secured
        self._may_read = asyncio.Event()
        self._may_read.set()
        self._reading: Operation[bytes] | None = None
        self._waiting = bytearray()
        self._to_write = asyncio.Event()
        self._high, self._low = HIGH_WATER, HIGH_WATER // 4
        self._paused = False
        self._eof_wanted = False
        self._closing = False
        self._halting = False
        self._lost = False
        loop.call_soon(protocol.connection_made, self)
        self._begin()

    async def start_tls(self, server_name: str, **options: Any) -> asyncio.Transport:
        """See the function."""
        await self._halt()
        protocol: Any = self._protocol
        reader = getattr(protocol, "_stream_reader", None)  # of a StreamReaderProtocol
        if reader is not None and reader._buffer:
            self._halting = False
            self._begin()
            raise TlsError(errno.EPROTO, "START_TLS: the reader holds bytes from before TLS, which nobody has read")
        try:
            await self._wait(tls_start(self._connection, server_name, **options))
        except BaseException as error:
            self._fail(error if isinstance(error, Exception) else ConnectionAbortedError("START_TLS was cancelled"))
            raise
        self._closing = self._lost = True  # what comes now is the other transport's
        return self._secured(self._loop, self._connection, _Taken(protocol))

    async def _halt(self) -> None:
        """All that was written is sent, nothing is in flight, and the protocol has what was received."""
        if self._closing or self._lost or self._eof_wanted or self._halting:
            raise ConnectionError("the transport is closing")
        self._halting = True
        self._to_write.set()
        self._may_read.set()
        if self._reading is not None and not self._reading.done:
            # What arrives before it is cancelled is the protocol's, as plain bytes.
            self._connection.lane.cancel(self._reading.raw)
        await asyncio.gather(self._reader, self._writer)
        if self._lost or self._closing:
            raise ConnectionError("the connection ended before TLS was started")

    def _begin(self) -> None:
        self._reader = self._loop.create_task(self._read())
        self._writer = self._loop.create_task(self._write())

    # Reading

    def is_reading(self) -> bool:
        return self._may_read.is_set() and not self._closing

    def pause_reading(self) -> None:
        self._may_read.clear()

    def resume_reading(self) -> None:
        self._may_read.set()

    async def _read(self) -> None:
        while not self._halting and not self._closing:
            await self._may_read.wait()
            if self._halting or self._closing:
                return
            try:
                self._reading = self._connection.read_operation(READ_SIZE)
                data = await self._wait(self._reading)
            except (RingFull, ArenaFull):
                await asyncio.sleep(RETRY_S)
                continue
            except Cancelled:
                return
            except TlsError as error:
                self._fail(error)
                return
            self._reading.destroy()
            self._reading = None
            if self._closing:
                return
            if not data:
                if not self._protocol.eof_received():  # type: ignore[attr-defined]
                    self.close()
                return
            if not self._halting:
                await self._may_read.wait()
            self._deliver(data)

    def _deliver(self, data: bytes) -> None:
        if not isinstance(self._protocol, asyncio.BufferedProtocol):
            self._protocol.data_received(data)  # type: ignore[attr-defined]
            return
        while data:
            with memoryview(self._protocol.get_buffer(len(data))).cast("B") as target:
                size = min(len(target), len(data))
                target[:size] = data[:size]
            self._protocol.buffer_updated(size)
            data = data[size:]

    # Writing

    def write(self, data: ReadableBuffer) -> None:
        if self._eof_wanted:
            raise RuntimeError("write_eof() was called")
        if self._closing or self._lost:
            return
        self._waiting += memoryview(data).cast("B")
        self._to_write.set()
        if not self._paused and len(self._waiting) > self._high:
            self._paused = True
            self._protocol.pause_writing()

    async def _write(self) -> None:
        while True:
            await self._to_write.wait()
            if self._lost:
                return
            if self._waiting:
                piece = bytes(self._waiting[:WRITE_PIECE_SIZE])
            elif self._closing or self._eof_wanted or self._halting:
                break
            else:
                self._to_write.clear()
                continue
            try:
                await self._wait(self._connection.write_operation(piece))
            except (RingFull, ArenaFull):
                await asyncio.sleep(RETRY_S)
                continue
            except TlsError as error:
                self._fail(error)
                return
            del self._waiting[: len(piece)]
            if self._paused and len(self._waiting) <= self._low:
                self._paused = False
                self._protocol.resume_writing()
        await self._end()

    async def _end(self) -> None:
        """Everything is sent: what ends this direction follows."""
        try:
            if self._closing:
                await self._wait(self._connection.close_operation())
                self._gone(None)
            elif self._eof_wanted:
                await self._wait(self._connection.shutdown_operation())
        except TlsError as error:
            self._fail(error)

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        if not self._closing:
            self._eof_wanted = True
            self._to_write.set()

    def get_write_buffer_size(self) -> int:
        return len(self._waiting)

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._low, self._high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = high if high is not None else (4 * low if low is not None else HIGH_WATER)
        self._low = low if low is not None else self._high // 4

    # The end

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if self._closing or self._lost:
            return
        self._closing = True
        self._may_read.set()
        self._to_write.set()
        if self._eof_wanted and self._writer.done():
            self._writer = self._loop.create_task(self._end())

    def abort(self) -> None:
        self._waiting.clear()
        self._fail(None)

    def _fail(self, error: Exception | None) -> None:
        if self._lost:
            return
        self._closing = True
        self._waiting.clear()
        try:
            self._connection.close_operation(timeout=0.001)
        except (TlsError, OSError):
            pass  # the daemon is gone, and the connection with it
        self._gone(error)

    def _gone(self, error: Exception | None) -> None:
        if not self._lost:
            self._lost = True
            self._to_write.set()
            self._may_read.set()
            self._loop.call_soon(self._protocol.connection_lost, error)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol


class _Taken(asyncio.Protocol):
    """Stands in for a protocol that was told `connection_made` before, until its new transport is there."""

    def __init__(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.set_protocol(self._protocol)


async def start_tls(transport: asyncio.BaseTransport, server_name: str = "", **options: Any) -> asyncio.Transport:
    """Like the loop's `start_tls`: the transport to use from here on, same protocol; options as of `tls_start`.

    `transport` is one of `create_connection(tls=False)` or `create_server(tls=False)` and must not be used afterwards.
    With streams use `start_tls_streams`. If the handshake fails, the connection is closed.
    """
    if not isinstance(transport, PlainTransport):
        raise TypeError(f"only a transport without TLS can start it, not {transport!r}")
    return await transport.start_tls(server_name, **options)


async def start_tls_streams(writer: asyncio.StreamWriter, server_name: str = "", **options: Any) -> None:
    """Like `StreamWriter.start_tls`: the streams go on with TLS. TlsError (EPROTO): the reader has unread bytes."""
    await writer.drain()
    protocol: Any = writer.transport.get_protocol()
    transport = await start_tls(writer.transport, server_name, **options)
    # What asyncio's own does (StreamReaderProtocol._replace_writer), and the reader pauses the new transport, too.
    writer._transport = transport  # type: ignore[attr-defined]
    protocol._replace_writer(writer)
    if (reader := protocol._stream_reader) is not None:
        reader._transport = transport
