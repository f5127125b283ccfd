"""Limits per peer address: connections at once, requests per second."""

from __future__ import annotations

from pathlib import Path

import pytest
from kdaemon_pyx.http_config import Limits
from support.http import Folder, read_responses

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
CLOSE_SERVICE = 1


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "index.html").write_bytes(b"index")
    return tmp_path


def statuses(sent: bytes) -> list[int]:
    return [response.status for response in read_responses(sent)]


def test_connections(root: Path) -> None:
    site = Folder(root, Limits(connections_per_address_max=2))
    first, second, third = site.connection(), site.connection(), site.connection()
    assert statuses(first.exchange(GET)) == statuses(second.exchange(GET)) == [200]
    refused = read_responses(third.exchange(GET + GET))
    assert [response.status for response in refused] == [503]
    assert refused[0].headers["connection"] == "close"
    assert third.finished == CLOSE_SERVICE
    del first, third
    assert statuses(site.connection().exchange(GET)) == [200]
    assert site.context.counters()["addresses"] == 1
    site.close()


def test_requests_per_second(root: Path) -> None:
    site = Folder(root, Limits(requests_per_second_per_address=10))
    connection = site.connection()
    sent = read_responses(connection.exchange(GET * 12))
    assert [response.status for response in sent] == [200] * 10 + [429] * 2
    assert sent[-1].headers["retry-after"] == "1"
    assert connection.finished is None
    for _ in range(5):
        connection.advance(60)
    assert statuses(connection.exchange(GET * 4)) == [200] * 3 + [429]
    connection.advance(10_000)
    assert statuses(connection.exchange(GET * 11)) == [200] * 10 + [429]
    site.close()


def test_a_new_connection_gains_nothing(root: Path) -> None:
    site = Folder(root, Limits(requests_per_second_per_address=3))
    connection = site.connection()
    assert statuses(connection.exchange(GET * 3)) == [200] * 3
    del connection
    assert statuses(site.connection().exchange(GET)) == [429]
    site.close()


def test_off_by_default(root: Path) -> None:
    site = Folder(root)
    connections = [site.connection() for _ in range(50)]
    assert all(statuses(connection.exchange(GET * 20)) == [200] * 20 for connection in connections)
    assert "addresses" not in site.context.counters()
    site.close()
