"""What tests of libtls connections share: a peer to connect to, small helpers, what the daemon says of its sockets."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable

from libtls import Lane
from libtls.connection import Connection
from libtls.functions import tls_connect
from support.certificates import Issued
from support.daemon import Daemon, status
from support.waiting import DEADLINE_S


def worker(daemon: Daemon) -> dict[str, int]:
    [report] = status(daemon)["workers"]  # type: ignore[misc]
    return report


def layer(daemon: Daemon) -> str:
    """What the kernel must say of the daemon's TLS sockets."""
    return "kernel" if daemon.ready[0].backend == "kernel" else "none"


class Peer:
    """The other end of a connection that libtls makes: a listening socket, and what comes to it."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(DEADLINE_S)
        self.port = self.listener.getsockname()[1]

    def meet(self, lane: Lane) -> tuple[Connection, socket.socket]:
        connecting = tls_connect("127.0.0.1", self.port, lane=lane)
        peer, _ = self.listener.accept()
        peer.settimeout(DEADLINE_S)
        return connecting.wait(DEADLINE_S), peer


def server_context(issued: Issued) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(issued.certificate, issued.key)
    return context


def in_thread(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def read_exactly(connection: Connection, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = connection.read(size - len(data), timeout=DEADLINE_S)
        assert piece
        data += piece
    return data
