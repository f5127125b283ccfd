"""Clients that die, break the protocol, stop or may not attach; and a daemon that dies under its clients."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import pwd
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kdaemon_pyx import client_abi as abi
from support.certificates import Issued
from support.daemon import Daemon, descriptor_count, serve, status
from support.waiting import DEADLINE_S, eventually, read_line

from libtls import Lane, errors
from libtls.attach import attach
from libtls.functions import tls_connect, tls_listen, tls_open

NOBODY = 65534


@pytest.fixture(scope="module")
def daemon(issued: Issued, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    directory: Path = tmp_path_factory.mktemp("site")
    (directory / "index.html").write_bytes(b"<!doctype html><title>kdaemon</title>\n")
    with serve(directory, "--workers", "1", issued=issued, ends_by_itself=True) as daemon:
        yield daemon
        daemon.stop()


def workers(daemon: Daemon) -> list[dict[str, object]]:
    report = status(daemon)["workers"]
    assert isinstance(report, list)
    return report


VICTIM = """
import os, sys
from libtls import Lane
from libtls.functions import tls_connect, tls_listen, tls_open
lane = Lane.attach(sys.argv[1], operations=64, arena_size=1 << 20)
listener = tls_listen(certificate="localhost", lane=lane).wait(30)
accept = listener.accept_operation()
client = tls_open("localhost", listener.port, cafile=sys.argv[2], lane=lane).wait(30)
server = accept.wait(30)
print("ready", flush=True)
while True:  # killed at any point
    reads = [server.read_operation(), client.read_operation()]
    for connection in (client, server):
        connection.write_operation(b"x" * 5000)
    for read in reads:
        read.wait(30)
        read.destroy()
"""


@contextlib.contextmanager
def victim(daemon: Daemon) -> Iterator[subprocess.Popen[bytes]]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", VICTIM, daemon.socket_path, str(daemon.ca)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_forked_child_does_not_keep_its_dead_parent_attached(daemon: Daemon) -> None:
    """The pidfd sees the death although somebody still holds the socket."""
    ready, done = os.pipe()
    parent = os.fork()
    if parent == 0:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(daemon.socket_path)
        connection.sendall(abi.pack_hello())
        socket.recv_fds(connection, abi.HELLO_REPLY_SIZE, 2)
        if os.fork() == 0:
            os.write(done, b"%d\n" % os.getpid())
            signal.pause()
        signal.pause()
    child = int(os.read(ready, 100))
    try:
        eventually(lambda: status(daemon)["clients"], "attached")
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        eventually(lambda: not status(daemon)["clients"], "the dead parent is detached")
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_stopped_client_does_not_hold_up_others(daemon: Daemon) -> None:
    with victim(daemon) as process:
        assert process.stdout is not None
        assert read_line(process.stdout, "the victim is ready") == b"ready\n"
        process.send_signal(signal.SIGSTOP)
        lane = Lane.attach(daemon.socket_path)
        for _ in range(1000):
            lane.run(abi.NOP)
        with tls_open("localhost", daemon.port, cafile=daemon.ca, lane=lane).wait(DEADLINE_S) as connection:
            connection.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert connection.read().startswith(b"HTTP/1.1 200")
        lane.close()
    eventually(lambda: not status(daemon)["clients"], "all are gone")


@pytest.fixture(scope="module")
def stingy(issued: Issued, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that allows its programs little."""
    folder: Path = tmp_path_factory.mktemp("site")
    configuration = folder / "kdaemon.toml"
    configuration.write_text(
        "[clients]\nconnections_max = 5\narena_mib_max = 1\noperations_max = 16\nclients_max = 2\n"
    )
    arguments = ("--workers", "1", "--config", str(configuration))
    with serve(folder, *arguments, issued=issued, ends_by_itself=True) as daemon:
        yield daemon
        daemon.stop()


@pytest.fixture
def limited(stingy: Daemon) -> Iterator[Daemon]:
    yield stingy
    eventually(lambda: not status(stingy)["clients"], "all are gone")


def test_limits_of_operations_and_arena(limited: Daemon) -> None:
    """What is asked for is cut to them."""
    with contextlib.closing(Lane.attach(limited.socket_path, operations=100_000, arena_size=1 << 40)) as lane:
        assert (lane.ring.slot_count, lane.ring.arena_size) == (16, 1 << 20)
        connection = tls_open("localhost", limited.port, cafile=limited.ca, lane=lane).wait(DEADLINE_S)
        held = [connection.read_operation(65536) for _ in range(15)]
        with pytest.raises(errors.ArenaFull):
            connection.write_operation(bytes(65537))
        held.append(connection.read_operation(65536))
        with pytest.raises(errors.RingFull):
            lane.post(abi.NOP)
        eventually(lambda: status(limited)["clients"][0]["in_flight"] == 16, "all of them are under way")  # type: ignore[index]


def test_limit_of_clients(limited: Daemon) -> None:
    with contextlib.closing(Lane.attach(limited.socket_path)), contextlib.closing(Lane.attach(limited.socket_path)):
        with pytest.raises(errors.DaemonError, match="refused") as failure:
            Lane.attach(limited.socket_path)
        assert failure.value.errno == errno.EUSERS
    eventually(lambda: not status(limited)["clients"], "both are gone")
    Lane.attach(limited.socket_path).close()


def test_limit_of_connections(limited: Daemon) -> None:
    """More than it may have: an error of its own; the daemon serves on, and a place that is given back can be had."""
    with contextlib.closing(Lane.attach(limited.socket_path)) as lane:
        connections = [
            tls_open("localhost", limited.port, cafile=limited.ca, lane=lane).wait(DEADLINE_S) for _ in range(5)
        ]
        for more in (
            lambda: tls_open("localhost", limited.port, cafile=limited.ca, lane=lane),
            lambda: tls_connect("localhost", limited.port, lane=lane),
            lambda: tls_listen(lane=lane),
        ):
            with pytest.raises(OSError, match="limit of connections") as failure:
                more().wait(DEADLINE_S)
            assert failure.value.errno == errno.EMFILE
        connections[0].close()
        tls_open("localhost", limited.port, cafile=limited.ca, lane=lane).wait(DEADLINE_S)


def test_limit_of_accepted_connections(limited: Daemon) -> None:
    """Whom there is no place for is turned away; who comes when there is one again is taken."""
    context = ssl.create_default_context(cafile=str(limited.ca))
    with contextlib.ExitStack() as stack:
        lane = stack.enter_context(contextlib.closing(Lane.attach(limited.socket_path)))
        listener = tls_listen(certificate="localhost", lane=lane).wait(DEADLINE_S)

        def come() -> ssl.SSLSocket:
            plain = socket.create_connection(("127.0.0.1", listener.port), DEADLINE_S)
            return stack.enter_context(context.wrap_socket(plain, server_hostname="localhost"))

        accepted = []
        for _ in range(4):  # the listener has a place, too
            come()
            accepted.append(listener.accept(timeout=DEADLINE_S))
        waiting = listener.accept_operation()
        for _ in range(3):
            with contextlib.suppress(ConnectionResetError):
                assert come().recv(1) == b""
        assert not waiting.done
        accepted[0].close()
        peer = come()
        waiting.wait(DEADLINE_S).write(b"welcome")
        assert peer.recv(100) == b"welcome"


@pytest.mark.parametrize(
    ("roles", "open_works", "listen_works"), [('"client"', True, False), ('"server"', False, True)]
)
def test_roles(issued: Issued, tmp_path: Path, roles: str, open_works: bool, listen_works: bool) -> None:
    configuration = tmp_path / "kdaemon.toml"
    configuration.write_text(f"[clients]\nroles = [{roles}]\n")
    with serve(
        tmp_path, "--workers", "1", "--config", str(configuration), issued=issued, ends_by_itself=True
    ) as daemon:
        lane = Lane.attach(daemon.socket_path)
        for operation, works in (
            (tls_open("localhost", daemon.port, cafile=daemon.ca, lane=lane), open_works),
            (tls_listen(lane=lane), listen_works),
        ):
            with contextlib.nullcontext() if works else pytest.raises(errors.NotAllowed):
                operation.wait(DEADLINE_S)
        lane.close()
        daemon.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become another user")
@pytest.mark.parametrize(
    ("who", "allowed"),
    [
        (f'users = ["{NOBODY}"]', True),
        ('users = ["nobody"]', True),
        ('users = ["12345"]', False),
        (f'groups = ["{NOBODY}"]', True),
        ('groups = ["nogroup"]', True),
        ('groups = ["12345", "root", "no-such-group"]', False),
        (f'users = ["12345"]\ngroups = ["{NOBODY}"]', True),
    ],
)
def test_users_and_groups(issued: Issued, tmp_path: Path, who: str, allowed: bool) -> None:
    """With anybody named in the configuration the socket is open to all, and the kernel says who asks."""
    configuration = tmp_path / "kdaemon.toml"
    configuration.write_text(f"[clients]\n{who}\n")
    with serve(
        tmp_path, "--workers", "1", "--config", str(configuration), issued=issued, ends_by_itself=True
    ) as daemon:
        Path(daemon.socket_path).parent.chmod(0o755)
        child = os.fork()
        if child == 0:
            code = 3
            try:
                os.setgroups([])
                os.setresgid(NOBODY, NOBODY, NOBODY)
                os.setresuid(NOBODY, NOBODY, NOBODY)
                attach(daemon.socket_path)
                code = 1
            except errors.NotAllowed:
                code = 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (1 if allowed else 2)
        daemon.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to start daemons that become other users")
def test_two_daemons_of_different_users(issued: Issued) -> None:
    """One listens, one connects; neither can do the other's part, and their workers are different users."""
    workers = []
    with contextlib.ExitStack() as stack:
        daemons = []
        for role, user in (("server", "daemon"), ("client", "nobody")):
            # Not below tmp_path, which only root may enter.
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kdaemon-role-")))
            directory.chmod(0o755)
            configuration = directory / "kdaemon.toml"
            configuration.write_text(f'[clients]\nroles = ["{role}"]\n[users]\nworker = "{user}"\n')
            arguments = ("--workers", "1", "--config", str(configuration))
            daemons.append(stack.enter_context(serve(directory, *arguments, issued=issued, ends_by_itself=True)))
            workers.append(status(daemons[-1])["workers"][0]["pid"])
        server, client = (stack.enter_context(contextlib.closing(Lane.attach(one.socket_path))) for one in daemons)
        assert [Path(f"/proc/{pid}").stat().st_uid for pid in workers] == [pwd.getpwnam("daemon").pw_uid, NOBODY]
        listener = tls_listen(lane=server).wait(DEADLINE_S)
        accept = listener.accept_operation()
        ours = tls_open("localhost", listener.port, cafile=daemons[0].ca, lane=client).wait(DEADLINE_S)
        theirs = accept.wait(DEADLINE_S)
        ours.write(b"from one daemon to the other")
        assert theirs.read(100) == b"from one daemon to the other"
        with pytest.raises(errors.NotAllowed):
            tls_listen(lane=client).wait(DEADLINE_S)
        with pytest.raises(errors.NotAllowed):
            tls_open("localhost", listener.port, cafile=daemons[0].ca, lane=server).wait(DEADLINE_S)
        ours.close()
        theirs.close()
        for daemon in daemons:
            daemon.stop()


def test_no_daemon(tmp_path: Path) -> None:
    with pytest.raises(errors.DaemonNotRunning, match="is it running"):
        attach(str(tmp_path / "nothing.sock"))
    with pytest.raises(errors.DaemonError, match="107 bytes"):
        attach("/" + "x" * 200)


@pytest.mark.parametrize("garbage", [b"G" * 64, b"\0" * 64, abi.pack_hello()[:10], b"x"])
def test_garbage_for_a_hello(daemon: Daemon, garbage: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(DEADLINE_S)
        connection.connect(daemon.socket_path)
        connection.sendall(garbage)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(100) == b""
    Lane.attach(daemon.socket_path).close()


def test_a_client_that_floods_its_doorbell(daemon: Daemon) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(daemon.socket_path)
        connection.sendall(abi.pack_hello())
        _, fds, _, _ = socket.recv_fds(connection, abi.HELLO_REPLY_SIZE, 2)
        doorbell = socket.socket(fileno=fds[1])
        doorbell.setblocking(False)
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            with contextlib.suppress(BlockingIOError):
                doorbell.send(b"x" * 65536)
        lane = Lane.attach(daemon.socket_path)
        lane.run(abi.NOP)
        lane.close()
        doorbell.close()
        os.close(fds[0])
    eventually(lambda: not status(daemon)["clients"], "detached")


def test_death_of_the_daemon_and_its_return(issued: Issued, tmp_path: Path) -> None:
    with serve(tmp_path, "--workers", "1", issued=issued, ends_by_itself=True) as daemon:
        lane = Lane.attach(daemon.socket_path)
        listener = tls_listen(certificate="localhost", lane=lane).wait(DEADLINE_S)
        accepts = [listener.accept_operation() for _ in range(10)]
        worker = workers(daemon)[0]["pid"]
        assert isinstance(worker, int)
        os.kill(worker, signal.SIGKILL)
        for accept in accepts:
            with pytest.raises(errors.ConnectionReset):
                accept.wait(DEADLINE_S)
        with pytest.raises(errors.DaemonGone):
            lane.run(abi.NOP)

        def again() -> Lane | None:
            try:
                return Lane.attach(daemon.socket_path)
            except errors.DaemonError:
                return None

        eventually(again, "a new worker lets it attach").close()  # type: ignore[union-attr]
        daemon.stop()


def post_nops(memory: mmap.mmap, count: int) -> None:
    """Fills so many entries of the submission ring, and publishes them, without a look at the completions."""
    (offset,) = struct.unpack_from("I", memory, 28)  # struct client_header: submission_offset
    for number in range(count):
        memory[offset + 64 * number : offset + 64 * (number + 1)] = struct.pack(
            "BBHIQQ40x", abi.NOP, 0, 0, number, 0, 0
        )
    (tail,) = struct.unpack_from("I", memory, 64)
    struct.pack_into("I", memory, 64, tail + count)


def test_the_daemon_sleeps_where_it_can_do_nothing(daemon: Daemon) -> None:
    """Beside a program that waits, with a deadline far away, and one that posts but reads no completions."""
    engine = Path(f"/proc/{workers(daemon)[0]['pid']}/task")
    lane = Lane.attach(daemon.socket_path)
    connection = tls_open("localhost", daemon.port, cafile=daemon.ca, lane=lane).wait(DEADLINE_S)
    connection.read_operation(timeout=3600)
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.connect(daemon.socket_path)
        deaf.sendall(abi.pack_hello(submission_entries=16, completion_entries=16, slot_count=16, arena_size=4096))
        _, (descriptor, doorbell), _, _ = socket.recv_fds(deaf, abi.HELLO_REPLY_SIZE, 2)
        with mmap.mmap(descriptor, os.fstat(descriptor).st_size) as memory, socket.socket(fileno=doorbell) as bell:
            post_nops(memory, 16)
            bell.send(b"x")
            eventually(lambda: struct.unpack_from("I", memory, 192) == (16,), "its completion ring is full")
            post_nops(memory, 16)
            bell.send(b"x")
            samples: list[bool] = []

            def sleeps() -> bool:
                threads = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in engine.iterdir()]
                samples.append(set(threads) == {"S"})
                return len(samples) >= 20 and all(samples[-20:])

            eventually(sleeps, "no thread of the worker runs")

            def wakes() -> bool:
                before = lane.ring.doorbells
                lane.run(abi.NOP)
                return lane.ring.doorbells == before + 1

            eventually(wakes, "it is woken by the doorbell")
            assert struct.unpack_from("I", memory, 128) == (16,), "no more of the other's was taken"
        os.close(descriptor)
    lane.close()
    eventually(lambda: not status(daemon)["clients"], "both are gone")


def test_many_clients(daemon: Daemon) -> None:
    before = descriptor_count(daemon.pids)
    lanes = [Lane.attach(daemon.socket_path, operations=16, arena_size=65536) for _ in range(40)]
    for lane in lanes:
        lane.run(abi.NOP)
    for lane in lanes:
        lane.close()
    eventually(lambda: descriptor_count(daemon.pids) <= before, "all descriptors are given back")
