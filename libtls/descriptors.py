"""Descriptors that come over a UNIX socket, closed at exec from the moment they are there."""

from __future__ import annotations

import array
import socket


def receive_descriptors(sock: socket.socket, size: int, count: int, flags: int = 0) -> tuple[bytes, list[int]]:
    """At most `size` bytes and the descriptors among them, at most `count`; the caller owns them. Raises OSError.

    Fewer than were sent: the program has no room for more. Not socket.recv_fds(): Python 3.11's ignores the flags it is
    given, and whatever another thread starts in between would inherit the descriptors.
    """
    fds = array.array("i")
    space = socket.CMSG_LEN(count * fds.itemsize)
    data, ancillary, _, _ = sock.recvmsg(size, space, flags | socket.MSG_CMSG_CLOEXEC)
    for level, kind, body in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(body[: len(body) - len(body) % fds.itemsize])
    return data, list(fds)
