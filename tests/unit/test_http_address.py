"""Requests per second of one peer address. Limits of connections act at accept: interop/test_address_limits.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from kdaemon_pyx.http_config import Limits
from support.http import Folder, read_responses

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "index.html").write_bytes(b"index")
    return tmp_path


def statuses(sent: bytes) -> list[int]:
    return [response.status for response in read_responses(sent)]


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
