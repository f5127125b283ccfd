"""Plain HTTP that redirects to HTTPS."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable

import pytest

from kdaemon import redirect
from kdaemon.redirect import RedirectServer, redirect_response


@pytest.mark.parametrize(
    ("head", "port", "status", "location"),
    [
        (b"GET /a%20b?c=d HTTP/1.1\r\nHost: example.test\r\n\r\n", 443, 301, "https://example.test/a%20b?c=d"),
        (b"HEAD / HTTP/1.1\r\nHost: example.test:80\r\n\r\n", 8443, 301, "https://example.test:8443/"),
        (b"POST /form HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n", 443, 308, "https://a/form"),
        (b"GET / HTTP/1.0\r\n\r\n", 443, 301, "https://192.0.2.7/"),
        (b"GET http://b.test/x HTTP/1.1\r\nHost: a\r\n\r\n", 443, 301, "https://b.test/x"),
        (b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", 443, 308, "https://a/"),
        (b"GET / HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", 443, 301, "https://[::1]/"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 443, 400, None),
        (b"GET / HTTP/1.1\r\n\r\n", 443, 400, None),
        (b"GET / HTTP/1.1\r\nHost: a\r\n X: b\r\n\r\n", 443, 400, None),
        (b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 443, 400, None),
        (b"GET //evil.test/ HTTP/1.1\r\nHost: a\r\n\r\n", 443, 301, "https://a//evil.test/"),
        (b"GET /?a HTTP/1.1\r\nHost: A.Test.:80\r\n\r\n", 443, 301, "https://A.Test./?a"),
        (b"\x16\x03\x01\n", 443, 400, None),
        (b"GET /" + b"a" * 9000, 443, 431, None),
    ],
)
def test_responses(head: bytes, port: int, status: int, location: str | None) -> None:
    response = redirect_response(head, port, "192.0.2.7")
    assert response is not None
    lines = response.decode().split("\r\n")
    assert lines[0].split()[1] == str(status)
    assert [line for line in lines if line.startswith("Location")] == ([f"Location: {location}"] if location else [])
    assert response.endswith(b"Connection: close\r\n\r\n")


def test_a_client_that_names_no_host_goes_where_it_is() -> None:
    response = redirect_response(b"GET /x HTTP/1.0\r\n\r\n", 8443, "2001:db8::7")
    assert response is not None
    assert b"\r\nLocation: https://[2001:db8::7]:8443/x\r\n" in response


def test_an_incomplete_head_waits() -> None:
    assert redirect_response(b"GET / HTTP/1.1\r\nHost: a\r\n", 443, "") is None


class Loop:
    """The event loop a RedirectServer needs, turned by the test."""

    def __init__(self) -> None:
        self.readers: dict[int, Callable[[int], None]] = {}
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        self.address = self.listener.getsockname()
        self.server = RedirectServer([self.listener], 443, self.readers.__setitem__, self.readers.pop)

    def turn(self) -> None:
        for fd in select.select(list(self.readers), [], [], 0)[0]:
            if fd in self.readers:
                self.readers[fd](0)

    def client(self) -> socket.socket:
        client = socket.create_connection(self.address)
        client.settimeout(10)
        return client


@pytest.fixture
def loop() -> Loop:
    return Loop()


def until_answered(loop: Loop, client: socket.socket) -> bytes:
    while not select.select([client], [], [], 0)[0]:
        loop.turn()
    return client.recv(4096)


def test_request_in_pieces_answered_and_ended(loop: Loop) -> None:
    with loop.client() as client:
        for byte in b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n":
            client.send(bytes([byte]))
            loop.turn()
        assert b"Location: https://a/x\r\n" in until_answered(loop, client)
        assert client.recv(1) == b""
        client.send(b"more, which is discarded")
    while len(loop.readers) > 1:
        loop.turn()
    assert loop.server.redirects == 1


def test_silent_peers_are_ended_in_time(loop: Loop) -> None:
    with loop.client() as client:
        while len(loop.readers) < 2:
            loop.turn()
        now = time.monotonic()
        deadline = loop.server.expire(now)
        assert deadline is not None
        assert now < deadline <= now + redirect.DEADLINE_S
        assert loop.server.expire(deadline) is None
        assert client.recv(1) == b""


def test_too_many_wait_in_the_queue(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redirect, "CONNECTIONS_MAX", 2)
    clients = [loop.client() for _ in range(3)]
    while len(loop.readers) < 2 or loop.listener.fileno() in loop.readers:
        loop.turn()
    assert len(loop.readers) == 2
    clients[0].close()
    clients[1].close()
    clients[2].send(b"GET / HTTP/1.0\r\n\r\n")
    assert b" 301 " in until_answered(loop, clients[2])
    clients[2].close()
    loop.server.drain(time.monotonic() + 100)
    loop.server.expire(time.monotonic() + 100)
    assert not loop.readers


REQUEST = b"GET / HTTP/1.0\r\n\r\n"


def test_who_asked_before_a_drain_is_answered_and_the_others_are_ended(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redirect, "CONNECTIONS_MAX", 2)
    accepted, waiting = loop.client(), loop.client()
    while len(loop.readers) < 2 or loop.listener.fileno() in loop.readers:
        loop.turn()
    queued = [loop.client() for _ in range(5)]
    for client in (accepted, *queued[1:]):
        client.send(REQUEST)
    loop.server.drain(time.monotonic() + 100)
    assert loop.listener.fileno() < 0
    for client in (accepted, *queued[1:]):
        assert b" 301 " in client.recv(4096)
        assert client.recv(1) == b""
    for client in (waiting, queued[0]):  # they have not said a word
        assert client.recv(1) == b""
    assert loop.server.under_way == 5
    for client in (accepted, waiting, *queued):
        client.close()
    while loop.readers:
        loop.turn()
    assert loop.server.under_way == loop.server.cut == 0


def test_a_request_that_is_not_complete_at_the_drain_deadline_is_cut(loop: Loop) -> None:
    with loop.client() as late, loop.client() as later:
        for client in (late, later):
            client.send(REQUEST[:-2])
        now = time.monotonic()
        loop.server.drain(now + 5)
        assert loop.server.expire(now) == now + 5
        late.send(REQUEST[-2:])
        assert b" 301 " in until_answered(loop, late)
        loop.server.drain(now + 1)  # the second signal is impatient
        assert loop.server.expire(now) == now + 1
        assert loop.server.expire(now + 1) is None
        assert (loop.server.under_way, loop.server.cut, loop.readers) == (0, 1, {})
        assert later.recv(1) == b""
