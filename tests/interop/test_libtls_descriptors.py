"""Descriptors that hostile or careless programs pass for ADOPT, and exports that nobody receives."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kdaemon_pyx import client_abi as abi
from support.content import pattern
from support.daemon import Daemon, status
from support.waiting import DEADLINE_S, eventually

from libtls import Lane, TlsError, errors
from libtls.exchange import tls_adopt, tls_export
from libtls.functions import tls_listen, tls_open, tls_start

LINGER_S = 3600


def attach(daemon: Daemon) -> Lane:
    return Lane.attach(daemon.socket_path, operations=256)


def descriptors(daemon: Daemon) -> int:
    """How many the worker has open."""
    [worker] = status(daemon)["workers"]  # type: ignore[misc]
    return sum(1 for _ in Path(f"/proc/{worker['pid']}/fd").iterdir())


@pytest.fixture
def lane(daemon: Daemon) -> Iterator[Lane]:
    """Afterwards the worker has as many descriptors as before."""
    warm = attach(daemon)  # threads and their sockets are made with the first of a kind
    with contextlib.suppress(TlsError), socket.socket() as unconnected:
        tls_adopt(unconnected, lane=warm).wait(DEADLINE_S)
    tls_open("localhost", daemon.port, cafile=daemon.ca, lane=warm).wait(DEADLINE_S).close()
    warm.close()
    eventually(lambda: not status(daemon)["clients"], "the first client is gone")
    before = descriptors(daemon)
    lane = attach(daemon)
    yield lane
    lane.close()
    eventually(lambda: not status(daemon)["clients"], "the client is detached")
    eventually(lambda: descriptors(daemon) <= before, "all descriptors are given back")


def send(lane: Lane, message: bytes, fds: list[int]) -> None:
    with socket.socket(fileno=os.dup(lane.ring.attach_fileno())) as sock:
        socket.send_fds(sock, [message], fds) if fds else sock.sendall(message)


def temporary_file(_: Lane) -> int:
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def pipe(_: Lane) -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return reader


def epoll(_: Lane) -> int:
    with select.epoll() as object_:
        return os.dup(object_.fileno())


def unix_socket(_: Lane) -> int:
    ours, theirs = socket.socketpair()
    ours.close()
    return theirs.detach()


def listening(_: Lane) -> int:
    return socket.create_server(("127.0.0.1", 0)).detach()


def half_open(_: Lane) -> int:
    """SYN is out and nobody answers: the listener's queue was full before it."""
    listener, queued, waiting = socket.create_server(("127.0.0.1", 0), backlog=0), socket.socket(), socket.socket()
    queued.connect(listener.getsockname())
    assert select.select([listener], [], [], DEADLINE_S)[0]
    waiting.setblocking(False)
    assert waiting.connect_ex(listener.getsockname()) == errno.EINPROGRESS
    listener.detach(), queued.detach()  # they stay open: a SYN sent again would be refused, and the next one answered
    return waiting.detach()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (temporary_file, errno.ENOTSOCK),
        (pipe, errno.ENOTSOCK),
        (epoll, errno.ENOTSOCK),
        (lambda _: os.eventfd(0), errno.ENOTSOCK),
        (lambda _: os.open("/", os.O_RDONLY), errno.ENOTSOCK),
        (lambda _: os.open("/", os.O_PATH), errno.ENOTSOCK),
        (lambda _: os.open("/dev/null", os.O_RDWR), errno.ENOTSOCK),
        (lambda lane: os.dup(lane.ring.fileno()), errno.EPROTONOSUPPORT),  # the doorbell
        (lambda lane: os.dup(lane.ring.attach_fileno()), errno.EPROTONOSUPPORT),
        (unix_socket, errno.EPROTONOSUPPORT),
        (lambda _: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).detach(), errno.EPROTONOSUPPORT),
        (lambda _: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).detach(), errno.EPROTONOSUPPORT),
        (lambda _: socket.socket().detach(), errno.ENOTCONN),
        (listening, errno.ENOTCONN),
        (half_open, errno.ENOTCONN),
    ],
    ids=[
        "file", "pipe", "epoll", "eventfd", "folder", "path", "device", "doorbell", "attach socket", "unix", "udp",
        "netlink", "unconnected", "listening", "half-open",
    ],
)  # fmt: skip
def test_what_cannot_be_adopted(lane: Lane, make: Callable[[Lane], int], expected: int) -> None:
    fd = make(lane)
    operation = tls_adopt(fd, lane=lane)
    os.close(fd)
    with pytest.raises(TlsError) as failure:
        operation.wait(DEADLINE_S)
    assert failure.value.errno == expected
    assert "ADOPT" in str(failure.value)
    lane.run(abi.NOP)  # it is still attached


@pytest.mark.guest
def test_a_socket_that_has_a_ulp_is_not_adopted(lane: Lane) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as client:
        client.setsockopt(socket.IPPROTO_TCP, 31, b"tls")
        with pytest.raises(TlsError) as failure:
            tls_adopt(client, lane=lane).wait(DEADLINE_S)
        assert failure.value.errno == errno.EEXIST


def test_an_end_that_has_come_already(lane: Lane) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        peer, _ = listener.accept()
        peer.sendall(b"goodbye")
        peer.shutdown(socket.SHUT_WR)
        connection = tls_adopt(client, lane=lane).wait(DEADLINE_S)
        client.close()
        assert connection.read(timeout=DEADLINE_S) == b"goodbye"
        assert connection.read(timeout=DEADLINE_S) == b""
        with pytest.raises(TlsError) as failure:
            tls_start(connection, "localhost").wait(DEADLINE_S)
        assert failure.value.errno == errno.EPIPE
        connection.write(b"you, too")
        connection.close()
        assert peer.recv(100) == b"you, too"
        peer.close()


def test_a_message_without_its_descriptor(lane: Lane) -> None:
    operation = lane.post(abi.ADOPT)
    send(lane, abi.pack_descriptor_message(abi.ADOPT, operation.user_data), [])
    assert lane.ring.wait(operation, DEADLINE_S)
    assert operation.result == -errno.EMFILE


def test_a_descriptor_that_comes_first_and_one_that_never_comes(lane: Lane) -> None:
    never = lane.post(abi.ADOPT, timeout=0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as sock:
        send(lane, abi.pack_descriptor_message(abi.ADOPT, never.user_data + 1), [sock.fileno()])
        early = lane.post(abi.ADOPT)
        assert lane.ring.wait(early, DEADLINE_S)
        assert early.result > 0
    assert lane.ring.wait(never, DEADLINE_S)
    assert never.result == -errno.ETIMEDOUT


@pytest.mark.parametrize(
    "make",
    [
        lambda lane: send(lane, b"x" * 16, []),
        lambda lane: send(lane, b"x" * 16, [0]),
        lambda lane: send(lane, b"short", [0]),
        lambda lane: send(lane, abi.pack_descriptor_message(abi.EXPORT, 1), [0]),
        lambda lane: send(lane, abi.pack_descriptor_message(abi.ADOPT, 1 << 40), [0, 1]),
        lambda lane: send(lane, abi.pack_descriptor_message(abi.ADOPT, 1 << 40), [0] * 253),
        lambda lane: [send(lane, abi.pack_descriptor_message(abi.ADOPT, 1 << 40), [0]) for _ in range(2)],
        lambda lane: [send(lane, abi.pack_descriptor_message(abi.ADOPT, (1 << 40) + n), [0]) for n in range(65)],
    ],
    ids=["garbage", "garbage with one", "short", "wrong operation", "two", "253", "the same twice", "a flood"],
)
def test_who_breaks_the_rules_is_cut_off(daemon: Daemon, lane: Lane, make: Callable[[Lane], object]) -> None:
    hostile = attach(daemon)
    pending = hostile.post(abi.ADOPT)
    with contextlib.suppress(OSError):
        make(hostile)
    assert hostile.ring.wait(pending, DEADLINE_S)
    assert pending.result == -errno.ECONNRESET
    hostile.close()
    lane.run(abi.NOP)  # others go on


def linger(sock: socket.socket) -> None:
    """A close of the last descriptor then waits for the peer."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, LINGER_S))


def has_no_reader(writer: int) -> bool:
    poll = select.poll()
    poll.register(writer, 0)
    return bool(poll.poll(0))


@pytest.mark.parametrize("how", ["adopted", "unclaimed", "refused", "in the socket"])
def test_a_close_that_waits_holds_up_nobody(daemon: Daemon, how: str) -> None:
    """A descriptor whose last close lingers for an hour, because the peer reads nothing."""
    hostile = attach(daemon)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client = socket.create_connection(listener.getsockname())
        peer, _ = listener.accept()
    client.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            client.send(bytes(65536))
    linger(client)
    # Ours is closed by a thread: if it is the last one, it waits, too.
    closing = threading.Thread(target=client.close, daemon=True)
    if how == "adopted":
        connection = tls_adopt(client, lane=hostile).wait(DEADLINE_S)
        client.close()
        connection.close_operation(timeout=0.001)
    elif how == "unclaimed":
        send(hostile, abi.pack_descriptor_message(abi.ADOPT, 1 << 40), [client.fileno()])
        client.close()
    elif how == "refused":
        send(hostile, b"x" * 16, [client.fileno()])
        closing.start()
    else:
        for number in range(3):
            with contextlib.suppress(OSError):
                send(hostile, abi.pack_descriptor_message(abi.ADOPT, (1 << 40) + number), [client.fileno()])
        closing.start()
    hostile.close()
    began = time.monotonic()
    other = attach(daemon)
    with tls_open("localhost", daemon.port, cafile=daemon.ca, lane=other).wait(DEADLINE_S) as page:
        page.write(b"GET /page HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert page.makefile().read().endswith(pattern(100_000))
    reader, writer = os.pipe()
    with pytest.raises(TlsError), contextlib.closing(os.fdopen(reader)):
        tls_adopt(reader, lane=other).wait(DEADLINE_S)
    eventually(lambda: has_no_reader(writer), "another's descriptor is closed meanwhile")
    os.close(writer)
    other.close()
    eventually(lambda: not status(daemon)["clients"], "all are detached")
    assert time.monotonic() - began < DEADLINE_S
    peer.close()  # the closes that waited end


def test_a_program_that_keeps_using_its_socket(lane: Lane) -> None:
    """It garbles its own connection, and nothing else."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        peer, _ = listener.accept()
    connection = tls_adopt(client, lane=lane).wait(DEADLINE_S)
    for _ in range(100):
        client.setblocking(False)
        peer.sendall(b"x")
    client.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(errors.TlsError):
        while connection.read(timeout=DEADLINE_S):
            pass
    with contextlib.suppress(errors.TlsError):
        connection.close()
    lane.run(abi.NOP)
    client.close()
    peer.close()


@pytest.mark.guest
def test_exports_that_nobody_receives(daemon: Daemon, lane: Lane) -> None:
    """They end with EBUSY at some point, the connections stay usable, and at the end everything is given back."""
    if daemon.ready[0].backend != "kernel":
        pytest.skip("only kernel TLS can be exported")
    listener = tls_listen(certificate="localhost", lane=lane).wait(DEADLINE_S)
    results = []
    for _ in range(40):
        accept = listener.accept_operation()
        client = tls_open("localhost", listener.port, cafile=daemon.ca, lane=lane).wait(DEADLINE_S)
        accept.wait(DEADLINE_S)
        raw = lane.post(abi.EXPORT, client.handle)
        assert lane.ring.wait(raw, DEADLINE_S)
        results.append(raw.result)
        if raw.result < 0:
            break
    assert set(results[:-1]) == {0}
    assert results[-1] == -errno.EBUSY
    client.write(b"it goes on")
    with pytest.raises(TlsError, match="in flight"):
        tls_export(client).wait(DEADLINE_S)
