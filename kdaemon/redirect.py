"""Plain HTTP that says one thing: come back over HTTPS. Runs in the workers' control threads, beside the handshakes.

Connections are few and short: one request each, bounded in bytes, number and time, then a response and the end.
"""

import http
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import formatdate

from kdaemon_pyx.http_request import parse

from kdaemon.listeners import BACKLOG

CONNECTIONS_MAX = 256  # of one worker; more wait in the listening socket's queue
ACCEPTS_AT_ONCE = 32
HEAD_BYTES_MAX = 8192
DEADLINE_S = 10.0  # from accept to the end

Watch = Callable[[int, Callable[[int], None]], None]


@dataclass(slots=True, eq=False)
class _Connection:
    sock: socket.socket
    deadline: float
    received: bytearray = field(default_factory=bytearray)
    answered: bool = False  # what still comes is discarded, so that a reset does not eat the response


def redirect_response(head: bytes, port: int, local_host: str) -> bytes | None:
    """The response to the request head in `head`; None: it is not complete yet.

    `port`: of the HTTPS listener. `local_host`: what an HTTP/1.0 client without Host connected to.
    """
    request = parse(head, head_bytes_max=HEAD_BYTES_MAX)
    if request is None:
        return None
    status, location = request["status"], ""
    if not status:
        status = 301 if request["method"] in ("GET", "HEAD") else 308
        literal = f"[{local_host}]" if ":" in local_host else local_host
        host = (request["host"] or b"").decode("latin-1") or literal
        target = (request["target"] or b"/").decode("latin-1") + (request["query"] or b"").decode("latin-1")
        path = target if target.startswith(("/", "?")) else "/"
        location = f"Location: https://{host}{'' if port == 443 else f':{port}'}{path}\r\n"
    line = f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n"
    date = f"Server: kdaemon\r\nDate: {formatdate(usegmt=True)}\r\n"
    return (line + date + location + "Content-Length: 0\r\nConnection: close\r\n\r\n").encode("latin-1")


class RedirectServer:
    """Answers on listening sockets; `watch` and `unwatch` are the event loop's. Owns the sockets. One thread."""

    def __init__(self, listeners: list[socket.socket], port: int, watch: Watch, unwatch: Callable[[int], None]) -> None:
        self._port = port
        self._watch, self._unwatch = watch, unwatch
        self._listeners = listeners
        self._connections: dict[int, _Connection] = {}  # in the order of their deadlines
        self._listening = False
        self._draining = False
        self.redirects = 0
        self.cut = 0  # of a drain: requests that were not complete at its deadline
        self._listen()

    @property
    def under_way(self) -> int:
        """Connections that have not ended."""
        return len(self._connections)

    def _listen(self) -> None:
        if not self._listening and self._listeners and len(self._connections) < CONNECTIONS_MAX:
            self._listening = True
            for listener in self._listeners:
                self._watch(listener.fileno(), lambda _mask, listener=listener: self._accept(listener))  # type: ignore[misc]

    def _pause(self) -> None:
        if self._listening:
            self._listening = False
            for listener in self._listeners:
                self._unwatch(listener.fileno())

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(ACCEPTS_AT_ONCE):
            if len(self._connections) >= CONNECTIONS_MAX:
                self._pause()
                return
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError:  # the peer has gone, or descriptors are short: those that end give theirs back
                if self._connections:
                    self._pause()
                return
            self._accepted(sock)

    def _accepted(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        connection = _Connection(sock, time.monotonic() + DEADLINE_S)
        self._connections[sock.fileno()] = connection
        self._watch(sock.fileno(), lambda _mask: self._readable(connection))

    def _readable(self, connection: _Connection) -> None:
        try:
            data = connection.sock.recv(HEAD_BYTES_MAX)
            if data and not connection.answered:
                self._received(connection, data)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._end(connection)

    def _received(self, connection: _Connection, data: bytes) -> None:
        connection.received += data
        response = redirect_response(bytes(connection.received), self._port, connection.sock.getsockname()[0])
        if response is not None:
            connection.answered = True
            self.redirects += 1
            connection.received.clear()
            connection.sock.send(response)  # the first bytes on this connection: they fit its buffer
            connection.sock.shutdown(socket.SHUT_WR)

    def _end(self, connection: _Connection) -> None:
        self._unwatch(connection.sock.fileno())
        del self._connections[connection.sock.fileno()]
        connection.sock.close()
        self._listen()

    def expire(self, now: float) -> float | None:
        """Ends the connections whose time is up; when the next one's is, or None. `now` is of time.monotonic()."""
        while self._connections:
            oldest = next(iter(self._connections.values()))
            if oldest.deadline > now:
                return oldest.deadline
            self.cut += self._draining and not oldest.answered
            self._end(oldest)
        return None

    def drain(self, deadline: float) -> None:
        """Answers who has asked, in the listeners' queues too, ends who has not, and stops listening.

        The supervisor lets nothing more into the queues. What is under way then has time until `deadline`, of
        time.monotonic(); a second call may bring it forward.
        """
        self._draining = True
        self._pause()
        for listener in self._listeners:
            with suppress(OSError):  # the queue is empty, or descriptors are short
                for _ in range(BACKLOG + 1):
                    self._accepted(listener.accept()[0])
            listener.close()
        self._listeners = []
        for connection in list(self._connections.values()):
            connection.deadline = min(connection.deadline, deadline)
            if not connection.received and not connection.answered:
                self._readable(connection)
            if connection.sock.fileno() >= 0 and not connection.received and not connection.answered:
                self._end(connection)
