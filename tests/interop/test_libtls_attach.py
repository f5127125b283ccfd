"""How a program comes to a lane: what it, its threads and its children get; and those that connect and say nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kdaemon_pyx import client_abi as abi
from support.certificates import Issued
from support.daemon import Daemon, descriptor_count, serve, status
from support.waiting import DEADLINE_S, eventually

import libtls
from kdaemon.control import CONNECTIONS_MAX
from libtls import Lane, errors, functions
from libtls.attach import attach
from libtls.functions import tls_open

CROWD = 1000


@pytest.fixture(scope="module")
def daemon(issued: Issued, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    directory: Path = tmp_path_factory.mktemp("site")
    with serve(directory, "--workers", "1", issued=issued, ends_by_itself=True) as daemon:
        lane = Lane.attach(daemon.socket_path)  # the first OPEN makes a thread that stays, and its sockets
        tls_open("localhost", daemon.port, cafile=daemon.ca, lane=lane).wait(DEADLINE_S).close()
        lane.close()
        eventually(lambda: not status(daemon)["clients"], "the first client is gone")
        yield daemon
        daemon.stop()


@pytest.fixture
def path(daemon: Daemon) -> Iterator[str]:
    """The daemon's socket; afterwards nothing of the test may be left there."""
    before = descriptor_count(daemon.pids)
    yield daemon.socket_path
    libtls.tls_destroy()
    eventually(lambda: not status(daemon)["clients"], "nobody is attached")
    eventually(lambda: descriptor_count(daemon.pids) <= before, "the daemon has given everything back")


def in_child(function: Callable[[], None]) -> int:
    """The exit status of a forked child that calls it: 0 if it returned."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# Versions


@pytest.mark.parametrize(
    ("asked", "in_force"), [(0, 0), (abi.VERSION_MINOR, abi.VERSION_MINOR), (99, abi.VERSION_MINOR)]
)
def test_of_two_minor_versions_the_lower_is_in_force(path: str, asked: int, in_force: int) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        connection.sendall(abi.pack_hello(version=(abi.VERSION_MAJOR, asked)))
        data, fds, _, _ = socket.recv_fds(connection, abi.HELLO_REPLY_SIZE, 2)
        reply = abi.unpack_hello_reply(data)
        assert (reply["error"], reply["version_major"], reply["version_minor"]) == (0, abi.VERSION_MAJOR, in_force)
        assert os.pread(fds[0], 2, 6) == in_force.to_bytes(2, "little"), "in the header, too"
        for fd in fds:
            os.close(fd)


@pytest.mark.parametrize("major", [0, abi.VERSION_MAJOR + 1])
def test_another_major_version_is_told_ours(path: str, major: int) -> None:
    """Whatever else its hello says, and however long it is."""
    hello = bytearray(abi.pack_hello(version=(major, 7)))
    hello[8:12] = (96).to_bytes(4, "little")
    hello[28:64] = b"x" * 36
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(DEADLINE_S)
        connection.connect(path)
        connection.sendall(bytes(hello) + bytes(32))
        reply = abi.unpack_hello_reply(connection.recv(100))
    assert reply["error"] == -errno.EPROTONOSUPPORT
    assert (reply["version_major"], reply["version_minor"]) == (abi.VERSION_MAJOR, abi.VERSION_MINOR)
    with pytest.raises(errors.WrongVersion, match=rf"speaks version {abi.VERSION_MAJOR}\.{abi.VERSION_MINOR}"):
        attach(path, version=(major, 0))


# Descriptors


def inherited() -> list[str]:
    """What a started program finds open when nobody closes anything for it."""
    command = ["find", "/proc/self/fd", "-mindepth", "1", "-printf", "%l\n"]
    done = subprocess.run(command, close_fds=False, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    return sorted(line for line in done.stdout.decode().splitlines() if not line.startswith(("/proc/", "pipe:")))


def test_started_programs_inherit_nothing(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even those that another thread starts between two steps of attaching: the kernel marks what it hands over."""
    before = inherited()
    monkeypatch.delattr(os, "set_inheritable")
    lane = Lane.attach(path)
    lane.run(abi.NOP)
    assert inherited() == before
    lane.close()


def test_no_room_for_the_descriptors(path: str) -> None:
    """A clear error, and the daemon keeps no place for the program."""

    def attach_with_room_for_one() -> None:
        free = os.open("/dev/null", os.O_RDONLY)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, free + 1))  # for the attach socket itself
        with pytest.raises(errors.DaemonError, match="no room") as failure:
            attach(path)
        assert failure.value.errno == errno.EMFILE
        os.close(os.open("/dev/null", os.O_RDONLY))  # it was given back

    assert in_child(attach_with_room_for_one) == 0


# Threads and children


def test_threads_that_call_tls_init_at_once_get_one_lane(daemon: Daemon, path: str) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    start = threading.Barrier(8)
    lanes: list[Lane] = []

    def initialize() -> None:
        start.wait(DEADLINE_S)
        lanes.append(libtls.tls_init(path))

    threads = [threading.Thread(target=initialize) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert len(lanes) == 8
    assert len(set(lanes)) == 1
    assert len(status(daemon)["clients"]) == 1  # type: ignore[arg-type]
    libtls.tls_destroy()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_a_forked_child_gets_an_error_and_then_a_lane_of_its_own(daemon: Daemon, path: str) -> None:
    """Also when another thread of the parent was attaching at that moment."""
    parents = libtls.tls_init(path)

    def child() -> None:
        for use in (lambda: libtls.tls_open("localhost", daemon.port), lambda: parents.run(abi.NOP)):
            with pytest.raises(RuntimeError, match=r"belongs to the parent process: call tls_init\(\)"):
                use()
        own = libtls.tls_init(path)
        assert own is not parents
        own.run(abi.NOP)
        opened = libtls.tls_wait(libtls.tls_open("localhost", daemon.port, cafile=daemon.ca), DEADLINE_S)
        opened.close()
        libtls.tls_destroy()

    with functions._program.lock:
        assert in_child(child) == 0
    assert libtls.tls_init(path) is parents
    parents.run(abi.NOP)


# The record layer


def test_info_says_why_it_is_this_record_layer(daemon: Daemon, path: str) -> None:
    """As the `ready` line does: with `auto`, too, where the daemon's reason is that of the kernel it found."""
    libtls.tls_init(path)
    connection = libtls.tls_wait(libtls.tls_open("localhost", daemon.port, cafile=daemon.ca), DEADLINE_S)
    info = connection.info()
    assert (info.record_layer, info.record_layer_reason) == (daemon.ready[0].backend, daemon.ready[0].reason)
    connection.close()


# Those that say nothing


@pytest.mark.parametrize("said", [b"", b'{"command": "sta'], ids=["nothing", "half a command"])
def test_a_silent_crowd_takes_no_places_and_no_descriptors(daemon: Daemon, path: str, said: bytes) -> None:
    supervisor = daemon.process.pid
    before = descriptor_count([supervisor])
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(CROWD)]
        for connection in crowd:
            connection.settimeout(DEADLINE_S)
            connection.connect(path)
            with contextlib.suppress(BrokenPipeError):
                connection.sendall(said)
        Lane.attach(path).close()
        assert status(daemon)["state"] == "running"
        assert descriptor_count([supervisor]) <= before + CONNECTIONS_MAX + 2
        for connection in crowd[: CROWD - CONNECTIONS_MAX]:
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b"", "the oldest made room"
    eventually(lambda: descriptor_count([supervisor]) <= before, "the others are given back when they go")
