"""Messages between the daemon's own processes: JSON objects and file descriptors over SOCK_SEQPACKET pairs.

Both ends are processes of this daemon; a worker is trusted less than the supervisor, so what it says is parsed as
JSON and checked by whoever uses it, never unpickled.
"""

import array
import json
import os
import socket
from collections.abc import Sequence
from typing import Any

MESSAGE_SIZE_MAX = 128 * 1024  # below net.core.wmem_default, so that one message always fits
FDS_MAX = 250  # SCM_MAX_FD is 253

Message = dict[str, Any]

_IN_MEMORY_FILE = b"memfd"


def receive_fds(sock: socket.socket, buffer: bytearray, fds_max: int) -> tuple[bytes, list[int], int]:
    """A message that fits `buffer`, its descriptors, closed at exec, and recvmsg's flags.

    Not socket.recv_fds(): Python 3.11's ignores the flags it is given, and every program started from here on, the next
    zygote and its workers among them, would get what was received, the ticket keys among it.
    """
    fds = array.array("i")
    space = socket.CMSG_SPACE(fds_max * fds.itemsize)
    length, ancillary, flags, _ = sock.recvmsg_into([buffer], space, socket.MSG_CMSG_CLOEXEC)
    for level, kind, body in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(body[: len(body) - len(body) % fds.itemsize])
    return bytes(memoryview(buffer)[:length]), list(fds), flags


class Channel:
    """One end of a SOCK_SEQPACKET pair. Owns the socket. Not thread-safe."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._received = bytearray(MESSAGE_SIZE_MAX)  # one for all messages, as in KeyClient

    @classmethod
    def pair(cls) -> tuple["Channel", "Channel"]:
        """Two connected ends."""
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(one), cls(other)

    @classmethod
    def from_fd(cls, fd: int) -> "Channel":
        """Takes over `fd`, which is not inherited by programs started from here on."""
        sock = socket.socket(fileno=fd)
        sock.set_inheritable(False)
        return cls(sock)

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Sends one message; the kernel duplicates `fds`, the caller keeps its own.

        Raises OSError: the other end is gone, or (non-blocking) its queue is full.
        """
        data = json.dumps(message).encode()
        if len(data) <= MESSAGE_SIZE_MAX:
            self._send(data, fds)
            return
        # Many certificate chains do not fit a datagram: they travel in a memory file, its descriptor behind the others
        body = os.memfd_create("kdaemon-message", os.MFD_CLOEXEC)
        try:
            with os.fdopen(body, "wb", closefd=False) as file:
                file.write(data)
            self._send(_IN_MEMORY_FILE, (*fds, body))
        finally:
            os.close(body)

    def _send(self, data: bytes, fds: Sequence[int]) -> None:
        if fds:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
            self.socket.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)
        else:
            self.socket.send(data, socket.MSG_NOSIGNAL)

    def receive(self) -> tuple[Message, list[int]]:
        """Receives one message and the descriptors sent with it, which the caller owns.

        Raises EOFError when the other end is gone, BlockingIOError when nothing is there (non-blocking).
        """
        try:
            data, fds, flags = receive_fds(self.socket, self._received, FDS_MAX)
        except ConnectionResetError:
            raise EOFError from None
        if not data:
            raise EOFError
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise OSError(f"a message between the daemon's processes was cut (flags {flags:#x})")
        if data == _IN_MEMORY_FILE and fds:
            with os.fdopen(fds.pop(), "rb") as file:
                file.seek(0)
                data = file.read()
        return json.loads(data), fds

    def close(self) -> None:
        self.socket.close()
