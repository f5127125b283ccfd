"""Connecting on behalf of programs: the order of addresses (RFC 8305), what a deadline and a cancel leave behind."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from support.waiting import DEADLINE_S

from kdaemon import attach_connect
from kdaemon.attach_connect import Connector, connect, interleave

V4, V6 = socket.AF_INET, socket.AF_INET6


def info(address: tuple[str, int]) -> Any:
    return V4, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", address


@pytest.fixture
def places() -> Iterator[dict[str, tuple[str, int]]]:
    """Addresses that take a connection, one that refuses it, one that never answers."""
    with ExitStack() as stack:
        names = ("good", "better", "gone", "silent")
        listeners = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0 if name == "silent" else 16))
            for name in names
        ]
        queued = stack.enter_context(socket.socket())
        queued.connect(listeners[3].getsockname())  # its queue holds one: the next SYN is not answered
        assert select.select([listeners[3]], [], [], DEADLINE_S)[0]
        addresses = {name: listener.getsockname() for name, listener in zip(names, listeners, strict=True)}
        listeners[2].close()
        yield addresses


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has every name resolve to these."""

    def to(*addresses: tuple[str, int]) -> None:
        async def getaddrinfo(*_: object, **__: object) -> list[Any]:
            return [info(address) for address in addresses]

        monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)

    return to


def test_families_take_turns() -> None:
    four = [(V4, 0, 0, "", (f"192.0.2.{n}", 1)) for n in range(3)]
    six = [(V6, 0, 0, "", (f"2001:db8::{n}", 1)) for n in range(5)]
    assert interleave([*six, *four]) == [six[0], four[0], six[1], four[1], six[2], four[2], six[3], six[4]]
    assert interleave([*four, *six])[:3] == [four[0], six[0], four[1]]
    assert interleave(four) == four


def reached(host: str = "any.example") -> tuple[str, int]:
    async def run() -> tuple[str, int]:
        async with asyncio.timeout(DEADLINE_S):
            with await connect(host, 1) as sock:
                assert not sock.getblocking()
                peer: tuple[str, int] = sock.getpeername()
                return peer

    return asyncio.run(run())


def test_the_first_that_answers_is_kept(places: dict[str, tuple[str, int]], resolve: Callable[..., None]) -> None:
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    for addresses in (("good", "better"), ("gone", "good", "better"), ("silent", "gone", "good"), ("silent", "good")):
        resolve(*(places[name] for name in addresses))
        assert reached() == places["good"], addresses
    assert os.listdir("/proc/self/fd") == before, "no attempt is left"  # noqa: PTH208


def test_one_that_fails_is_not_waited_for(
    places: dict[str, tuple[str, int]], resolve: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure starts the next attempt at once; while nothing fails the next one has its turn after the delay."""
    monkeypatch.setattr(attach_connect, "ATTEMPT_DELAY_S", 10 * DEADLINE_S)
    resolve(places["gone"], places["gone"], places["good"])
    assert reached() == places["good"]
    resolve(places["silent"], places["good"])
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(connect("any.example", 1), 0.2))


def test_when_none_works_the_first_error_counts(
    places: dict[str, tuple[str, int]], resolve: Callable[..., None]
) -> None:
    resolve(places["gone"], ("127.0.0.1", 0))
    with pytest.raises(ConnectionRefusedError):
        reached()
    resolve()
    with pytest.raises(OSError, match="no addresses") as failure:
        reached()
    assert failure.value.errno == errno.EADDRNOTAVAIL


class Control:
    """Stands for the worker's control thread, and remembers what was done."""

    def __init__(self) -> None:
        self.connector = Connector(self.watch)
        self.done: list[tuple[object, socket.socket | None, OSError | None]] = []

    def watch(self, fd: int, callback: Callable[[int], None], mask: int) -> None:
        self.fd, self.callback = fd, callback

    def connect(self, key: object, timeout_s: float = 0.0) -> None:
        self.connector.connect(key, "any.example", 1, timeout_s, lambda *result: self.done.append((key, *result)))

    def turn(self) -> None:
        assert select.select([self.fd], [], [], DEADLINE_S)[0]
        self.callback(select.EPOLLIN)


def test_deadline_and_cancel(places: dict[str, tuple[str, int]], resolve: Callable[..., None]) -> None:
    control = Control()
    resolve(places["silent"])
    control.connect("late", 0.05)
    control.turn()
    [(key, sock, error)] = control.done
    assert (key, sock) == ("late", None)
    assert error is not None
    assert error.errno == errno.ETIMEDOUT
    control.connect("cancelled")
    control.connector.cancel("cancelled")
    control.connector.cancel("unknown")
    control.turn()
    assert len(control.done) == 1, "it was called back though it was cancelled"
    resolve(places["good"])
    control.connect("good")
    control.turn()
    key, sock, error = control.done[1]
    assert (key, error) == ("good", None)
    assert sock is not None
    assert sock.getpeername() == places["good"]
    sock.close()
