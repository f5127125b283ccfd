"""Connections and listeners as objects, with blocking calls and with operations."""

from __future__ import annotations

import errno
import io
import ipaddress
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from kdaemon_pyx import client_abi as abi
from kdaemon_pyx.client_ring import Operation as RingOperation

from libtls.errors import error_from, error_of
from libtls.operation import Lane, Operation

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

READ_SIZE = 65536
WRITE_PIECE_SIZE = 262144  # a large write leaves in pieces, so that it needs no large block of the arena
WRITE_PIECES_MAX = 2
INFO_SIZE = 16384


@dataclass(frozen=True, slots=True)
class Info:
    """What is known of an established connection."""

    version: str  # "TLSv1.3"; empty: no TLS yet
    cipher_suite: int
    named_group: int
    record_layer: str  # "kernel", "user"; "none": no TLS yet
    resumed: bool
    alpn: str | None
    server_name: str
    peer_certificate: bytes  # DER; empty: the peer presented none
    peer_address: tuple[str, int] | None  # host and port; None: it was gone before it could be asked
    local_address: tuple[str, int] | None
    record_layer_reason: (
        str  # "available" for "kernel", else what is in the way: "switched-off", "no-ulp", "record-size", ...
    )


class Connection:
    """A connection that the daemon holds. Thread-safe; reads and writes run in parallel.

    Operations of one direction are first-in first-out and never interleave. The connection is closed with
    close_notify by `close` or at the end of a `with` block; one that is dropped lives until the program ends.
    Before START_TLS it carries bytes as they are, and its ends are those of TCP.
    """

    def __init__(self, lane: Lane, handle: int) -> None:
        self.lane = lane
        self.handle = handle
        self._closed = False

    # Operations: post and return at once

    def read_operation(self, size: int = READ_SIZE, *, timeout: float | None = None) -> Operation[bytes]:
        """READ: its value is 1..size bytes, empty only after the peer's close_notify."""
        raw = self.lane.post(abi.READ, self.handle, length=size, timeout=timeout)
        return Operation(self.lane, raw, RingOperation.bytes)

    def write_operation(self, data: ReadableBuffer, *, timeout: float | None = None) -> Operation[int]:
        """WRITE: its value is the number of bytes sent; fewer if it was cancelled or its deadline passed midway."""
        return Operation(self.lane, self.lane.post(abi.WRITE, self.handle, data=data, timeout=timeout), _result)

    def info_operation(self) -> Operation[Info]:
        """INFO: its value is what is known of the connection."""
        return Operation(self.lane, self.lane.post(abi.INFO, self.handle, length=INFO_SIZE), _info)

    def barrier_operation(self) -> Operation[int]:
        """BARRIER: done when all before it is; nothing behind it starts earlier."""
        return Operation(self.lane, self.lane.post(abi.BARRIER, self.handle), _result)

    def shutdown_operation(self) -> Operation[int]:
        """SHUTDOWN: after the writes before it close_notify, or FIN without TLS; reading goes on."""
        return Operation(self.lane, self.lane.post(abi.SHUTDOWN, self.handle, argument=abi.SHUTDOWN_WRITE), _result)

    def close_operation(self, *, timeout: float | None = None) -> Operation[int]:
        """CLOSE: after the writes before it close_notify, then the end. The handle is dead from here on."""
        self._closed = True
        return Operation(self.lane, self.lane.post(abi.CLOSE, self.handle, timeout=timeout), _result)

    # Blocking

    def read(self, size: int = READ_SIZE, *, timeout: float | None = None) -> bytes:
        """1..size bytes as soon as there are any; empty after close_notify. Raises Truncated at an end without it."""
        raw = self.lane.run(abi.READ, self.handle, length=size, timeout=timeout)
        data = raw.bytes()
        raw.release()
        return data

    def readinto(self, buffer: WriteableBuffer, *, timeout: float | None = None) -> int:
        """Like `read`, into a buffer of the caller; the number of bytes."""
        with memoryview(buffer).cast("B") as target:
            if not target:
                return 0
            raw = self.lane.run(abi.READ, self.handle, length=len(target), timeout=timeout)
            with memoryview(raw) as data:
                target[: len(data)] = data
            raw.release()
            return raw.result

    def write(self, data: ReadableBuffer, *, timeout: float | None = None) -> int:
        """Sends all of it; the number of bytes. Raises DeadlinePassed if part of it has not left after `timeout`."""
        with memoryview(data).cast("B") as view:
            pending: deque[tuple[RingOperation, int]] = deque()
            for begin in range(0, len(view), WRITE_PIECE_SIZE):
                if len(pending) == WRITE_PIECES_MAX:
                    self._finish(*pending.popleft(), timeout)
                piece = view[begin : begin + WRITE_PIECE_SIZE]
                pending.append((self.lane.post(abi.WRITE, self.handle, data=piece, timeout=timeout), len(piece)))
            for raw, size in pending:
                self._finish(raw, size, timeout)
            return len(view)

    def _finish(self, raw: RingOperation, size: int, timeout: float | None) -> None:
        """Raises what ended the WRITE, and for a short count what must have cut it: nobody else could cancel it."""
        self.lane.ring.wait(raw)
        if raw.result < 0:
            raise error_of(raw)
        if raw.result < size:
            raise error_from(-(errno.ECONNRESET if timeout is None else errno.ETIMEDOUT), 0, abi.WRITE)

    def shutdown(self) -> None:
        """No more is written: close_notify goes out; reading goes on."""
        self.shutdown_operation().wait()

    def close(self, *, timeout: float | None = None) -> None:
        """close_notify after what was written, then the end. Harmless when it is closed already."""
        if self._closed or self.lane.ring.is_dead:
            self._closed = True
            return
        self.close_operation(timeout=timeout).wait()

    def handed_over(self) -> None:
        """It was exported: there is nothing left to close."""
        self._closed = True

    def info(self) -> Info:
        """Version, suite, group, ALPN, peer certificate, record layer, addresses."""
        with self.info_operation() as operation:
            return operation.wait()

    def makefile(self, buffer_size: int = READ_SIZE) -> io.BufferedRWPair:
        """A buffered binary file over the connection; closing it does not close the connection."""
        return io.BufferedRWPair(_Reader(self), _Writer(self), buffer_size)

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Connection {self.handle:#x}{' closed' if self._closed else ''}>"


class Listener:
    """A TLS server socket that the daemon holds. Thread-safe."""

    def __init__(self, lane: Lane, handle: int) -> None:
        self.lane = lane
        self.handle = handle
        self._closed = False
        fields = abi.unpack_info(lane.run(abi.INFO, handle, length=INFO_SIZE).bytes())
        self.port = _integer(fields["port"])

    def accept_operation(self, *, timeout: float | None = None) -> Operation[Connection]:
        """ACCEPT: its value is the next connection whose handshake is complete."""
        raw = self.lane.post(abi.ACCEPT, self.handle, timeout=timeout)
        return Operation(self.lane, raw, lambda done: Connection(self.lane, done.result))

    def accept(self, *, timeout: float | None = None) -> Connection:
        """The next connection whose handshake is complete."""
        return self.accept_operation(timeout=timeout).wait()

    def close(self) -> None:
        """Stops listening; accepted connections go on. Harmless when it is closed already."""
        if not self._closed and not self.lane.ring.is_dead:
            self._closed = True
            self.lane.run(abi.CLOSE, self.handle)

    def __enter__(self) -> Listener:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Listener port={self.port}{' closed' if self._closed else ''}>"


class _Reader(io.RawIOBase):
    """Raw reading side of `makefile`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        return self._connection.readinto(buffer)


class _Writer(io.RawIOBase):
    """Raw writing side of `makefile`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def writable(self) -> bool:
        return True

    def write(self, data: ReadableBuffer, /) -> int:
        return self._connection.write(data)


def _result(raw: RingOperation) -> int:
    return raw.result


def _info(raw: RingOperation) -> Info:
    fields = abi.unpack_info(raw.bytes())
    raw.release()
    return Info(
        version="TLSv1.3" if fields["tls_version"] else "",
        cipher_suite=_integer(fields["cipher_suite"]),
        named_group=_integer(fields["named_group"]),
        record_layer=abi.RECORD_LAYERS[_integer(fields["record_layer"])],
        resumed=bool(fields["resumed"]),
        alpn=_bytes(fields["alpn"]).decode() or None,
        server_name=str(fields["server_name"]),
        peer_certificate=_bytes(fields["certificate"]),
        peer_address=_address(fields["peer_address"], fields["peer_port"]),
        local_address=_address(fields["local_address"], fields["local_port"]),
        record_layer_reason=str(fields["reason"]),
    )


def _address(packed: object, port: object) -> tuple[str, int] | None:
    """Of the IPv6 form that an IPv4 address is mapped into (RFC 4291 section 2.5.5.2)."""
    if not port:
        return None
    address = ipaddress.IPv6Address(_bytes(packed))
    return str(address.ipv4_mapped or address), _integer(port)


def _integer(value: object) -> int:
    assert isinstance(value, int)
    return value


def _bytes(value: object) -> bytes:
    assert isinstance(value, bytes)
    return value
