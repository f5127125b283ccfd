"""Sockets that change hands: `tls_adopt` gives one to the daemon, `tls_export` takes a kTLS socket from it.

They pass over the lane's attach socket, each with the `user_data` of its operation (docs/client-ring.md).
"""

from __future__ import annotations

import array
import errno
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kdaemon_pyx import client_abi as abi
from kdaemon_pyx.client_ring import Operation as RingOperation

from libtls.connection import Connection
from libtls.descriptors import receive_descriptors
from libtls.errors import TlsError, Truncated, alert_received
from libtls.functions import current_lane
from libtls.operation import Lane, Operation

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_SOL_TLS = 282
_TLS_SET_RECORD_TYPE, _TLS_GET_RECORD_TYPE = 1, 2
_ALERT, _HANDSHAKE, _APPLICATION_DATA = 21, 22, 23  # RFC 8446 section 5.1
_RECORD_SIZE_MAX = 16384
_KEY_UPDATE = 24  # section 4.6.3
_CLOSE_NOTIFY = 0
_USER_CANCELED = 90


class KtlsSocket(socket.socket):
    """An exported connection: a real TCP socket whose records the kernel makes and opens. It blocks.

    `recv` and `send` move application data. At a record of another kind `recv` fails with EIO: `receive_record` reads
    it, and `receive` does what has to be done about it.
    """

    def receive_record(self, size: int = _RECORD_SIZE_MAX) -> tuple[int, bytes]:
        """(content type, data): application data (23), an alert (21) or handshake messages (22); type 0 at FIN.

        With a smaller size than 16384 the rest of a record comes with the next call, under the same type.
        """
        data, ancillary, _, _ = self.recvmsg(size, socket.CMSG_SPACE(1))
        for level, kind, value in ancillary:
            if (level, kind) == (_SOL_TLS, _TLS_GET_RECORD_TYPE):
                return value[0], data
        return (_APPLICATION_DATA, data) if data else (0, b"")

    def receive(self, size: int = _RECORD_SIZE_MAX) -> bytes:
        """1..size bytes of application data; empty at close_notify. Tickets are passed over.

        Raises Truncated at FIN without close_notify, AlertReceived, and at a KeyUpdate, which only somebody with the
        connection's secrets could follow, TlsError (EKEYEXPIRED): say goodbye with `send_close_notify` and close.
        Reading on instead fails, and before Linux 6.14 that is the end of sending, too.
        """
        while True:
            content_type, data = self.receive_record(size)
            if content_type == _APPLICATION_DATA and data:
                return data
            if content_type == 0:
                raise Truncated(errno.ECONNRESET, "the peer ended the connection without close_notify")
            if content_type == _ALERT and len(data) == 2:
                if data[1] == _CLOSE_NOTIFY:
                    return b""
                if data[1] != _USER_CANCELED:
                    raise alert_received(data[1])
            elif content_type == _HANDSHAKE and data[:1] == bytes([_KEY_UPDATE]):
                raise TlsError(errno.EKEYEXPIRED, "the peer changed its key: an exported connection cannot follow")

    def send_record(self, content_type: int, data: ReadableBuffer) -> None:
        """One record of this type, at most 16384 bytes."""
        self.sendmsg([data], [(_SOL_TLS, _TLS_SET_RECORD_TYPE, struct.pack("B", content_type))])

    def send_close_notify(self) -> None:
        """The orderly end of what this side sends (RFC 8446 section 6.1); nobody else sends it now."""
        self.send_record(_ALERT, bytes([1, _CLOSE_NOTIFY]))


@contextmanager
def _attach_socket(lane: Lane) -> Iterator[socket.socket]:
    """The lane's attach socket, borrowed from its ring."""
    sock = socket.socket(fileno=lane.ring.attach_fileno())
    try:
        yield sock
    finally:
        sock.detach()


def tls_adopt(
    fd: int | socket.socket, *, timeout: float | None = None, lane: Lane | None = None
) -> Operation[Connection]:
    """ADOPT: the daemon gets a connected TCP socket; its value is a connection without TLS, for `tls_start`.

    The program's own descriptor stays open and is its own to close; to read or write through it any more takes bytes
    out of the connection, or puts some in.
    """
    lane = lane or current_lane()
    number = fd if isinstance(fd, int) else fd.fileno()
    raw = lane.post(abi.ADOPT, timeout=timeout)
    message = abi.pack_descriptor_message(abi.ADOPT, raw.user_data)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [number]))]
    try:
        with _attach_socket(lane) as sock:
            sock.sendmsg([message], rights, socket.MSG_NOSIGNAL)
    except OSError:
        lane.cancel(raw)
        raise
    return Operation(lane, raw, lambda done: Connection(lane, done.result))


def tls_export(conn: Connection) -> Operation[KtlsSocket]:
    """EXPORT: the connection leaves the daemon; its value is the kTLS socket, and `conn` is closed.

    Only in the kernel's record layer (EOPNOTSUPP), with no operation in flight and nothing left to read in the daemon
    (EBUSY: read it, then try again). docs/libtls.md says what becomes the program's duty.
    """
    lane = conn.lane
    raw = lane.post(abi.EXPORT, conn.handle)

    def convert(done: RingOperation) -> KtlsSocket:
        conn.handed_over()
        return KtlsSocket(fileno=_receive(lane, done.user_data))

    return Operation(lane, raw, convert)


def _receive(lane: Lane, user_data: int) -> int:
    """The descriptor that was sent before this operation completed; others that come first are kept for their own."""
    with lane.receiving, _attach_socket(lane) as sock:
        while user_data not in lane.exported:
            try:
                data, fds = receive_descriptors(sock, abi.DESCRIPTOR_MESSAGE_SIZE, 1, socket.MSG_DONTWAIT)
            except BlockingIOError:
                raise TlsError(errno.EPROTO, "EXPORT: the daemon sent no socket") from None
            if not data:
                raise TlsError(errno.ECONNRESET, "EXPORT: the daemon is gone")
            if not fds:
                raise TlsError(errno.EMFILE, "EXPORT: this program has no room for another descriptor")
            lane.exported[abi.unpack_descriptor_message(data)[1]] = fds[0]
        return lane.exported.pop(user_data)
