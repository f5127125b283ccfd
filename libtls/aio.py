"""libtls for asyncio: streams, and a Transport under which existing protocols run unchanged.

A lane belongs to the event loop that uses it first. The loop watches the lane's doorbell; while completions keep
coming, the ring is looked at once per turn of the loop instead, without system calls of its own.
"""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from kdaemon_pyx import client_abi as abi
from kdaemon_pyx.client_ring import Operation as RingOperation

from libtls.connection import WRITE_PIECE_SIZE, Connection, Listener
from libtls.errors import ArenaFull, DaemonGone, RingFull, TlsError, error_of
from libtls.functions import current_lane, tls_listen, tls_open
from libtls.operation import Lane, Operation

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

Value = TypeVar("Value")

ACCEPTS_IN_FLIGHT = 16
IDLE_TURNS = 2  # turns of the loop without a completion before the doorbell is asked for
HIGH_WATER = 256 * 1024
READ_SIZE_MIN = 2048  # what an idle connection keeps of the arena; a read that is filled doubles the next one
READ_SIZE_MAX = 262144


class _LaneReader:
    """Takes a lane's completions in an event loop."""

    def __init__(self, lane: Lane, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._ring = lane.ring
        self._idle_turns = 0
        self._awake = False
        self._fd = lane.ring.fileno()
        loop.add_reader(self._fd, self._rung)
        self.poll_soon()

    def poll_soon(self) -> None:
        """Something was posted: look at the ring in the next turns."""
        self._idle_turns = 0
        if not self._awake:
            self._awake = True
            self.loop.call_soon(self._poll)

    def _rung(self) -> None:
        if not self._ring.disarm():
            self.loop.remove_reader(self._fd)
            return
        self._ring.reap()
        self.poll_soon()

    def _poll(self) -> None:
        if self._ring.is_dead:
            self._awake = False
            return
        self._idle_turns = 0 if self._ring.reap() else self._idle_turns + 1
        if self._idle_turns > IDLE_TURNS and self._ring.arm():
            self._awake = False
        else:
            self.loop.call_soon(self._poll)


def _reader(lane: Lane) -> _LaneReader:
    loop = asyncio.get_running_loop()
    reader = lane.asyncio_reader
    if reader is None or reader.loop.is_closed():
        reader = lane.asyncio_reader = _LaneReader(lane, loop)
    elif reader.loop is not loop:
        raise RuntimeError("this lane belongs to another event loop: attach one per loop")
    return reader  # type: ignore[no-any-return]


async def wait(operation: Operation[Value]) -> Value:
    """The operation's value when it is done. Cancelling the task cancels the operation."""
    lane, raw = operation.lane, operation.raw
    reader = _reader(lane)
    if not raw.done:
        future = reader.loop.create_future()
        lane.ring.on_done(raw, lambda _: _resolve(future))
        reader.poll_soon()
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
        self._reading = True
        self._read_in_flight = False
        self._read_size = READ_SIZE_MIN
        self._held: RingOperation | None = None  # a read that came while reading was paused
        self._waiting: deque[memoryview] = deque()  # data that found no room in the ring or the arena
        self._waiting_size = 0
        self._in_flight = 0  # bytes of WRITEs
        self._high, self._low = HIGH_WATER, HIGH_WATER // 4
        self._paused = False
        self._closing = False
        self._eof_wanted = False
        self._close_posted = False
        self._lost = False
        loop.call_soon(protocol.connection_made, self)
        loop.call_soon(self._read)

    # Reading

    def is_reading(self) -> bool:
        return self._reading and not self._closing

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        self._reading = True
        if (held := self._held) is not None:
            self._held = None
            self._loop.call_soon(self._deliver, held)
        else:
            self._read()

    def _read(self) -> None:
        if self._read_in_flight or self._held is not None or not self._reading or self._closing or self._lost:
            return
        try:
            raw = self._lane.post(abi.READ, self._handle, length=self._read_size)
        except (RingFull, ArenaFull):
            self._loop.call_later(0.001, self._read)
            return
        except TlsError as error:
            self._fail(error)
            return
        self._read_in_flight = True
        self._lane.ring.on_done(raw, self._read_done)
        self._reader.poll_soon()

    def _read_done(self, raw: RingOperation) -> None:
        self._read_in_flight = False
        if raw.result == self._read_size:
            self._read_size = min(2 * self._read_size, READ_SIZE_MAX)
        elif 4 * raw.result < self._read_size:
            self._read_size = max(self._read_size // 2, READ_SIZE_MIN)
        if self._lost or (self._closing and raw.result <= 0):
            return
        if not self._reading and raw.result > 0:
            self._held = raw
            return
        self._deliver(raw)

    def _deliver(self, raw: RingOperation) -> None:
        if raw.result < 0:
            self._fail(error_of(raw))
        elif raw.result == 0:
            self._end_of_data()
        else:
            if isinstance(self._protocol, asyncio.BufferedProtocol):
                self._deliver_buffered(self._protocol, raw)
            else:
                data = raw.bytes()
                raw.release()
                self._protocol.data_received(data)  # type: ignore[attr-defined]
            self._read()

    def _deliver_buffered(self, protocol: asyncio.BufferedProtocol, raw: RingOperation) -> None:
        with memoryview(raw) as data:
            position = 0
            while position < len(data):
                with memoryview(protocol.get_buffer(len(data) - position)).cast("B") as target:
                    size = min(len(target), len(data) - position)
                    target[:size] = data[position : position + size]
                protocol.buffer_updated(size)
                position += size
        raw.release()

    def _end_of_data(self) -> None:
        if not self._closing and not self._protocol.eof_received():  # type: ignore[attr-defined]
            self.close()

    # Writing

    def write(self, data: ReadableBuffer) -> None:
        if self._closing or self._eof_wanted:
            raise RuntimeError("the transport is closing" if self._closing else "write_eof() was called")
        if self._lost:
            return
        view = memoryview(data).cast("B")
        if not self._waiting and len(view) <= WRITE_PIECE_SIZE:
            if view and not self._post_write(view):
                self._wait_with(bytes(view))
        else:
            self._wait_with(bytes(view))
        if not self._paused and self._in_flight + self._waiting_size > self._high:
            self._paused = True
            self._protocol.pause_writing()

    def writelines(self, list_of_data: Iterable[ReadableBuffer]) -> None:
        self.write(b"".join(list_of_data))

    def _wait_with(self, data: bytes) -> None:
        view = memoryview(data)
        self._waiting_size += len(view)
        self._waiting.extend(view[begin : begin + WRITE_PIECE_SIZE] for begin in range(0, len(view), WRITE_PIECE_SIZE))
        self._flush()

    def _post_write(self, view: memoryview) -> bool:
        """False: the ring or the arena is full just now."""
        try:
            raw = self._lane.post(abi.WRITE, self._handle, data=view)
        except (RingFull, ArenaFull):
            if not self._in_flight:
                self._loop.call_later(0.001, self._flush)
            return False
        except TlsError as error:
            self._fail(error)
            return True
        self._in_flight += len(view)
        raw.context = len(view)
        self._lane.ring.on_done(raw, self._write_done)
        self._reader.poll_soon()
        return True

    def _flush(self) -> None:
        while self._waiting and not self._lost and self._in_flight < max(self._high, WRITE_PIECE_SIZE):
            if not self._post_write(self._waiting[0]):
                return
            self._waiting_size -= len(self._waiting.popleft())
        if not self._waiting and not self._lost:
            self._finish_writing()

    def _write_done(self, raw: RingOperation) -> None:
        assert isinstance(raw.context, int)
        self._in_flight -= raw.context
        if self._lost:
            return
        if raw.result < 0:
            self._fail(error_of(raw))
            return
        self._flush()
        if self._paused and self._in_flight + self._waiting_size <= self._low:
            self._paused = False
            self._protocol.resume_writing()

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        if not self._eof_wanted and not self._closing:
            self._eof_wanted = True
            self._flush()

    def get_write_buffer_size(self) -> int:
        return self._in_flight + self._waiting_size

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._low, self._high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = high if high is not None else (4 * low if low is not None else HIGH_WATER)
        self._low = low if low is not None else self._high // 4

    # The end

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if not self._closing and not self._lost:
            self._closing = True
            self._flush()

    def abort(self) -> None:
        self._waiting.clear()
        self._waiting_size = 0
        self._fail(None)

    def _finish_writing(self) -> None:
        """Everything is posted: what ends this direction queues up behind it."""
        if self._closing and not self._close_posted:
            self._post_close(0)
        elif self._eof_wanted and not self._closing:
            self._eof_posted()

    def _eof_posted(self) -> None:
        try:
            self._lane.post(abi.SHUTDOWN, self._handle, argument=abi.SHUTDOWN_WRITE)
        except RingFull:
            self._loop.call_later(0.001, self._flush)
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
        self._reader.poll_soon()

    def _fail(self, error: Exception | None) -> None:
        """Broken, or aborted: what is queued is given up."""
        if self._lost:
            return
        self._closing = True
        if not self._close_posted and not self._lane.ring.is_dead:
            self._post_close(1)
        self._gone(error)

    def _gone(self, error: Exception | None) -> None:
        if not self._lost:
            self._lost = True
            self._held = None
            self._loop.call_soon(self._protocol.connection_lost, error)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol


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
            self._loop.call_later(0.01, self._accept)
            return
        except DaemonGone:
            self._stop()
            return
        lane.ring.on_done(raw, self._accepted)
        _reader(lane).poll_soon()

    def _accepted(self, raw: RingOperation) -> None:
        if raw.result > 0:
            Transport(self._loop, Connection(self.listener.lane, raw.result), self._factory())
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
            _reader(self.listener.lane).poll_soon()

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
    lane: Lane | None = None,
    **options: Any,
) -> tuple[Transport, asyncio.BaseProtocol]:
    """Like the loop's `create_connection(ssl=...)`; options as of `tls_open`."""
    connection = await wait(tls_open(host, port, lane=lane or current_lane(), **options))
    protocol = protocol_factory()
    return Transport(asyncio.get_running_loop(), connection, protocol), protocol


async def create_server(
    protocol_factory: Callable[[], asyncio.BaseProtocol],
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    lane: Lane | None = None,
    **options: Any,
) -> Server:
    """Like the loop's `create_server(ssl=...)`; options as of `tls_listen`."""
    raw = tls_listen(host, port, lane=lane or current_lane(), **options)
    return Server(await wait(raw), protocol_factory)


async def open_connection(
    host: str, port: int, *, limit: int = 65536, lane: Lane | None = None, **options: Any
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Like `asyncio.open_connection(ssl=...)`; options as of `tls_open`."""
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
