"""Clients that hold every byte: TLS 1.3 in memory (OpenSSL through `ssl`), and ClientHellos made by hand."""

from __future__ import annotations

import os
import socket
import ssl
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from support.waiting import DEADLINE_S

REQUEST = b"GET /small.txt HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"

CONTENT_ALERT, CONTENT_HANDSHAKE, CONTENT_APPLICATION_DATA = 21, 22, 23
FATAL = 2

# Alert descriptions, RFC 8446 section 6.
UNEXPECTED_MESSAGE, BAD_RECORD_MAC, RECORD_OVERFLOW, HANDSHAKE_FAILURE = 10, 20, 22, 40
ILLEGAL_PARAMETER, DECODE_ERROR, PROTOCOL_VERSION, MISSING_EXTENSION = 47, 50, 70, 109


def record(content_type: int, body: bytes, version: int = 0x0303) -> bytes:
    return struct.pack(">BHH", content_type, version, len(body)) + body


def _vector(body: bytes, length_bytes: int = 2) -> bytes:
    return len(body).to_bytes(length_bytes, "big") + body


def _extension(kind: int, body: bytes) -> bytes:
    return struct.pack(">H", kind) + _vector(body)


def _u16s(values: Sequence[int]) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


def client_hello(
    *,
    legacy_version: int = 0x0303,
    versions: Sequence[int] | None = (0x0304,),
    suites: Sequence[int] = (0x1301,),
    groups: Sequence[int] = (0x001D,),
    shares: Sequence[tuple[int, bytes]] | None = None,
    signature_algorithms: Sequence[int] = (0x0403, 0x0804, 0x0807),
    compression: bytes = b"\0",
) -> bytes:
    """A ClientHello record (RFC 8446 section 4.1.2). Without `shares` it has a random one for the first group."""
    if shares is None:
        shares = [(groups[0], os.urandom(32))] if groups else []
    extensions = _extension(0, _vector(b"\0" + _vector(b"localhost")))
    if versions is not None:
        extensions += _extension(43, _vector(_u16s(versions), 1))
    if groups:
        extensions += _extension(10, _vector(_u16s(groups)))
    extensions += _extension(13, _vector(_u16s(signature_algorithms)))
    extensions += _extension(51, _vector(b"".join(_u16s([group]) + _vector(share) for group, share in shares)))
    body = struct.pack(">H", legacy_version) + os.urandom(32) + _vector(os.urandom(32), 1)
    body += _vector(_u16s(suites)) + _vector(compression, 1) + _vector(extensions)
    return record(CONTENT_HANDSHAKE, b"\x01" + _vector(body, 3), 0x0301)


def receive_to_end(connection: socket.socket) -> bytes:
    """All bytes until the peer closes; a reset ends it too. TimeoutError if the peer does not close in time."""
    connection.settimeout(DEADLINE_S)
    received = b""
    try:
        while piece := connection.recv(65536):
            received += piece
    except (ConnectionResetError, BrokenPipeError):
        pass
    return received


def plaintext_alert(received: bytes) -> int | None:
    """The description of the fatal alert that `received` is, unprotected and alone; None if it is not one."""
    if len(received) == 7 and received[0] == CONTENT_ALERT and received[3:6] == b"\0\2" + bytes([FATAL]):
        return received[6]
    return None


@dataclass
class Response:
    """An HTTP response; `truncated` if the connection ended without close_notify."""

    status: int
    headers: dict[str, str]
    body: bytes
    truncated: bool


def parse_response(data: bytes, truncated: bool = False) -> Response:
    head, separator, body = data.partition(b"\r\n\r\n")
    assert separator, f"no complete response head: {data!r}"
    lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    return Response(int(lines[0].split()[1]), headers, body, truncated)


class MemoryClient:
    """A TLS 1.3 client over a socket that it reads itself and writes only when told.

    `flight` collects what is to be sent; `send` sends it. So a test decides how the bytes are cut and what follows.
    """

    def __init__(
        self,
        address: tuple[str, int],
        ca: Path,
        *,
        context: ssl.SSLContext | None = None,
        server_hostname: str = "localhost",
    ) -> None:
        if context is None:
            context = ssl.create_default_context(cafile=str(ca))
            context.minimum_version = ssl.TLSVersion.TLSv1_3
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_hostname)
        self.socket = socket.create_connection(address, DEADLINE_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> MemoryClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    @property
    def flight(self) -> bytes:
        """What waits to be sent; taken."""
        return self._outgoing.read()

    def send(self) -> None:
        self.socket.sendall(self.flight)

    def receive(self) -> bool:
        """Feeds what the peer sent next; False at its FIN."""
        data = self.socket.recv(65536)
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()
        return bool(data)

    def handshake(self, *, send_finished: bool = False) -> None:
        """Up to the client's Finished, which stays in `flight` unless `send_finished`."""
        while True:
            try:
                self.tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self.send()
                if not self.receive():
                    raise ConnectionError("the peer closed in the middle of the handshake") from None
        if send_finished:
            self.send()

    def request(self, request: bytes = REQUEST) -> None:
        """Appends a request to `flight`."""
        self.tls.write(request)

    def read_to_end(self) -> tuple[bytes, bool]:
        """All plaintext until the peer's end; True if it ended without close_notify. Raises SSLError at an alert."""
        data = bytearray()
        while True:
            try:
                piece = self.tls.read(65536)
            except ssl.SSLWantReadError:
                try:
                    self.receive()
                except (ConnectionResetError, BrokenPipeError):
                    self._incoming.write_eof()
                continue
            except ssl.SSLEOFError:
                return bytes(data), True
            except ssl.SSLZeroReturnError:
                return bytes(data), False
            if not piece:
                return bytes(data), False
            data += piece

    def response(self) -> Response:
        """The response that the peer's end completes."""
        return parse_response(*self.read_to_end())

    def alert(self) -> str:
        """The reason OpenSSL gives for the fatal alert the peer sends, "" if it closes without one."""
        try:
            self.read_to_end()
        except ssl.SSLError as error:
            return error.reason or ""
        return ""


def fetch(address: tuple[str, int], ca: Path, path: str = "/small.txt") -> Response:
    """One whole request on a connection of its own, certificate verified."""
    with MemoryClient(address, ca) as client:
        client.handshake()
        client.request(REQUEST.replace(b"/small.txt", path.encode()))
        client.send()
        return client.response()
