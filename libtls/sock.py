"""A blocking, socket-like object over a libtls connection: enough for `http.client`, urllib3 and what uses them."""

from __future__ import annotations

import io
import socket
from typing import TYPE_CHECKING, Any

from kdaemon_pyx import client_abi as abi
from kdaemon_pyx.client_ring import Operation as RingOperation

from libtls.connection import READ_SIZE, Connection
from libtls.errors import error_of
from libtls.functions import current_lane, tls_open
from libtls.operation import Lane

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer


class TlsSocket:
    """Looks like a connected `ssl.SSLSocket`. One thread may read while another one writes.

    It has no file descriptor: select and poll cannot watch it, `readable` answers instead.
    """

    family = socket.AF_INET
    type = socket.SOCK_STREAM

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._timeout: float | None = None
        self._ahead: RingOperation | None = None  # a READ that `readable` posted
        self._rest = memoryview(b"")  # of a READ that brought more than was asked for
        self._files = 0
        self._closed = False

    @classmethod
    def open(
        cls, host: str, port: int, *, timeout: float | None = None, lane: Lane | None = None, **options: Any
    ) -> TlsSocket:
        """Connects; options as of `tls_open`. `timeout` stays the socket's."""
        sock = cls(tls_open(host, port, timeout=timeout, lane=lane or current_lane(), **options).wait())
        sock.settimeout(timeout)
        return sock

    def settimeout(self, value: float | None) -> None:
        """Seconds that one call may take; None: for ever. 0 is refused: it cannot be made non-blocking."""
        if value == 0:
            raise ValueError("a TlsSocket cannot be non-blocking: use libtls.aio")
        self._timeout = value

    def gettimeout(self) -> float | None:
        return self._timeout

    def setsockopt(self, *_: object) -> None:
        """The daemon has set what matters (TCP_NODELAY); there is nothing to set here."""

    def fileno(self) -> int:
        return -1

    def recv(self, size: int, flags: int = 0) -> bytes:
        """1..size bytes; empty after close_notify."""
        buffer = bytearray(size)
        return bytes(memoryview(buffer)[: self.recv_into(buffer)])

    def recv_into(self, buffer: WriteableBuffer, nbytes: int = 0, flags: int = 0) -> int:
        """Like `recv`, into a buffer; the number of bytes."""
        with memoryview(buffer).cast("B") as whole:
            target = whole[:nbytes] if nbytes else whole
            if not target:
                return 0
            if not self._rest:
                self._rest = memoryview(self._receive(len(target)))
            size = min(len(target), len(self._rest))
            target[:size] = self._rest[:size]
            self._rest = self._rest[size:]
            target.release()
            return size

    def _receive(self, size: int) -> bytes:
        raw, self._ahead = self._ahead, None
        if raw is None:
            return self.connection.read(size, timeout=self._timeout)
        if not self.connection.lane.ring.wait(raw, self._timeout):
            self._ahead = raw
            raise TimeoutError("the read operation timed out")
        if raw.result < 0:
            raise error_of(raw)
        return raw.bytes()

    def readable(self) -> bool:
        """Whether a read would return at once: data, the end, or an error is there."""
        if self._rest or self._closed:
            return True
        if self._ahead is None:
            self._ahead = self.connection.lane.post(abi.READ, self.connection.handle, length=READ_SIZE)
        self.connection.lane.ring.reap()
        return self._ahead.done

    def stop_reading_ahead(self) -> None:
        """Before START_TLS: takes back what `readable` posted. ConnectionError: bytes are there that nobody read."""
        if (raw := self._ahead) is not None:
            self.connection.lane.ring.wait(self.connection.lane.cancel(raw))
            self.connection.lane.ring.wait(raw)
            self._ahead = None
            if raw.result > 0:
                self._rest = memoryview(raw.bytes())
        if self._rest:
            raise ConnectionError("the peer sent bytes before TLS that nobody has read")

    def send(self, data: ReadableBuffer, flags: int = 0) -> int:
        """Sends all of it."""
        return self.connection.write(data, timeout=self._timeout)

    def sendall(self, data: ReadableBuffer, flags: int = 0) -> None:
        """Sends all of it."""
        self.connection.write(data, timeout=self._timeout)

    def makefile(self, mode: str = "r", buffering: int | None = None, **options: Any) -> io.IOBase:
        """Like `socket.makefile`."""
        self._files += 1
        raw = _SocketFile(self)
        size = io.DEFAULT_BUFFER_SIZE if buffering is None or buffering < 0 else buffering
        if "b" in mode and size == 0:
            return raw
        buffered: Any
        if "w" in mode and "r" in mode:
            buffered = io.BufferedRWPair(raw, raw, size)
        else:
            buffered = io.BufferedWriter(raw, size) if "w" in mode else io.BufferedReader(raw, size)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, **options)

    def _file_closed(self) -> None:
        self._files -= 1
        if self._closed and not self._files:
            self.connection.close()

    def shutdown(self, how: int) -> None:
        """SHUT_WR and SHUT_RDWR: close_notify goes out."""
        if how != socket.SHUT_RD:
            self.connection.shutdown()

    def close(self) -> None:
        """The connection is closed when the last file made from it is."""
        self._closed = True
        if not self._files:
            self.connection.close()

    def __enter__(self) -> TlsSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _SocketFile(io.RawIOBase):
    """What `makefile` buffers."""

    def __init__(self, sock: TlsSocket) -> None:
        self._sock = sock

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        return self._sock.recv_into(buffer)

    def write(self, data: ReadableBuffer, /) -> int:
        return self._sock.send(data)

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._sock._file_closed()
