"""A small, strict reader of HTTP/1.1 responses, and a folder served over memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kdaemon_pyx.http_config import Limits, Site
from kdaemon_pyx.http_context import FileContext
from kdaemon_pyx.http_loopback import Loopback
from kdaemon_pyx.mime import MimeTable


@dataclass
class Response:
    status: int
    headers: dict[str, str]
    body: bytes


def read_responses(data: bytes, methods: str = "") -> list[Response]:
    """All responses in `data`, which must be complete; `methods` has an H for each one that answers a HEAD."""
    responses = []
    while data:
        head, separator, data = data.partition(b"\r\n\r\n")
        assert separator, f"head without an end: {head[:100]!r}"
        lines = head.decode("ascii").split("\r\n")
        version, status, reason = lines[0].split(" ", 2)
        assert version == "HTTP/1.1"
        assert reason
        headers: dict[str, str] = {}
        for line in lines[1:]:
            name, value = line.split(": ", 1)
            assert name.lower() not in headers, f"two {name} fields"
            headers[name.lower()] = value
        assert status.startswith("1") or "date" in headers
        length = 0
        is_head = methods[len(responses) : len(responses) + 1] == "H"
        if status[0] != "1" and status not in ("204", "304"):
            length = int(headers["content-length"])
        body = b"" if is_head else data[:length]
        assert is_head or len(body) == length, f"{len(body)} bytes of a body of {length}"
        data = data[len(body) :]
        responses.append(Response(int(status), headers, body))
    return responses


class Folder:
    """A site over memory: `get` makes one request on a connection of its own; `connection` gives one to work with."""

    def __init__(self, root: Path, limits: Limits | None = None, mime: MimeTable | None = None, **site: object) -> None:
        self.root = root
        self.root_fd = os.open(root, os.O_PATH | os.O_DIRECTORY)
        self.context = FileContext([Site(self.root_fd, **site)], limits, mime)  # type: ignore[arg-type]

    def close(self) -> None:
        os.close(self.root_fd)

    def connection(self, **options: object) -> Loopback:
        return Loopback(self.context, **options)

    def request(self, target: str, *headers: str, method: str = "GET", **options: object) -> Response:
        connection = self.connection(**options)
        lines = [f"{method} {target} HTTP/1.1", "Host: example.test", *headers, "", ""]
        sent = connection.exchange("\r\n".join(lines).encode("utf-8", "surrogateescape"))
        responses = read_responses(sent, "H" if method == "HEAD" else "")
        assert responses, "no response"
        return responses[-1]

    def get(self, target: str, *headers: str, **options: object) -> Response:
        return self.request(target, *headers, **options)


def folder(root: Path, limits: Limits | None = None, **site: object) -> Iterator[Folder]:
    """For fixtures: a Folder that is closed afterwards."""
    served = Folder(root, limits, **site)
    yield served
    served.close()


def age(path: Path) -> None:
    """Waits, without guessing, until `path` was changed long enough ago that its timestamps are trusted (20 ms)."""
    import time

    while time.time_ns() - path.stat().st_ctime_ns < 25_000_000:
        os.sched_yield()
