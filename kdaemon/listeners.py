"""Listening sockets: made and owned by the supervisor, one per worker and address, alive through restarts and reloads.

Closing one member of a SO_REUSEPORT group resets the connections queued on it, so a member outlives the worker that
accepts from it: the replacement finds the queue as it was.
"""

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Sequence

from kdaemon.config import parse_address

BACKLOG = 4096  # the kernel caps it at net.core.somaxconn
LISTEN_FDS_START = 3  # sd_listen_fds(3)
SO_ATTACH_FILTER = 26
# struct sock_filter, classic BPF on the TCP header: a SYN without ACK is dropped, everything else passes.
_DROP_SYN = b"".join(
    struct.pack("=HBBI", *instruction)
    for instruction in (
        (0x30, 0, 0, 13),  # ldb [13]: the flags
        (0x54, 0, 0, 0x12),  # and #(SYN | ACK)
        (0x15, 0, 1, 0x02),  # jeq #SYN
        (0x06, 0, 0, 0),  # ret #0
        (0x06, 0, 0, 0xFFFFFFFF),  # ret #-1
    )
)


class ListenError(Exception):
    """An address cannot be listened on; one line that says which and why."""


class Listener:
    """One address and its sockets, one per worker. Owns the sockets."""

    def __init__(self, sockets: list[socket.socket], inherited: bool = False) -> None:
        self.sockets = sockets
        self.inherited = inherited
        host, port = sockets[0].getsockname()[:2]
        self.host, self.port = host.partition("%")[0], port
        self.ipv6 = sockets[0].family == socket.AF_INET6

    @property
    def address(self) -> str:
        """ADDR:PORT as written in a URL."""
        return f"[{self.host}]:{self.port}" if self.ipv6 else f"{self.host}:{self.port}"

    def socket_for(self, worker: int) -> socket.socket:
        """The socket of one worker; inherited sockets may be fewer than workers and are shared."""
        return self.sockets[worker % len(self.sockets)]

    def refuse_new(self) -> None:
        """From now on connections that begin get no answer, until close() refuses them.

        Those under way are still queued, and what is queued is served. Inherited sockets are left alone: somebody else
        accepts from them after us.
        """
        for sock in () if self.inherited else self.sockets:
            filter_ = ctypes.create_string_buffer(_DROP_SYN)
            program = struct.pack("@HP", len(_DROP_SYN) // 8, ctypes.addressof(filter_))
            sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()


def open_listener(address: str, workers: int) -> Listener:
    """Binds and listens with one socket per worker.

    The first binds without SO_REUSEPORT, which is set on it afterwards: a second daemon on the port gets EADDRINUSE
    instead of silently sharing it. Raises ListenError; its `__cause__` is the OSError.
    """
    host, port = parse_address(address)
    try:
        family, _, _, _, name = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICHOST
        )[0]
    except socket.gaierror as error:
        raise ListenError(f"{address}: not an IP address: {error.strerror}") from None
    sockets: list[socket.socket] = []
    try:
        for index in range(workers):
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if index:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                sock.bind(sockets[0].getsockname())
            else:
                sock.bind(name)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        for sock in sockets:
            sock.listen(BACKLOG)
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise ListenError(f"cannot listen on {address}: {_explain(error)}") from error
    return Listener(sockets)


def inherited_listeners() -> list[Listener]:
    """Sockets passed by a service manager (LISTEN_FDS, LISTEN_PID; sd_listen_fds(3)). Raises ListenError."""
    count, pid = os.environ.pop("LISTEN_FDS", ""), os.environ.pop("LISTEN_PID", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if not count.isdecimal() or pid != str(os.getpid()):
        return []
    groups: dict[tuple[str, int], list[socket.socket]] = {}
    for fd in range(LISTEN_FDS_START, LISTEN_FDS_START + int(count)):
        try:
            os.set_inheritable(fd, False)
            sock = socket.socket(fileno=fd)
            listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as error:
            raise ListenError(f"LISTEN_FDS: descriptor {fd} is no socket: {error.strerror}") from None
        if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM or not listening:
            raise ListenError(f"LISTEN_FDS: descriptor {fd} is not a listening TCP socket")
        sock.setblocking(False)
        groups.setdefault(sock.getsockname()[:2], []).append(sock)
    return [Listener(sockets, inherited=True) for sockets in groups.values()]


def open_listeners(addresses: Sequence[str], workers: int) -> tuple[list[Listener], list[str]]:
    """Listeners for all addresses, and a warning for each IPv6 loopback address that this host does not have.

    Sockets from LISTEN_FDS replace `addresses`. Raises ListenError when an address cannot be had, or none is left.
    """
    listeners: list[Listener] = inherited_listeners()
    if listeners:
        return listeners, []
    warnings: list[str] = []
    try:
        for address in addresses:
            try:
                listeners.append(open_listener(address, workers))
            except ListenError as error:
                cause = error.__cause__
                missing = isinstance(cause, OSError) and cause.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
                if not (missing and address.startswith("[::1]:")):
                    raise
                warnings.append(f"{error}; going on without it")
        if addresses and not listeners:  # none configured: a daemon for libtls alone
            raise ListenError("no address is left to listen on")
    except ListenError:
        for listener in listeners:
            listener.close()
        raise
    return listeners, warnings


def _explain(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "the port is already taken by another program (see: ss -ltnp)"
    if error.errno == errno.EACCES:
        return "ports below 1024 need root or CAP_NET_BIND_SERVICE"
    if error.errno == errno.EADDRNOTAVAIL:
        return "this host does not have the address"
    return error.strerror or str(error)
