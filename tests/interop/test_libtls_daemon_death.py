"""The daemon dies: everything that anybody waits for ends with an error, and `tls_init` works when it is back."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kdaemon_pyx import client_abi as abi
from support.certificates import Issued
from support.daemon import Daemon, serve, status
from support.waiting import DEADLINE_S, eventually, read_line

import libtls
from libtls import Lane, TlsError, aio, errors
from libtls.functions import tls_connect, tls_listen, tls_open, tls_start
from libtls.operation import Operation
from libtls.sock import TlsSocket


@pytest.fixture
def daemon(issued: Issued, tmp_path: Path) -> Iterator[Daemon]:
    with serve(tmp_path, "--workers", "1", issued=issued, ends_by_itself=True) as daemon:
        yield daemon
        if daemon.process.poll() is None:
            attach_again(daemon.socket_path).close()  # the new worker has started
            daemon.stop()


@pytest.fixture
def silent() -> Iterator[int]:
    """A port where connections are taken and nobody speaks."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def kill_worker(daemon: Daemon) -> None:
    report = status(daemon)["workers"]
    assert isinstance(report, list)
    os.kill(report[0]["pid"], signal.SIGKILL)


def kill_supervisor(daemon: Daemon) -> None:
    daemon.process.kill()


def attach_again(path: str) -> Lane:
    def attach() -> Lane | None:
        try:
            return Lane.attach(path)
        except errors.DaemonError:
            return None

    lane = eventually(attach, "a new worker lets it attach")
    assert lane is not None
    return lane


def everything(daemon: Daemon, lane: Lane, silent: int) -> dict[str, Operation[object]]:
    """An operation of each kind that can be under way, all of them under way."""
    listener = tls_listen(certificate="localhost", lane=lane).wait(DEADLINE_S)
    first = listener.accept_operation()
    client = tls_open("localhost", listener.port, cafile=daemon.ca, lane=lane).wait(DEADLINE_S)
    server = first.wait(DEADLINE_S)
    plain = tls_connect("127.0.0.1", silent, lane=lane).wait(DEADLINE_S)
    other_accept = listener.accept_operation()
    quiet = tls_open("localhost", listener.port, cafile=daemon.ca, lane=lane).wait(DEADLINE_S)
    operations: dict[str, Operation[object]] = {
        "OPEN": tls_open("127.0.0.1", silent, insecure=True, lane=lane),  # type: ignore[dict-item]
        "START_TLS": tls_start(plain, "localhost", insecure=True),  # type: ignore[dict-item]
        "ACCEPT": listener.accept_operation(),  # type: ignore[dict-item]
        "READ": quiet.read_operation(),  # type: ignore[dict-item]
        "READ of a writer": server.read_operation(),  # type: ignore[dict-item]
    }
    for _ in range(30):
        operations["WRITE"] = server.write_operation(bytes(250_000))  # type: ignore[assignment]
        lane.ring.reap()
    operations["BARRIER"] = quiet.barrier_operation()  # type: ignore[assignment]
    operations["CLOSE"] = server.close_operation()  # type: ignore[assignment]
    lane.kept = listener, client, server, plain, quiet, other_accept.wait(DEADLINE_S)  # type: ignore[attr-defined]
    return operations


@pytest.mark.parametrize("kill", [kill_worker, kill_supervisor])
def test_every_operation_of_every_client_ends(daemon: Daemon, silent: int, kill: Callable[[Daemon], None]) -> None:
    """One thread blocked in each; in this process, and in another one."""
    lanes = [Lane.attach(daemon.socket_path, arena_size=16 << 20) for _ in range(2)]
    results: dict[str, object] = {}
    threads = []

    def wait_for(name: str, operation: Operation[object]) -> None:
        try:
            results[name] = operation.wait(DEADLINE_S)
        except BaseException as error:
            results[name] = error

    for number, lane in enumerate(lanes):
        for name, operation in everything(daemon, lane, silent).items():
            thread = threading.Thread(target=wait_for, args=(f"{number} {name}", operation), daemon=True)
            thread.start()
            threads.append(thread)
    with other_program(daemon) as other:
        kill(daemon)
        for thread in threads:
            thread.join(DEADLINE_S)
        assert not [thread for thread in threads if thread.is_alive()]
        assert len(results) == len(threads)
        for name, error in results.items():
            if kill is kill_worker:  # when the supervisor dies the worker says goodbye: things may end well
                assert isinstance(error, TlsError), f"{name}: {error!r}"
                assert error.errno == errno.ECONNRESET, f"{name}: {error!r}"
        assert other.wait(DEADLINE_S) == 0, "the other program"
    for lane in lanes:
        with pytest.raises(errors.DaemonGone):
            lane.run(abi.NOP)


OTHER = """
import sys
from libtls import Lane, TlsError
from libtls.functions import tls_listen
lane = Lane.attach(sys.argv[1])
accept = tls_listen(certificate="localhost", lane=lane).wait().accept_operation()
print("ready", flush=True)
try:
    accept.wait()
except TlsError:
    sys.exit(0)
sys.exit(3)
"""


@contextlib.contextmanager
def other_program(daemon: Daemon) -> Iterator[subprocess.Popen[bytes]]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", OTHER, daemon.socket_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0, env=environment) as process:
        try:
            assert process.stdout is not None
            assert read_line(process.stdout, "the other program is ready") == b"ready\n"
            yield process
        finally:
            process.kill()


def test_asyncio(daemon: Daemon) -> None:
    """Awaited operations, streams, a protocol and a server: each hears of it."""

    class Protocol(asyncio.Protocol):
        def __init__(self) -> None:
            self.lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

        def connection_lost(self, exc: Exception | None) -> None:
            self.lost.set_result(exc)

    async def main() -> None:
        lane = Lane.attach(daemon.socket_path)
        async with asyncio.timeout(DEADLINE_S):
            server = await aio.start_server(lambda reader, writer: None, certificate="localhost", lane=lane)
            reader, _writer = await aio.open_connection("localhost", server.port, cafile=daemon.ca, lane=lane)
            _, protocol = await aio.create_connection(Protocol, "localhost", server.port, cafile=daemon.ca, lane=lane)
            assert isinstance(protocol, Protocol)
            listener = await aio.wait(tls_listen(certificate="localhost", lane=lane))
            waiting = [
                asyncio.ensure_future(aio.wait(listener.accept_operation())),
                asyncio.ensure_future(reader.read(1)),
                protocol.lost,
                asyncio.ensure_future(server.wait_closed()),
            ]
            done, _ = await asyncio.wait(waiting, timeout=0)
            assert not done
            kill_worker(daemon)
            results = await asyncio.gather(*waiting, return_exceptions=True)
            assert [type(result) for result in results[:2]] == [errors.ConnectionReset] * 2
            assert isinstance(results[2], errors.ConnectionReset)
            assert results[3] is None
            # The same loop goes on with the worker's successor.
            (await asyncio.to_thread(attach_again, daemon.socket_path)).close()
            libtls.tls_init(daemon.socket_path)
            try:
                listener = await aio.wait(libtls.tls_listen(certificate="localhost"))
                accept = listener.accept_operation()
                reader, writer = await aio.open_connection("localhost", listener.port, cafile=daemon.ca)
                writer.write(b"again")
                await aio.wait(accept)
                assert await aio.wait(accept.value.read_operation()) == b"again"
                writer.close()
            finally:
                libtls.tls_destroy()

    asyncio.run(main())


def test_a_blocked_socket(daemon: Daemon) -> None:
    lane = Lane.attach(daemon.socket_path)
    sock = TlsSocket.open("localhost", daemon.port, cafile=daemon.ca, lane=lane)
    failed: list[BaseException] = []

    def receive() -> None:
        try:
            sock.recv(1)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=receive, daemon=True)
    thread.start()
    eventually(lambda: lane.ring.in_flight == 1, "it waits")
    kill_worker(daemon)
    thread.join(DEADLINE_S)
    assert [type(error) for error in failed] == [errors.ConnectionReset]
    sock.close()  # harmless


def test_tls_init_works_again(daemon: Daemon, issued: Issued, tmp_path: Path) -> None:
    """After the death of a worker, and after a new daemon has taken the dead one's place."""
    path = daemon.socket_path
    libtls.tls_init(path)
    try:
        accept = libtls.tls_wait(libtls.tls_listen(certificate="localhost")).accept_operation()
        kill_worker(daemon)
        with pytest.raises(errors.ConnectionReset):
            accept.wait(DEADLINE_S)
        attach_again(path).close()
        lane = libtls.tls_init(path)  # without tls_destroy: the dead lane is replaced
        listener = libtls.tls_wait(libtls.tls_listen(certificate="localhost"))
        kill_supervisor(daemon)
        with pytest.raises(errors.ConnectionReset):
            listener.accept()
        assert lane.ring.is_dead
        eventually(lambda: not daemon.pids, "the whole daemon is gone")
        with pytest.raises(errors.DaemonNotRunning):
            libtls.tls_init(path)
        arguments = ("--workers", "1")
        new_place = {"KDAEMON_SOCKET": path}
        with serve(tmp_path, *arguments, issued=issued, extra_environment=new_place, ends_by_itself=True) as second:
            libtls.tls_init(path)
            opened = libtls.tls_wait(libtls.tls_open("localhost", second.port, cafile=issued.ca), DEADLINE_S)
            opened.close()
            libtls.tls_destroy()
    finally:
        libtls.tls_destroy()
