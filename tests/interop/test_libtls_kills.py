"""Programs that are killed: within 100 ms the daemon has given back their memory, descriptors and connections."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from kdaemon_pyx import client_abi as abi
from support.certificates import Issued
from support.daemon import Daemon, serve
from support.waiting import DEADLINE_S, eventually

from kdaemon import control
from libtls import Lane
from libtls.functions import tls_connect, tls_listen, tls_open, tls_start

KILLS = 56 if os.environ.get("CI") is None else 1000
LIMIT_S = 0.1
MEMORY = "memfd:kdaemon-client"


@dataclass
class Place:
    """What a victim works with; made before it is forked."""

    path: str
    ca: Path
    port: int
    silent: int  # port where connections are taken and nobody speaks
    full: int  # port where connections are not even taken
    hold: int  # readable when nobody may hold anything any more
    kept: list[object] = field(default_factory=list)

    def lane(self) -> Lane:
        lane = Lane.attach(self.path, operations=64, arena_size=4 << 20)
        self.kept.append(lane)
        return lane


def raw_attach(place: Place) -> tuple[socket.socket, list[int]]:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(place.path)
    connection.sendall(abi.pack_hello())
    return connection, list(socket.recv_fds(connection, abi.HELLO_REPLY_SIZE, 2)[1])


# What victims have under way. Each returns when it is, or never; the objects are kept until the process ends.


def connected_only(place: Place) -> None:
    connection = socket.socket(socket.AF_UNIX)
    place.kept.append(connection)
    connection.connect(place.path)


def half_a_hello(place: Place) -> None:
    connected_only(place)
    connection = place.kept[-1]
    assert isinstance(connection, socket.socket)
    connection.sendall(abi.pack_hello()[:10])


def reply_unread(place: Place) -> None:
    connected_only(place)
    connection = place.kept[-1]
    assert isinstance(connection, socket.socket)
    connection.sendall(abi.pack_hello())


def nothing(place: Place) -> None:
    place.lane().run(abi.NOP)


def opening(place: Place) -> None:
    tls_open("localhost", place.silent, insecure=True, lane=place.lane())


def connecting(place: Place) -> None:
    tls_connect("127.0.0.1", place.full, lane=place.lane())


def starting(place: Place) -> None:
    connection = tls_connect("127.0.0.1", place.silent, lane=place.lane()).wait(DEADLINE_S)
    tls_start(connection, "localhost", insecure=True)


def accepting(place: Place) -> None:
    listener = tls_listen(certificate="localhost", lane=place.lane()).wait(DEADLINE_S)
    for _ in range(10):
        listener.accept_operation()


def shaking_hands(place: Place) -> int:
    """Its listener has connections whose handshake is not done: the port for them."""
    listener = tls_listen(certificate="localhost", lane=place.lane()).wait(DEADLINE_S)
    listener.accept_operation()
    place.kept.append(listener)
    return listener.port


def reading_behind_a_barrier(place: Place) -> None:
    connection = tls_open("localhost", place.port, cafile=place.ca, lane=place.lane()).wait(DEADLINE_S)
    connection.read_operation()
    connection.barrier_operation()
    connection.write_operation(b"x")
    place.kept.append(connection)


def writing_to_nobody(place: Place) -> None:
    """WRITEs that find no room, SHUTDOWN and CLOSE behind them; the reader is the same program, and does not read."""
    lane = place.lane()
    listener = tls_listen(certificate="localhost", lane=lane).wait(DEADLINE_S)
    accept = listener.accept_operation()
    client = tls_open("localhost", listener.port, cafile=place.ca, lane=lane).wait(DEADLINE_S)
    place.kept += [client, accept.wait(DEADLINE_S)]
    for _ in range(14):
        client.write_operation(bytes(250_000))
    lane.post(abi.SHUTDOWN, client.handle, argument=abi.SHUTDOWN_WRITE)
    client.close_operation()


def busy(place: Place) -> None:
    """Everything at once, again and again: the kill comes somewhere in it."""
    lane = place.lane()
    listener = tls_listen(certificate="localhost", lane=lane).wait(DEADLINE_S)
    while True:
        accept = listener.accept_operation()
        client = tls_open("localhost", listener.port, cafile=place.ca, lane=lane).wait(DEADLINE_S)
        server = accept.wait(DEADLINE_S)
        for number in range(20):
            reads = [server.read_operation(), client.read_operation()]
            client.write_operation(bytes(5000))
            server.write_operation(bytes(number + 1))
            lane.cancel(lane.post(abi.NOP))
            client.info()
            for read in reads:
                read.wait(DEADLINE_S)
                read.destroy()
        client.close_operation()
        server.close_operation()


def held_by_a_child(place: Place) -> None:
    """A child that outlives its parent keeps every descriptor and a mapping of the memory."""
    connection, fds = raw_attach(place)
    place.kept.append(connection)
    if os.fork() == 0:
        select.select([place.hold], [], [])
        os._exit(0)
    place.kept.append(fds)


def held_by_a_child_while_reading(place: Place) -> None:
    reading_behind_a_barrier(place)
    for entry in os.listdir("/proc/self/fd"):  # noqa: PTH208
        with contextlib.suppress(OSError):
            os.dup(int(entry))  # the child gives up its parent's lanes, but not what it does not know of
    if os.fork() == 0:
        select.select([place.hold], [], [])
        os._exit(0)


VICTIMS: list[Callable[[Place], int | None]] = [
    connected_only,
    half_a_hello,
    reply_unread,
    nothing,
    opening,
    connecting,
    starting,
    accepting,
    shaking_hands,
    reading_behind_a_barrier,
    writing_to_nobody,
    busy,
    held_by_a_child,
    held_by_a_child_while_reading,
]


class Watched:
    """The resources of worker and supervisor, where clients knock; and how long these and the test waited for a CPU."""

    def __init__(self, daemon: Daemon) -> None:
        self.path = daemon.socket_path
        (worker,) = control.request("status", self.path)["workers"]
        self.proc = Path(f"/proc/{worker['pid']}")
        self.processes = (self.proc, Path(f"/proc/{daemon.process.pid}"))
        self.descriptors = 0

    def count(self) -> int:
        return sum(len(list((process / "fd").iterdir())) for process in self.processes)

    def connections(self) -> int:
        return int(control.request("status", self.path)["workers"][0]["connections"])

    def waited_s(self) -> float:
        """Time that threads were ready to run and had no CPU (proc(5), schedstat): another load's, not the daemon's."""
        files = [file for process in self.processes for file in (process / "task").glob("*/schedstat")]
        files.append(Path("/proc/thread-self/schedstat"))
        return sum(int(file.read_text().split()[1]) for file in files) / 1e9

    def left(self, memory: int) -> str:
        """What is not given back yet; empty: everything is."""
        if memory >= 0 and os.fstat(memory).st_blocks:
            return "pages of the shared memory"
        if MEMORY in (self.proc / "maps").read_text():
            return "a mapping"
        if self.count() > self.descriptors:
            return f"{self.count() - self.descriptors} descriptors"
        report = control.request("status", self.path)
        if report["clients"] or report["workers"][0]["connections"]:
            return f"{report['clients']}, {report['workers'][0]['connections']} connections"
        return ""


@pytest.fixture(scope="module")
def daemon(issued: Issued, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    directory: Path = tmp_path_factory.mktemp("site")
    with serve(directory, "--workers", "1", issued=issued, ends_by_itself=True) as daemon:
        yield daemon
        daemon.stop()


@contextlib.contextmanager
def place_of(daemon: Daemon) -> Iterator[tuple[Place, int]]:
    hold, release = os.pipe()
    with contextlib.ExitStack() as stack:
        silent = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=2048))
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(2):  # the queue of those nobody accepted is full: who comes now waits
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        ports = silent.getsockname()[1], full.getsockname()[1]
        path = daemon.socket_path
        try:
            yield Place(path, daemon.ca, daemon.port, *ports, hold), release
        finally:
            os.close(release)
            os.close(hold)


def kill_one(
    watched: Watched, place: Place, release: int, victim: Callable[[Place], int | None], dice: random.Random
) -> tuple[float, float]:
    """(Seconds until everything is given back, those of them in which nobody was ready and waiting for a CPU)."""
    ready, say = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(release)
            if victim is busy:
                os.write(say, b"0\n")
            port = victim(place) or 0
            os.write(say, b"%d\n" % port)
            signal.pause()
        finally:
            os._exit(1)
    os.close(say)
    pidfd = os.pidfd_open(child)
    memory = -1
    peers: list[socket.socket] = []
    try:
        said = os.read(ready, 100)
        assert said.endswith(b"\n"), f"{victim.__name__} failed"
        for hello in (b"", b"\x16\x03\x01\x02\x00") if int(said.split()[0]) else ():
            peers.append(socket.create_connection(("127.0.0.1", int(said))))
            peers[-1].sendall(hello)
        select.select([pidfd], [], [], dice.random() * (0.03 if victim is busy else 0.002))
        for entry in Path(f"/proc/{child}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if MEMORY in str(entry.readlink()):
                    memory = os.open(entry, os.O_RDONLY)
                    break
        if peers:
            eventually(lambda: watched.connections() == len(peers), "the daemon has accepted them")
        waited = watched.waited_s()
        os.kill(child, signal.SIGKILL)
        select.select([pidfd], [], [], DEADLINE_S)
        begin = time.monotonic()
        eventually(lambda: not watched.left(memory), f"{victim.__name__}: everything is given back")
        taken = time.monotonic() - begin
        return taken, taken - (watched.waited_s() - waited)
    finally:
        os.waitpid(child, 0)
        for fd in (ready, pidfd, *((memory,) if memory >= 0 else ())):
            os.close(fd)
        for peer in peers:
            peer.close()


@pytest.mark.parametrize("victim", VICTIMS)
def test_killed_clients_leave_nothing(daemon: Daemon, victim: Callable[[Place], int | None]) -> None:
    """Counted after each. The limit is for the time in which neither the daemon nor this test waited for a CPU."""
    watched = Watched(daemon)
    dice = random.Random(victim.__name__)
    with place_of(daemon) as (place, release):
        # The first one makes what stays: the thread that resolves and connects, and its sockets.
        watched.descriptors = 1 << 20
        kill_one(watched, place, release, victim, dice)
        watched.descriptors = watched.count()
        taken = [kill_one(watched, place, release, victim, dice) for _ in range(-(-KILLS // len(VICTIMS)))]
    own = sorted(pair[1] for pair in taken)
    assert own[-1] <= LIMIT_S, f"took up to {own[-1] * 1000:.0f} ms, median {own[len(own) // 2] * 1000:.1f} ms"
    wall = sorted(pair[0] for pair in taken)
    assert wall[len(wall) // 2] <= LIMIT_S, f"median {wall[len(wall) // 2] * 1000:.0f} ms"
    print(f"{victim.__name__}: median {wall[len(wall) // 2] * 1000:.1f} ms, at most {wall[-1] * 1000:.1f} ms")
    assert Watched(daemon).proc == watched.proc, "the worker was replaced"
