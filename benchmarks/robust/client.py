"""A strict HTTP/1.1 client over TLS 1.3 for the load: it counts, times and never forgives."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PATIENCE_S = 60.0
HEAD_BYTES_MAX = 65536


class WrongError(Exception):
    """The daemon did what it must not do."""


class CutError(Exception):
    """The connection ended in the middle of a response, or before it."""


@dataclass
class Response:
    status: int
    headers: dict[str, str]
    body: bytes
    asked_s: float
    answered_s: float


def context(ca: Path) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=str(ca))
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    return made


class Connection:
    """One TLS connection. `receive_buffer` makes a slow reader's window small."""

    def __init__(
        self,
        address: tuple[str, int],
        tls: ssl.SSLContext,
        session: ssl.SSLSession | None = None,
        receive_buffer: int = 0,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.opened_s = time.monotonic()
        plain = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            plain.settimeout(patience_s)
            if receive_buffer:
                plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            plain.connect(address)
            self.socket = tls.wrap_socket(plain, server_hostname="localhost", session=session)
        except BaseException:
            plain.close()
            raise
        self._buffer = b""
        self._asked: list[tuple[str, float]] = []

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def ask(self, path: str, *headers: str, method: str = "GET") -> None:
        """Sends a request; read its response with `response`, in order."""
        self.send(self.request(path, *headers, method=method))

    def request(self, path: str, *headers: str, method: str = "GET") -> bytes:
        """A request's bytes, whose response is expected from here on."""
        self._asked.append((method, time.monotonic()))
        return "\r\n".join([f"{method} /{path} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def _receive(self, size: int = 65536) -> bytes:
        try:
            data = self.socket.recv(size)
        except TimeoutError:
            raise WrongError(f"nothing came for {PATIENCE_S:g} s") from None
        except (ssl.SSLEOFError, ConnectionError) as error:
            raise CutError(type(error).__name__) from None
        if not data:
            raise CutError("close_notify")
        return data

    def response(
        self, piece: int = 65536, pause_s: float = 0.0, impatient: Callable[[], bool] = lambda: False
    ) -> Response:
        """The next response; read in pieces with a pause between them by whoever is slow, until he loses patience."""
        method, asked_s = self._asked.pop(0)
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            if len(self._buffer) > HEAD_BYTES_MAX:
                raise WrongError("a head without an end")
            self._buffer += self._receive()
        head, self._buffer = self._buffer[:end].decode("latin-1"), self._buffer[end + 4 :]
        lines = head.split("\r\n")
        if not lines[0].startswith("HTTP/1.1 "):
            raise WrongError(f"not a status line: {lines[0]!r}")
        status = int(lines[0].split(" ", 2)[1])
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        if status == 100:
            self._asked.insert(0, (method, asked_s))
            return Response(status, headers, b"", asked_s, time.monotonic())
        length = 0 if method == "HEAD" or status in (204, 304) else int(headers["content-length"])
        pieces, have = [self._buffer[:length]], min(length, len(self._buffer))
        self._buffer = self._buffer[length:]
        while have < length:
            if impatient():
                raise CutError("impatience")
            data = self._receive(piece if piece < 65536 else min(1 << 18, max(65536, length - have)))
            pieces.append(data[: length - have])
            self._buffer = data[length - have :]
            have += len(pieces[-1])
            if pause_s:
                time.sleep(pause_s)
        return Response(status, headers, b"".join(pieces), asked_s, time.monotonic())

    def end(self) -> None:
        """The orderly end by the server: close_notify behind the last response, nothing else."""
        if self._buffer:
            raise WrongError(f"bytes behind the last response: {self._buffer[:40]!r}")
        try:
            data = self._receive()
        except CutError as error:
            if str(error) != "close_notify":
                raise WrongError(f"the end was {error}, not close_notify") from None
        else:
            raise WrongError(f"bytes behind the last response: {data[:40]!r}")

    def reset(self) -> None:
        """Ends without a word: RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.socket.close()
