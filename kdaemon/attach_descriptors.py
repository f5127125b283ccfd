"""Sockets that come from libtls clients (ADOPT) and go to them (EXPORT) over their attach sockets. Control thread only.

What a client passes is not trusted to be a socket, nor to be one whose close returns: a last close waits for the peer
where SO_LINGER is set, and for the file system's own daemon where it is a file of one. So what is not adopted is closed
by a thread of its own, for which nobody else's descriptors wait.
"""

import array
import contextlib
import errno
import os
import select
import socket
import threading
from collections.abc import Sequence

from kdaemon_pyx import client_abi as abi

from kdaemon.channel import receive_fds

SCM_MAX_FD = 253  # the kernel's limit for one message: with room for all of them it discards none in this thread
UNCLAIMED_MAX = 64  # descriptors of one client that no ADOPT asked for yet
EXPORTS_MAX = 16  # of one client, under way at a time
_SEND_BUFFER = 32768  # bytes of the attach socket: what a client may leave there unread stays a few dozen descriptors

_TCP_ULP = 31
_TCP_ESTABLISHED, _TCP_CLOSE_WAIT = 1, 8


class BrokenProtocolError(Exception):
    """The client said on its attach socket what no program of good will says."""


def close_elsewhere(fds: Sequence[int]) -> None:
    """Closes what one client passed, in a thread that may wait; owns the descriptors from here on."""

    def close() -> None:
        for fd in fds:
            with contextlib.suppress(OSError):  # closed all the same
                os.close(fd)

    if fds:
        threading.Thread(target=close, name="close", daemon=True).start()


def receive(sock: socket.socket, size: int) -> tuple[bytes, list[int]]:
    """One message and the descriptors in it; the caller owns them. Raises OSError."""
    data, fds, _ = receive_fds(sock, bytearray(size), SCM_MAX_FD)
    return data, fds


def check_adoptable(sock: socket.socket) -> None:
    """A connected TCP socket that nothing has been put on top of. Raises OSError, with an errno for each lack."""
    inet = sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM
    if not inet or sock.proto != socket.IPPROTO_TCP:
        raise OSError(errno.EPROTONOSUPPORT, "only TCP sockets can be adopted")
    state = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    if state not in (_TCP_ESTABLISHED, _TCP_CLOSE_WAIT):
        raise OSError(errno.ENOTCONN, "only a connected socket can be adopted")
    if sock.getsockopt(socket.IPPROTO_TCP, _TCP_ULP, 16).strip(b"\0"):
        raise OSError(errno.EEXIST, "the socket has an upper layer protocol already")


class Descriptors:
    """The descriptors under way between one worker and its clients."""

    def __init__(self) -> None:
        self._sockets: dict[int, socket.socket] = {}  # client -> its attach socket, borrowed
        self._unclaimed: dict[int, dict[int, int]] = {}  # client -> user_data -> descriptor, owned
        self._exporting: dict[int, int] = {}  # client -> how many

    def attached(self, client: int, sock: socket.socket) -> None:
        """A new client; the socket stays the caller's."""
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        self._sockets[client] = sock

    def forget(self, client: int) -> None:
        """A client is gone: what it passed and nobody asked for is closed."""
        self._sockets.pop(client, None)
        close_elsewhere([fd for fd in self._unclaimed.pop(client, {}).values() if fd >= 0])

    def arrived(self, client: int, message: bytes, fds: Sequence[int]) -> int:
        """A message on the attach socket; owns the descriptors. The user_data of the ADOPT that it is for.

        Raises BrokenProtocolError. A message without its descriptor had none, or the daemon has no room for more.
        """
        waiting = self._unclaimed.setdefault(client, {})
        try:
            opcode, user_data = abi.unpack_descriptor_message(message)
            if opcode != abi.ADOPT or len(fds) > 1 or user_data in waiting or len(waiting) >= UNCLAIMED_MAX:
                raise BrokenProtocolError("a descriptor that nothing asked for")
        except (ValueError, BrokenProtocolError) as error:
            close_elsewhere(fds)
            raise BrokenProtocolError(str(error)) from None
        waiting[user_data] = fds[0] if fds else -1
        return user_data

    def claim(self, client: int, user_data: int) -> socket.socket | None:
        """The socket for an ADOPT, checked; the caller owns it. None: it has not come yet. Raises OSError."""
        fd = self._unclaimed.get(client, {}).pop(user_data, None)
        if fd is None:
            return None
        if fd < 0:
            raise OSError(errno.EMFILE, "no descriptor came with the message")
        try:
            sock = socket.socket(fileno=fd)
        except OSError:
            close_elsewhere([fd])
            raise OSError(errno.ENOTSOCK, "the descriptor is no socket") from None
        try:
            check_adoptable(sock)
        except OSError:
            close_elsewhere([sock.detach()])
            raise
        return sock

    def begin_export(self, client: int) -> None:
        """Raises OSError (EBUSY): the program has not received what was exported before."""
        count = self._exporting.get(client, 0)
        outgoing = self._sockets.get(client)
        if outgoing is None or count >= EXPORTS_MAX or not _writable(outgoing):
            raise OSError(errno.EBUSY, "earlier exports have not been received")
        self._exporting[client] = count + 1

    def end_export(self, client: int) -> None:
        """Once for each `begin_export`."""
        self._exporting[client] -= 1
        if not self._exporting[client]:
            del self._exporting[client]

    def send(self, client: int, user_data: int, fd: int) -> None:
        """An exported socket goes to the program; the descriptor stays the caller's. Raises OSError."""
        outgoing = self._sockets.get(client)
        if outgoing is None:
            raise OSError(errno.ECONNRESET, "the client is gone")
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        message = abi.pack_descriptor_message(abi.EXPORT, user_data)
        outgoing.sendmsg([message], ancillary, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)


def _writable(sock: socket.socket) -> bool:
    """Whether most of what was sent has been received: for a UNIX socket that is when less than a quarter is left."""
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    return bool(poll.poll(0))
