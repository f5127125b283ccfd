"""Limits of connections per peer address act at accept: who is one too many costs no handshake."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from interop.process_support import Connection, facts
from support.daemon import Daemon
from support.waiting import DEADLINE_S, eventually

Serve = Callable[..., Daemon]


class From(Connection):
    """A connection from one of the loopback network's addresses."""

    def __init__(self, daemon: Daemon, source: str) -> None:
        context = ssl.create_default_context(cafile=str(daemon.ca))
        plain = socket.create_connection(daemon.address, DEADLINE_S, source_address=(source, 0))
        try:
            self.socket = context.wrap_socket(plain, server_hostname="localhost")
        except BaseException:
            plain.close()
            raise


@pytest.fixture
def limited(kdaemon: Serve, tmp_path: Path) -> Iterator[Callable[[str], Daemon]]:
    def start(setting: str) -> Daemon:
        file = tmp_path / "kdaemon.toml"
        file.write_text(f"[http]\n{setting}\n")
        return kdaemon("--workers", "1", "--config", str(file))

    yield start


def worker(daemon: Daemon) -> dict[str, Any]:
    found: dict[str, Any] = facts(daemon)["workers"][0]
    return found


def test_connections_at_once(limited: Callable[[str], Daemon]) -> None:
    daemon = limited("connections_per_address_max = 2")
    with ExitStack() as stack:
        first = stack.enter_context(From(daemon, "127.0.0.2"))
        second = stack.enter_context(From(daemon, "127.0.0.2"))
        for _ in range(5):
            with pytest.raises((ssl.SSLError, ConnectionError)):
                From(daemon, "127.0.0.2")
        other = stack.enter_context(From(daemon, "127.0.0.3"))
        assert first.works() and second.works() and other.works()
        status = worker(daemon)
        assert status["engine"]["refused_by_limit"] == 5
        assert status["handshakes"] == {"full": 3, "resumed": 0, "failed": 0}, "no handshake was begun for them"
        first.socket.close()

        def again() -> bool:
            try:
                return stack.enter_context(From(daemon, "127.0.0.2")).works()
            except OSError:
                return False

        eventually(again, "there is room for one again")


def test_new_connections_per_second(limited: Callable[[str], Daemon]) -> None:
    daemon = limited("connections_per_second_per_address = 3")
    refused = 0
    with ExitStack() as stack:
        for _ in range(30):
            try:
                stack.enter_context(From(daemon, "127.0.0.2"))
            except (ssl.SSLError, ConnectionError):
                refused += 1
        assert 0 < refused < 28, "three at once are let in, and the fourth is not"
        assert worker(daemon)["engine"]["refused_by_limit"] == refused
        assert stack.enter_context(From(daemon, "127.0.0.3")).works()
    eventually(lambda: worker(daemon)["connections"] == 0, "all are gone")
