"""Lanes and operations: posting to a ring, and what comes of it."""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from kdaemon_pyx import client_abi as abi
from kdaemon_pyx.client_ring import ClientRing
from kdaemon_pyx.client_ring import Operation as RingOperation

from libtls.attach import attach
from libtls.errors import ArenaFull, DaemonGone, RingFull, error_of

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

Value = TypeVar("Value")

Parameters = dict[str, int | bytes]


class Operation(Generic[Value]):
    """One posted operation, whose value is there when it is done.

    Thread-safe. As a context manager it is destroyed at the end of the block: cancelled first if it is in flight.
    """

    __slots__ = ("_convert", "_converted", "_value", "lane", "raw")

    def __init__(self, lane: Lane, raw: RingOperation, convert: Callable[[RingOperation], Value]) -> None:
        self.lane = lane
        self.raw = raw
        self._convert = convert
        self._converted = False

    @property
    def done(self) -> bool:
        """Whether it is done; takes completions that are there. Never blocks."""
        if not self.raw.done:
            self.lane.ring.reap()
        return self.raw.done

    @property
    def value(self) -> Value:
        """What came of it. Raises TlsError if it failed, ValueError while it is in flight."""
        if not self._converted:
            if self.raw.result < 0:
                raise error_of(self.raw)
            self._value = self._convert(self.raw)
            self._converted = True
        return self._value

    def wait(self, timeout: float | None = None) -> Value:
        """Blocks until it is done; its value or its exception. After `timeout` seconds TimeoutError; it goes on."""
        if not self.lane.ring.wait(self.raw, timeout):
            raise TimeoutError(errno.ETIMEDOUT, f"{self.raw!r} is not done after {timeout} s; it goes on")
        return self.value

    def cancel(self) -> Operation[bool]:
        """Asks for its end: True if it was still there to be cancelled. It completes all the same, once."""
        return Operation(self.lane, self.lane.cancel(self.raw), lambda raw: True)

    def view(self) -> memoryview:
        """The data of a READ or INFO in the ring's arena, without a copy; while it exists the block stays taken."""
        if self.raw.result < 0:
            raise error_of(self.raw)
        return memoryview(self.raw)

    def destroy(self) -> None:
        """Gives its arena block back. BlockingIOError (EBUSY) in flight, BufferError while a view exists."""
        if not self.done:
            text = "the operation is in flight: wait for it or cancel it before it is destroyed"
            raise BlockingIOError(errno.EBUSY, text)
        self.raw.release()

    def __enter__(self) -> Operation[Value]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self.done:
            self.lane.cancel(self.raw)
            self.lane.ring.wait(self.raw)

    def __repr__(self) -> str:
        return repr(self.raw)


_lanes: weakref.WeakSet[Lane] = weakref.WeakSet()


class Lane:
    """An attachment to one worker of the daemon. Thread-safe. A forked child makes its own."""

    def __init__(self, ring: ClientRing) -> None:
        self.ring = ring
        self.asyncio_reader: Any = None  # libtls.aio's, one event loop per lane
        self.exported: dict[int, int] = {}  # libtls.exchange's: user_data -> descriptor that nobody took yet
        self.receiving = threading.Lock()  # one thread at a time receives exported sockets
        _lanes.add(self)

    @classmethod
    def attach(cls, path: str | None = None, **options: Any) -> Lane:
        """See `libtls.attach.attach`."""
        return cls(attach(path, **options))

    def post(
        self,
        opcode: int,
        handle: int = 0,
        *,
        length: int = 0,
        data: ReadableBuffer | None = None,
        timeout: float | None = None,
        parameters: Parameters | None = None,
        target: RingOperation | None = None,
        argument: int = 0,
    ) -> RingOperation:
        """Posts one operation. timeout: the operation's own deadline in seconds.

        Raises RingFull, ArenaFull, DaemonGone.
        """
        timeout_ns = 0 if timeout is None else max(1, int(timeout * 1e9))
        try:
            return self.ring.post(opcode, handle, length, data, timeout_ns, parameters, target, argument)
        except BlockingIOError as error:
            raise RingFull(error.errno, error.strerror) from None
        except ConnectionResetError as error:
            raise DaemonGone(error.errno, error.strerror) from None
        except OSError as error:
            raise ArenaFull(error.errno, error.strerror) from None

    def cancel(self, target: RingOperation) -> RingOperation:
        """Posts CANCEL."""
        return self.post(abi.CANCEL, target=target)

    def run(self, opcode: int, handle: int = 0, **keywords: Any) -> RingOperation:
        """Posts, waits, and raises what it ended with."""
        raw = self.post(opcode, handle, **keywords)
        self.ring.wait(raw)
        if raw.result < 0:
            raise error_of(raw)
        return raw

    def close(self) -> None:
        """Detaches: the daemon closes every connection of this lane."""
        if self.asyncio_reader is not None:
            self.asyncio_reader.close()
        self.ring.close()


def tls_parameters(
    *,
    server_name: str | None,
    alpn: Sequence[str],
    insecure: bool,
    host: str = "",
    port: int = 0,
    certificate: str = "",
) -> Parameters:
    """The operation slot's fields of OPEN, CONNECT and START_TLS."""
    return {
        "host": _host(host),
        "port": port,
        "server_name": _host(server_name or ""),
        "alpn": alpn_bytes(alpn),
        "certificate": certificate.encode(),
        "flags": abi.PARAMETER_INSECURE if insecure else 0,
    }


def alpn_bytes(protocols: Sequence[str]) -> bytes:
    """RFC 7301's list: a length octet and the name, each."""
    return b"".join(bytes([len(protocol)]) + protocol.encode() for protocol in protocols)


def _host(name: str) -> bytes:
    """A host name as it goes over the wire: international names in their ASCII form."""
    return name.encode() if name.isascii() else name.encode("idna")


def _after_fork_in_child() -> None:
    for lane in list(_lanes):
        lane.ring.abandon()


os.register_at_fork(after_in_child=_after_fork_in_child)
