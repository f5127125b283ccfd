"""What programs do wrong, and what is wrong with those they talk to: each has an error of its own, no more happens."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kdaemon_pyx import client_abi as abi
from support.certificates import Issued
from support.daemon import Daemon, serve, status
from support.waiting import DEADLINE_S, eventually

from libtls import Lane, errors
from libtls.attach import attach
from libtls.connection import Connection
from libtls.functions import (
    tls_close,
    tls_connect,
    tls_listen,
    tls_open,
    tls_oper_state_destroy,
    tls_read,
    tls_start,
    tls_try,
    tls_try_cancel,
    tls_wait,
    tls_write,
)
from libtls.operation import Operation

CONNECTIONS = 10_000
CONNECTIONS_MAX = 4096  # the default of clients.connections_max


@pytest.fixture(scope="module")
def daemon(issued: Issued, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    directory: Path = tmp_path_factory.mktemp("site")
    (directory / "index.html").write_bytes(b"<!doctype html><title>kdaemon</title>\n")
    with serve(directory, "--workers", "2", issued=issued, ends_by_itself=True) as daemon:
        yield daemon
        daemon.stop()


@pytest.fixture
def lane(daemon: Daemon) -> Iterator[Lane]:
    lane = Lane.attach(daemon.socket_path, lane=0, operations=32, arena_size=1 << 20)
    yield lane
    lane.close()


@pytest.fixture
def connection(daemon: Daemon, lane: Lane) -> Iterator[Connection]:
    """One that says nothing unless it is asked something."""
    with tls_open("localhost", daemon.port, cafile=daemon.ca, lane=lane).wait(DEADLINE_S) as connection:
        yield connection


@contextlib.contextmanager
def listening(answer: Callable[[socket.socket], object]) -> Iterator[int]:
    """A TCP server that does `answer` with whom it accepts; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            with contextlib.suppress(OSError):
                while True:
                    taken, _ = listener.accept()
                    answer(taken)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(DEADLINE_S)


# Attaching


def test_socket_path_too_long() -> None:
    with pytest.raises(errors.DaemonError, match="107 bytes") as failure:
        attach("/" + "x" * 108)
    assert failure.value.errno == errno.ENAMETOOLONG


def test_not_attached() -> None:
    with pytest.raises(errors.DaemonError, match=r"tls_init\(\)") as failure:
        tls_open("localhost", 443)
    assert failure.value.errno == errno.ENOTCONN


def raw_attach(path: str, hello: bytes) -> tuple[bytes, list[int]]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        connection.sendall(hello)
        data, fds, _, _ = socket.recv_fds(connection, abi.HELLO_REPLY_SIZE, 2)
        return data, list(fds)


def test_what_is_passed_is_safe_to_share(daemon: Daemon) -> None:
    """The memory cannot be resized or unsealed; the doorbell is a socket, never an eventfd."""
    _, (memory, doorbell) = raw_attach(daemon.socket_path, abi.pack_hello())
    seals = fcntl.fcntl(memory, fcntl.F_GET_SEALS)
    assert seals == fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    size = os.fstat(memory).st_size
    for length in (size - 1, size + 1, 0):
        with pytest.raises(PermissionError):
            os.ftruncate(memory, length)
    with pytest.raises(PermissionError):
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert stat.S_ISSOCK(os.fstat(doorbell).st_mode)
    # The socket that attached was closed above: the pages go, though the memory is still held here.
    eventually(lambda: os.fstat(memory).st_blocks == 0, "the memory is punched out")
    os.close(memory)
    os.close(doorbell)


def test_lanes_reach_their_workers(daemon: Daemon) -> None:
    lanes = [Lane.attach(daemon.socket_path, lane=number) for number in (0, 1, 2)]
    listeners = [tls_listen(certificate="localhost", lane=lane).wait(DEADLINE_S) for lane in lanes[:2]]
    clients = status(daemon)["clients"]
    assert isinstance(clients, list)
    assert sorted(client["lane"] for client in clients) == [0, 0, 1]  # modulo the number of workers
    for listener, lane in zip(listeners, reversed(lanes[:2]), strict=True):
        accept = listener.accept_operation()
        with tls_open("localhost", listener.port, cafile=daemon.ca, lane=lane).wait(DEADLINE_S) as there:
            there.write(b"from one worker to the other")
            assert accept.wait(DEADLINE_S).read() == b"from one worker to the other"
    for lane in lanes:
        lane.close()


# Operations


def test_full_ring(daemon: Daemon, lane: Lane, connection: Connection) -> None:
    reads = [connection.read_operation(16) for _ in range(32)]
    with pytest.raises(errors.RingFull, match="32 operations") as failure:
        connection.read_operation()
    assert failure.value.errno == errno.EAGAIN
    assert isinstance(failure.value, BlockingIOError)
    connection.lane.ring.spin_ns = 0
    other = Lane.attach(daemon.socket_path)
    other.run(abi.NOP)
    other.close()
    lane.close()
    assert {read.raw.result for read in reads} == {-errno.ECONNRESET}


def test_full_arena(lane: Lane, connection: Connection) -> None:
    held = connection.read_operation(900_000)
    with pytest.raises(errors.ArenaFull, match="arena") as failure:
        connection.read_operation(200_000)
    assert failure.value.errno == errno.ENOBUFS
    tls_wait(tls_try_cancel(held), DEADLINE_S)
    with pytest.raises(errors.Cancelled):
        tls_wait(held, DEADLINE_S)
    tls_oper_state_destroy(held)
    tls_wait(tls_try_cancel(connection.read_operation(200_000)), DEADLINE_S)


def test_operation_on_a_closed_connection(lane: Lane, connection: Connection) -> None:
    stale = Connection(lane, connection.handle)
    connection.close()
    for use in (stale.read, lambda: stale.write(b"x"), stale.shutdown, stale.info, stale.close):
        with pytest.raises(errors.ConnectionClosed) as failure:
            use()
        assert failure.value.errno == errno.EBADF


def test_operation_on_a_foreign_connection(daemon: Daemon, connection: Connection) -> None:
    """Another program's handle names nothing here, and the connection it names there is not touched."""
    stranger = Lane.attach(daemon.socket_path, lane=0)
    stolen = Connection(stranger, connection.handle)
    for use in (stolen.read, lambda: stolen.write(b"x"), stolen.info, stolen.close):
        with pytest.raises(errors.ConnectionClosed):
            use()
    stranger.close()
    connection.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert connection.read().startswith(b"HTTP/1.1 200")


def test_double_close(lane: Lane, connection: Connection) -> None:
    again = Connection(lane, connection.handle)
    connection.close()
    connection.close()  # of the same object: harmless
    with pytest.raises(errors.ConnectionClosed):
        tls_wait(tls_close(again), DEADLINE_S)


def test_destroy_in_flight(connection: Connection) -> None:
    read = tls_read(connection)
    with pytest.raises(BlockingIOError) as failure:
        tls_oper_state_destroy(read)
    assert failure.value.errno == errno.EBUSY
    assert not tls_try(read)
    tls_wait(tls_try_cancel(read), DEADLINE_S)
    with pytest.raises(errors.Cancelled):
        tls_wait(read, DEADLINE_S)
    tls_oper_state_destroy(read)
    tls_oper_state_destroy(read)  # twice: harmless
    assert connection.lane.ring.arena_used == 0


def test_destroy_while_a_view_exists(connection: Connection) -> None:
    connection.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    read = tls_read(connection)
    tls_wait(read, DEADLINE_S)
    with read.view() as view:
        assert bytes(view[:8]) == b"HTTP/1.1"
        with pytest.raises(BufferError):
            tls_oper_state_destroy(read)
    tls_oper_state_destroy(read)


def test_wait_with_a_timeout(connection: Connection) -> None:
    """The wait ends, the operation goes on."""
    read = tls_read(connection)
    for timeout in (0, 0.01):
        with pytest.raises(TimeoutError, match="it goes on") as failure:
            tls_wait(read, timeout)
        assert failure.value.errno == errno.ETIMEDOUT
    connection.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert tls_wait(read, DEADLINE_S).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("timeout", [float("inf"), 1e30, 2.0**63])
def test_wait_with_an_endless_timeout(connection: Connection, timeout: float) -> None:
    assert tls_wait(tls_write(connection, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"), timeout) > 0


def test_cancel_of_something_finished(connection: Connection) -> None:
    write = tls_write(connection, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    tls_wait(write, DEADLINE_S)
    with pytest.raises(errors.TlsError) as failure:
        tls_wait(tls_try_cancel(write), DEADLINE_S)
    assert failure.value.errno == errno.ENOENT
    assert tls_wait(write) > 0  # its result stands


def test_cancel_of_what_is_under_way(daemon: Daemon, lane: Lane, connection: Connection) -> None:
    """Whoever has it in the daemon lets go of it, and it ends with ECANCELED; what it was posted on goes on."""
    kept: list[socket.socket] = []
    with listening(kept.append) as silent, socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        kept.append(socket.create_connection(full.getsockname()))  # its queue has no more room
        listener = tls_listen(lane=lane).wait(DEADLINE_S)
        plain = tls_connect("127.0.0.1", silent, lane=lane).wait(DEADLINE_S)
        operations = [
            tls_open("127.0.0.1", silent, lane=lane),
            tls_connect("127.0.0.1", full.getsockname()[1], lane=lane),
            tls_start(plain, "localhost"),
            Operation(lane, lane.post(abi.ADOPT), lambda done: done.result),
            listener.accept_operation(),
            connection.read_operation(),
            connection.barrier_operation(),
        ]
        for operation in reversed(operations):  # the barrier waits for the READ
            assert not tls_try(operation), operation
            assert tls_wait(tls_try_cancel(operation), DEADLINE_S)
        for operation in operations:
            with pytest.raises(errors.Cancelled) as failure:
                tls_wait(operation, DEADLINE_S)
            assert failure.value.errno == errno.ECANCELED
        connection.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.read().startswith(b"HTTP/1.1 200")
        plain.close()
        listener.close()
        assert status(daemon)["clients"][0]["connections"] == 1  # type: ignore[index]
        for taken in kept:
            taken.close()


# Hosts


@pytest.mark.parametrize("host", ["x" * 64, "a..example", ".", "a\0b", "\udcff"], ids=repr)
def test_host_that_is_no_name(lane: Lane, host: str) -> None:
    """It ends, with an error: `x` * 64 once never did."""
    with pytest.raises((errors.NameNotResolved, ValueError)):
        tls_open(host, 443, lane=lane).wait(DEADLINE_S)


def test_host_that_does_not_resolve(lane: Lane) -> None:
    with pytest.raises(errors.NameNotResolved, match="resolve") as failure:
        tls_open("no-such-host.invalid", 443, lane=lane).wait(DEADLINE_S)
    assert failure.value.errno == errno.EHOSTUNREACH


def test_host_that_refuses(lane: Lane) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(errors.ConnectionRefused) as failure:
        tls_open("127.0.0.1", port, lane=lane).wait(DEADLINE_S)
    assert failure.value.errno == errno.ECONNREFUSED


def test_host_that_accepts_and_never_speaks(lane: Lane) -> None:
    with listening(lambda taken: None) as port, pytest.raises(errors.DeadlinePassed) as failure:
        tls_open("127.0.0.1", port, timeout=0.2, lane=lane).wait(DEADLINE_S)
    assert failure.value.errno == errno.ETIMEDOUT


def test_host_that_never_speaks_and_no_deadline(issued: Issued, tmp_path: Path) -> None:
    """No wait is unbounded: the daemon's own deadline of handshakes ends it."""
    configuration = tmp_path / "kdaemon.toml"
    configuration.write_text("[deadlines]\nhandshake_ms = 300\n")
    kept: list[socket.socket] = []
    with serve(tmp_path, "--config", str(configuration), issued=issued, ends_by_itself=True) as daemon:
        lane = Lane.attach(daemon.socket_path)
        with listening(kept.append) as port, pytest.raises(errors.TlsError):
            tls_open("127.0.0.1", port, lane=lane).wait(DEADLINE_S)
        lane.close()
        daemon.stop()


def test_host_that_hangs_up(lane: Lane) -> None:
    with listening(lambda taken: taken.close()) as port, pytest.raises(errors.TlsError) as failure:
        tls_open("127.0.0.1", port, lane=lane).wait(DEADLINE_S)
    assert failure.value.errno in (errno.ECONNRESET, errno.ECONNABORTED)


def test_host_that_does_not_speak_tls(lane: Lane) -> None:
    def greet(taken: socket.socket) -> None:
        with taken:
            taken.sendall(b"220 mail.example ESMTP\r\n")
            taken.recv(65536)

    with listening(greet) as port, pytest.raises(errors.HandshakeError):
        tls_open("127.0.0.1", port, lane=lane).wait(DEADLINE_S)


# Too much


@pytest.mark.slow
def test_ten_thousand_connections_of_one_client(daemon: Daemon) -> None:
    """As many as the limit allows come to be; the others are refused, nobody else notices, all are given back."""
    kept: list[socket.socket] = []
    lane = Lane.attach(daemon.socket_path, lane=0, operations=1024)
    beside = Lane.attach(daemon.socket_path, lane=0)
    made, refused_ = 0, 0
    with listening(kept.append) as port:
        waiting = []
        for _ in range(CONNECTIONS):
            if len(waiting) == 256:
                made, refused_ = count(waiting, made, refused_)
            waiting.append(tls_connect("127.0.0.1", port, lane=lane))
        made, refused_ = count(waiting, made, refused_)
        assert (made, refused_) == (CONNECTIONS_MAX, CONNECTIONS - CONNECTIONS_MAX)
        with tls_open("localhost", daemon.port, cafile=daemon.ca, lane=beside).wait(DEADLINE_S) as page:
            page.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert page.read().startswith(b"HTTP/1.1 200")
        lane.close()
        for taken in kept:
            taken.settimeout(DEADLINE_S)
            with contextlib.suppress(ConnectionResetError):
                assert taken.recv(1) == b""
            taken.close()
    beside.close()
    eventually(lambda: not status(daemon)["clients"], "both are gone")


def count(waiting: list[object], made: int, refused_: int) -> tuple[int, int]:
    for operation in waiting:
        try:
            operation.wait(DEADLINE_S)  # type: ignore[attr-defined]
            made += 1
        except errors.TlsError as error:
            assert error.errno == errno.EMFILE
            refused_ += 1
    waiting.clear()
    return made, refused_


def test_a_client_that_never_reads_its_completions(daemon: Daemon, lane: Lane) -> None:
    """It gets no more than its ring holds, although it goes on posting and ringing; others go on."""
    greedy = Lane.attach(daemon.socket_path, lane=0, operations=16, arena_size=4096)
    for _ in range(16):
        greedy.ring.post(abi.NOP)

    def clients() -> dict[int, int]:
        report = status(daemon)["clients"]
        assert isinstance(report, list)
        return {client["memory_size"]: client["completions"] for client in report}

    size = min(clients())
    eventually(lambda: clients()[size] == 16, "its ring is full of completions")
    for _ in range(1000):
        lane.run(abi.NOP)
    assert clients()[size] == 16
    greedy.close()


def test_a_client_that_never_empties_its_doorbell(daemon: Daemon, lane: Lane) -> None:
    """The daemon's rings fill the socket, which the client has made blocking: that concerns nobody else."""
    deaf = Lane.attach(daemon.socket_path, lane=0)
    deaf.ring.spin_ns = 0
    os.set_blocking(deaf.ring.fileno(), True)
    for _ in range(2000):
        deaf.ring.arm()
        operation = deaf.ring.post(abi.NOP)
        eventually(lambda operation=operation: deaf.ring.reap() or operation.done, "it completes")
    begin = time.monotonic()
    for _ in range(100):
        lane.run(abi.NOP)
    assert time.monotonic() - begin < DEADLINE_S
    deaf.close()


def test_one_stopped_in_a_debugger(daemon: Daemon, lane: Lane) -> None:
    """While it is stopped, in the middle of things, others go on as fast as before."""

    def round_trips_s() -> float:
        begin = time.process_time()
        for _ in range(500):
            lane.run(abi.NOP)
        return time.process_time() - begin

    alone = min(round_trips_s() for _ in range(5))
    ready, say = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            own = Lane.attach(daemon.socket_path, lane=0)
            listener = tls_listen(certificate="localhost", lane=own).wait(DEADLINE_S)
            for _ in range(10):
                listener.accept_operation()
            os.write(say, b"r")
            while True:
                own.run(abi.NOP)
        os._exit(1)
    try:
        assert os.read(ready, 1) == b"r"
        os.kill(child, signal.SIGSTOP)
        os.waitpid(child, os.WUNTRACED)
        eventually(lambda: round_trips_s() < 5 * alone, "others go on at full speed")  # noisy machine: once is enough
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    eventually(lambda: len(status(daemon)["clients"]) == 1, "the stopped one is gone")  # type: ignore[arg-type]
