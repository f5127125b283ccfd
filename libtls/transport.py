"""A libtls connection as an asyncio transport, under which existing protocols run unchanged, before TLS and with it.

What moves the bytes is compiled (kdaemon_pyx.client_stream); the transport here is what begins and ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from kdaemon_pyx import client_abi as abi
from kdaemon_pyx.client_stream import LaneReader, Stream

from libtls.connection import Connection, Info
from libtls.errors import RingFull, TlsError, error_from
from libtls.functions import tls_start
from libtls.operation import Lane, Operation
from libtls.tls_object import TlsObject

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

Value = TypeVar("Value")

RETRY_S = 0.001  # the ring was full

# Whose value is a handle: nobody would close it if the one who waits has gone.
_OPENING = frozenset({abi.OPEN, abi.CONNECT, abi.LISTEN, abi.ACCEPT, abi.ADOPT})


def lane_reader(lane: Lane) -> LaneReader:
    """What watches the lane for the running event loop. RuntimeError: the lane belongs to another one."""
    loop = asyncio.get_running_loop()
    reader = lane.asyncio_reader
    if reader is None or reader.loop.is_closed():
        reader = lane.asyncio_reader = LaneReader(lane.ring, loop)
    elif reader.loop is not loop:
        raise RuntimeError("this lane belongs to another event loop: attach one per loop")
    assert isinstance(reader, LaneReader)
    return reader


async def wait(operation: Operation[Value]) -> Value:
    """The operation's value when it is done.

    Cancelling the task cancels the operation; a connection that was made all the same is closed.
    """
    lane, raw = operation.lane, operation.raw
    reader = lane_reader(lane)
    if not raw.done:
        future = reader.loop.create_future()
        lane.ring.on_done(raw, lambda _: _resolve(future))
        reader.soon()
        try:
            await future
        except asyncio.CancelledError:
            if not raw.done:
                with contextlib.suppress(TlsError):  # the ring is full, or the daemon gone
                    lane.cancel(raw)
            if raw.opcode in _OPENING:
                lane.ring.on_done(raw, lambda done: close_unwanted(lane, done.result))
            raise
    return operation.value


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def close_unwanted(lane: Lane, handle: int) -> None:
    """Closes what an operation made and nobody took; a negative result is none."""
    if handle > 0 and not lane.ring.is_dead:
        try:
            lane.post(abi.CLOSE, handle)
        except RingFull:
            lane_reader(lane).loop.call_later(RETRY_S, close_unwanted, lane, handle)


class Transport(asyncio.Transport):
    """A libtls connection as an asyncio transport. Not thread-safe.

    Extra info: `libtls`, the Connection; `peername`, `sockname`; with TLS `ssl_object` (a TlsObject), `cipher`,
    `peercert`. There is no `socket`, for there is none here, and no `sslcontext`: who has one ends at the peer's end of
    data, while this transport can go on writing (`can_write_eof`).
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, connection: Connection, protocol: asyncio.BaseProtocol, info: Info
    ) -> None:
        self._facts: dict[str, Any] = {}
        super().__init__(self._facts)
        self._loop = loop
        self._connection = connection
        self._lane = connection.lane
        self._protocol = protocol
        self._reader = lane_reader(connection.lane)
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
        self._starting = False
        self._lost = False
        self._describe(info)
        loop.call_soon(protocol.connection_made, self)
        loop.call_soon(stream.start)

    def _describe(self, info: Info) -> None:
        self._facts.update(libtls=self._connection, peername=info.peer_address, sockname=info.local_address)
        self._tls = TlsObject(info) if info.version else None
        if self._tls is not None:
            self._facts.update(ssl_object=self._tls, cipher=self._tls.cipher())
        # For the loop's own start_tls, which makes TLS within this one. The first TLS is the daemon's.
        self._start_tls_compatible = self._tls is not None

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "peercert" and self._tls is not None:
            return self._tls.getpeercert()
        return super().get_extra_info(name, default)

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
            return
        try:
            keep_open = self._protocol.eof_received()  # type: ignore[attr-defined]
        except Exception as error:  # noqa: BLE001 - the protocol's, which ends its connection
            self.raised(error, "eof_received")
        else:
            if not keep_open:
                self.close()

    def failed(self, result: int, detail: int) -> None:
        self._fail(error_from(result, detail, abi.WRITE))

    def raised(self, error: Exception, what: str) -> None:
        self._loop.call_exception_handler(
            {"message": f"protocol.{what}() failed", "exception": error, "transport": self, "protocol": self._protocol}
        )
        if what in ("data_received", "buffer_updated", "eof_received"):
            self._fail(error)

    def flushed(self) -> None:
        """Everything is posted: what ends this direction queues up behind it."""
        if self._closing and not self._close_posted:
            self._post_close(0)
        elif self._eof_wanted and not self._closing:
            self._post_eof()

    # TLS

    async def start_tls(self, server_name: str, **options: Any) -> None:
        """See `libtls.aio.start_tls`."""
        if self._tls is not None:
            raise TypeError("the transport has TLS already")
        if self._starting:
            raise RuntimeError("the transport is starting TLS already")
        self._assert_open()
        self._starting = True
        try:
            while not self._stream.flush():  # more was written than ring and daemon take at once
                self._assert_open()
                await asyncio.sleep(RETRY_S)
            self._stream.hold()
            await wait(self._connection.barrier_operation())
            self._assert_open()
            reader = getattr(self._protocol, "_stream_reader", None)  # of a StreamReaderProtocol
            if reader is not None and reader._buffer:
                raise TlsError(errno.EPROTO, "START_TLS: the reader holds bytes from before TLS, which nobody has read")
            try:
                await wait(tls_start(self._connection, server_name, **options))
                self._describe(await wait(self._connection.info_operation()))
            except TlsError as error:
                self._fail(error)
                raise
        except asyncio.CancelledError:
            self._fail(ConnectionAbortedError("START_TLS was cancelled"))
            raise
        finally:
            self._starting = False
            self._stream.resume()

    def _assert_open(self) -> None:
        if self._closing or self._lost or self._eof_wanted:
            raise ConnectionError("the transport is closing, or its peer has ended the connection")

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
            self._lane.post(abi.SHUTDOWN, self._connection.handle, argument=abi.SHUTDOWN_WRITE)
        except RingFull:
            self._loop.call_later(RETRY_S, self._stream.flush)
        except TlsError as error:
            self._fail(error)

    def _post_close(self, timeout_ns: int) -> None:
        try:
            raw = self._lane.ring.post(abi.CLOSE, self._connection.handle, 0, None, timeout_ns)
        except BlockingIOError:
            self._loop.call_later(RETRY_S, self._post_close, timeout_ns)
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

    _force_close = _fail  # as asyncio's SSLProtocol calls it

    def _gone(self, error: Exception | None) -> None:
        if not self._lost:
            self._lost = True
            self._stream.give_up()
            if not self._loop.is_closed():  # as it is where a program detaches after asyncio.run()
                self._loop.call_soon(self._protocol.connection_lost, error)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol
        self._stream.set_protocol(protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol
