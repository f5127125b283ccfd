"""The arena while the daemon uses it: rewritten meanwhile, wanted back, or its owner dead.

With both record layers; the kernel's in the guests.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from kdaemon_pyx import client_abi as abi
from support.daemon import Daemon, status
from support.waiting import DEADLINE_S, eventually, read_line

from libtls import Lane, errors
from libtls.connection import Connection, Listener
from libtls.functions import tls_listen

DEATHS = 8
LARGE = 4 << 20


@pytest.fixture
def lane(daemon: Daemon) -> Iterator[Lane]:
    lane = Lane.attach(daemon.socket_path, arena_size=48 << 20)
    yield lane
    lane.close()
    eventually(lambda: not status(daemon)["clients"], "the client is detached")


@pytest.fixture
def listener(lane: Lane) -> Listener:
    return tls_listen(certificate="localhost", lane=lane).wait(DEADLINE_S)


def pair(daemon: Daemon, listener: Listener) -> tuple[ssl.SSLSocket, Connection]:
    accept = listener.accept_operation()
    context = ssl.create_default_context(cafile=str(daemon.ca))
    plain = socket.create_connection(("127.0.0.1", listener.port), DEADLINE_S)
    peer = context.wrap_socket(plain, server_hostname="localhost", suppress_ragged_eofs=False)
    return peer, accept.wait(DEADLINE_S)


@contextlib.contextmanager
def arena_of_this_process() -> Iterator[memoryview]:
    """A second mapping of the one attached lane's memory, as a hostile program would keep it."""
    descriptors = [path for path in Path("/proc/self/fd").iterdir() if "kdaemon-client" in _target(path)]
    assert len(descriptors) == 1
    descriptor = int(descriptors[0].name)
    memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
    with memoryview(memory) as view:
        offset = int.from_bytes(view[40:48], sys.byteorder)  # struct client_header: arena_offset
        with view[offset:] as arena:
            yield arena
    memory.close()


def _target(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""


def test_an_arena_that_is_rewritten_while_it_is_sent(daemon: Daemon, lane: Lane, listener: Listener) -> None:
    """The peer gets valid records of the right length: their content is the program's own affair."""
    peer, connection = pair(daemon, listener)
    stop = threading.Event()

    def rewrite(arena: memoryview) -> None:
        noise = os.urandom(1 << 20)
        while not stop.is_set():
            for begin in range(0, len(arena) - len(noise) + 1, len(noise)):
                arena[begin : begin + len(noise)] = noise

    got = 0
    with arena_of_this_process() as arena, peer:
        rewriter = threading.Thread(target=rewrite, args=(arena,))
        rewriter.start()
        try:
            writer = threading.Thread(target=lambda: [connection.write(bytes(LARGE)) for _ in range(4)])
            writer.start()
            while got < 4 * LARGE:
                data = peer.recv(1 << 18)  # raises if a record does not open
                assert data
                got += len(data)
            writer.join(DEADLINE_S)
        finally:
            stop.set()
            rewriter.join()
        connection.write(b"and it goes on")
        rest = b""
        while len(rest) < 14:
            rest += peer.recv(14)
        assert rest == b"and it goes on"
    connection.close()


def test_a_cancelled_read_gives_its_memory_back_and_loses_nothing(
    daemon: Daemon, lane: Lane, listener: Listener
) -> None:
    peer, connection = pair(daemon, listener)
    with peer:
        for round_number in range(20):
            first, second = connection.read_operation(100), connection.read_operation(100)
            first.cancel().wait(DEADLINE_S)
            message = b"message %d" % round_number
            if round_number % 2:
                peer.sendall(message)
            try:
                got = first.wait(DEADLINE_S)  # it came before the cancel
                second.cancel()
                with contextlib.suppress(errors.Cancelled):
                    got += second.wait(DEADLINE_S)
            except errors.Cancelled:
                if not round_number % 2:
                    peer.sendall(message)
                got = second.wait(DEADLINE_S)
            assert got == message
            first.destroy()
            second.destroy()
        assert lane.ring.arena_used == 0
    connection.close()


def test_deadlines_of_reads(daemon: Daemon, lane: Lane, listener: Listener) -> None:
    peer, connection = pair(daemon, listener)
    with peer:
        with pytest.raises(errors.DeadlinePassed):
            connection.read(100, timeout=0.05)
        peer.sendall(b"late")
        assert connection.read(100, timeout=DEADLINE_S) == b"late"
    connection.close()


@pytest.mark.parametrize("how", ["deadline", "cancel"])
def test_a_write_that_a_slow_peer_holds_up(daemon: Daemon, lane: Lane, listener: Listener, how: str) -> None:
    """It ends with a short count, which is what the peer gets without anything being sent after it; what was queued
    behind it ends with ECANCELED, and what is written later is not in the middle of it."""
    peer, connection = pair(daemon, listener)
    with peer:
        size = 12 << 20  # more than all the sockets' buffers take
        write = connection.write_operation(b"x" * size, timeout=0.3 if how == "deadline" else None)
        behind = [connection.write_operation(b"y" * length) for length in (1, 100_000, 1)]
        received = bytearray(peer.recv(1))  # it is under way
        if how == "cancel":
            write.cancel()
        count = write.wait(DEADLINE_S)
        assert 0 < count < size
        for operation in behind:
            with pytest.raises(errors.Cancelled) as failure:
                operation.wait(DEADLINE_S)
            assert failure.value.errno == errno.ECANCELED
        while len(received) < count:
            received += peer.recv(1 << 18)  # raises where a record does not open, or none comes
        assert received == b"x" * count
        connection.write(b"z")
        connection.close()
        assert peer.recv(100) == b"z"
        assert peer.recv(100) == b""  # close_notify, or it would raise


def test_close_with_a_read_waiting(daemon: Daemon, lane: Lane, listener: Listener) -> None:
    peer, connection = pair(daemon, listener)
    with peer:
        reads = [connection.read_operation(1000) for _ in range(3)]
        connection.close()
        for read in reads:
            with pytest.raises(errors.Cancelled):
                read.wait(DEADLINE_S)
            read.destroy()
        assert peer.recv(1) == b""
    assert lane.ring.arena_used == 0


def test_reading_is_shut_down_with_a_read_waiting(daemon: Daemon, lane: Lane, listener: Listener) -> None:
    """What comes afterwards is thrown away: the peer is not held up."""
    peer, connection = pair(daemon, listener)
    with peer:
        read = connection.read_operation(1000)
        lane.run(abi.SHUTDOWN, connection.handle, argument=abi.SHUTDOWN_READ)
        with pytest.raises(errors.Cancelled):
            read.wait(DEADLINE_S)
        peer.sendall(bytes(8 << 20))
        connection.write(b"still there")
        assert peer.recv(100) == b"still there"
    connection.close()


def test_large_reads_get_what_is_there(daemon: Daemon, lane: Lane, listener: Listener) -> None:
    """One READ takes several records, and ends with what there is."""
    peer, connection = pair(daemon, listener)
    data = os.urandom(1 << 20)
    with peer:
        sender = threading.Thread(target=peer.sendall, args=(data,))
        sender.start()
        got = bytearray()
        while len(got) < len(data):
            got += connection.read(300_000)
        assert got == data
        sender.join()
    connection.close()


VICTIM = """
import os, socket, ssl, sys, threading
from libtls import Lane
from libtls.functions import tls_listen
lane = Lane.attach(sys.argv[1], operations=64, arena_size=48 << 20)
listener = tls_listen(certificate="localhost", lane=lane).wait(60)
accept = listener.accept_operation()
context = ssl.create_default_context(cafile=sys.argv[2])
plain = socket.create_connection(("127.0.0.1", listener.port))
peer = context.wrap_socket(plain, server_hostname="localhost")
connection = accept.wait(60)
read = connection.read_operation(65536)                  # waits in the socket
write = connection.write_operation(bytes(12 << 20))      # more than the sockets take
print("ready", flush=True)
if sys.argv[3] == "tread":
    while True:
        peer.send(bytes(1000))
        read.wait(60)
        read.destroy()
        read = connection.read_operation(65536)
threading.Event().wait()
"""


@pytest.mark.parametrize("how", ["still", "tread"])
def test_the_owner_dies_while_its_memory_is_lent(daemon: Daemon, how: str) -> None:
    """Nothing is left: no client, no connection, no page of its memory."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", VICTIM, daemon.socket_path, str(daemon.ca), how]

    def left() -> tuple[object, int]:
        report = status(daemon)
        workers = report["workers"]
        assert isinstance(workers, list)
        return report["clients"], sum(worker["connections"] for worker in workers)

    for _ in range(DEATHS if how == "still" else DEATHS // 4):
        with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0, env=environment) as process:
            assert process.stdout is not None
            assert read_line(process.stdout, "the victim is ready") == b"ready\n"
            process.send_signal(signal.SIGKILL)
        eventually(lambda: left() == ([], 0), "clients and connections are gone")
        eventually(lambda: not mapped(daemon), "its memory is unmapped")


def mapped(daemon: Daemon) -> bool:
    """Some worker still maps a client's memory."""
    return any("kdaemon-client" in Path(f"/proc/{pid}/maps").read_text() for pid in daemon.pids)
