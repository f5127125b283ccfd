"""A blocking, socket-like object over a libtls connection: enough for `http.client`, urllib3 and what uses them."""

from __future__ import annotations

import errno
import io
import os
import socket
from typing import TYPE_CHECKING, Any

from kdaemon_pyx import client_abi as abi
from kdaemon_pyx.client_ring import Operation as RingOperation

from libtls.connection import Connection, Info
from libtls.errors import ArenaFull, DaemonGone, RingFull, error_of
from libtls.functions import current_lane, tls_open, tls_start
from libtls.operation import Lane
from libtls.tls_object import TlsObject

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

AHEAD_SIZE = 2048  # what an idle connection that somebody asked about keeps of the arena


class TlsSocket:
    """Looks like a connected `ssl.SSLSocket`; before `start_tls` like a socket.

    One thread may read while another one writes.
    It has no file descriptor: select and poll cannot watch it, `readable` answers instead.
    """

    type = socket.SOCK_STREAM
    proto = socket.IPPROTO_TCP

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._timeout: float | None = None
        self._ahead: RingOperation | None = None  # a READ that `readable` posted
        self._rest = memoryview(b"")  # of a READ that brought more than was asked for
        self._files = 0
        self._closed = False
        self._info: Info | None = None

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
        """-1: there is none."""
        return -1

    def start_tls(self, server_name: str = "", **options: Any) -> None:
        """As `tls_start`. ConnectionError: the peer has sent bytes that nobody has read."""
        self._stop_reading_ahead()
        tls_start(self.connection, server_name, timeout=self._timeout, **options).wait()
        self._info = None

    # What is known

    def _known(self) -> Info:
        if self._info is None:
            self._info = self.connection.info()
        return self._info

    @property
    def family(self) -> socket.AddressFamily:
        return socket.AF_INET6 if ":" in self.getsockname()[0] else socket.AF_INET

    def getpeername(self) -> tuple[str, int]:
        return _of_a_living(self._known().peer_address)

    def getsockname(self) -> tuple[str, int]:
        return _of_a_living(self._known().local_address)

    def version(self) -> str | None:
        return TlsObject(self._known()).version()

    def cipher(self) -> tuple[str, str, int] | None:
        return TlsObject(self._known()).cipher()

    def compression(self) -> str | None:
        return None

    def selected_alpn_protocol(self) -> str | None:
        return TlsObject(self._known()).selected_alpn_protocol()

    def getpeercert(self, binary_form: bool = False) -> Any:
        """The peer's certificate as DER, or as the dictionary that `ssl` makes of it; None: it presented none."""
        return TlsObject(self._known()).getpeercert(binary_form)

    # Reading

    def recv(self, size: int, flags: int = 0) -> bytes:
        """1..size bytes; empty after close_notify."""
        buffer = bytearray(size)
        return bytes(memoryview(buffer)[: self.recv_into(buffer, flags=flags)])

    def recv_into(self, buffer: WriteableBuffer, nbytes: int = 0, flags: int = 0) -> int:
        """Like `recv`, into a buffer; the number of bytes."""
        _refuse(flags)
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
        """Whether a read would return at once: data, the end, or an error is there. Never blocks.

        The first time after a read it can only ask the daemon; what it says then is about what had come before.
        """
        if self._rest or self._closed:
            return True
        if self._ahead is None:
            try:
                self._ahead = self.connection.lane.post(abi.READ, self.connection.handle, length=AHEAD_SIZE)
            except DaemonGone:
                return True
            except (RingFull, ArenaFull):
                return False
        self.connection.lane.ring.reap()
        return self._ahead.done

    def _stop_reading_ahead(self) -> None:
        if (raw := self._ahead) is not None:
            self.connection.lane.ring.wait(self.connection.lane.cancel(raw))
            self.connection.lane.ring.wait(raw)
            self._ahead = None
            if raw.result > 0:
                self._rest = memoryview(raw.bytes())
        if self._rest:
            raise ConnectionError("the peer sent bytes before TLS that nobody has read")

    # Writing

    def send(self, data: ReadableBuffer, flags: int = 0) -> int:
        """Sends all of it."""
        _refuse(flags)
        return self.connection.write(data, timeout=self._timeout)

    def sendall(self, data: ReadableBuffer, flags: int = 0) -> None:
        """Sends all of it."""
        self.send(data, flags)

    def makefile(self, mode: str = "r", buffering: int | None = None, **options: Any) -> io.IOBase:
        """Like `socket.makefile`."""
        if not set(mode) <= {"r", "w", "b"}:
            raise ValueError(f"invalid mode {mode!r} (only r, w, b allowed)")
        if buffering == 0 and "b" not in mode:
            raise ValueError("unbuffered streams must be binary")
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


def _refuse(flags: int) -> None:
    if flags:
        raise ValueError("non-zero flags are not allowed: what they ask of is in the daemon")


def _of_a_living(address: tuple[str, int] | None) -> tuple[str, int]:
    if address is None:
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
    return address


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
