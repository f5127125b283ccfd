"""Processes that stand still without dying: every wait on them has a deadline, and the daemon says who it is."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from interop.process_support import Connection, facts, kill_and_wait, pid_of, restarted, stop_and_wait, workers
from support.certificates import Issued
from support.clients import MemoryClient, receive_to_end
from support.daemon import Daemon, control, serve
from support.waiting import DEADLINE_S, eventually

from kdaemon import redirect

Serve = Callable[..., Daemon]


@pytest.fixture
def daemon(kdaemon: Callable[..., Daemon]) -> Daemon:
    """Two workers, for each test anew (conftest's is one for all of a module, for libtls)."""
    return kdaemon("--workers", "2")


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process stands still inside the block."""
    stop_and_wait(pid)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):  # it was killed for it
            os.kill(pid, signal.SIGCONT)


def test_status_is_answered_while_a_worker_stands_still(daemon: Daemon) -> None:
    with stopped(pid_of(daemon, "worker")):
        first, second = workers(daemon)
        assert (first["responding"], second["responding"]) == (False, True)
        assert "worker 0: pid" in control(daemon, "status").stdout
        assert "does not respond" in control(daemon, "status").stdout
    eventually(lambda: workers(daemon)[0]["responding"], "it answers again")


def test_a_keymgr_that_stands_still_costs_handshakes_at_the_signing_deadline(
    site: Path, issued: Issued, tmp_path: Path
) -> None:
    file = tmp_path / "kdaemon.toml"
    file.write_text("[deadlines]\nsigning_ms = 300\nhandshake_ms = 60000\n")
    with serve(site, "--config", str(file), "--workers", "1", issued=issued) as daemon, Connection(daemon) as early:
        assert early.works()
        context = ssl.create_default_context(cafile=str(daemon.ca))
        with stopped(pid_of(daemon, "keymgr")):
            began = time.monotonic()
            with (
                socket.create_connection(daemon.address, DEADLINE_S) as plain,
                pytest.raises(ssl.SSLError, match=r"(?i)internal.error"),
            ):
                context.wrap_socket(plain, server_hostname="localhost")
            assert time.monotonic() - began < DEADLINE_S
            assert early.works(), "established connections need no keymgr"
            assert facts(daemon)["workers"][0]["handshake_failures"] == {"InternalError": 1}
        with Connection(daemon) as connection:
            assert connection.works()


def test_a_keymgr_that_hangs_is_replaced_and_what_it_owed_is_signed(site: Path, issued: Issued, tmp_path: Path) -> None:
    file = tmp_path / "kdaemon.toml"
    file.write_text("[deadlines]\nsigning_ms = 60000\nhandshake_ms = 60000\n")
    with serve(site, "--config", str(file), "--workers", "1", issued=issued) as daemon:
        keymgr = pid_of(daemon, "keymgr")
        stop_and_wait(keymgr)  # for ever
        with Connection(daemon) as connection:
            assert connection.works(), "the handshake waited for the next keymgr"
        assert pid_of(daemon, "keymgr") != keymgr
        assert b"does not answer and is killed" in daemon.stderr
        assert not Path(f"/proc/{keymgr}").exists()


def test_a_zygote_that_hangs_is_replaced_and_its_successor_forks(daemon: Daemon) -> None:
    zygote = pid_of(daemon, "zygote")
    stop_and_wait(zygote)
    restarted(daemon, "zygote", zygote)
    worker = pid_of(daemon, "worker")
    kill_and_wait(worker)
    restarted(daemon, "worker", worker)


def test_connections_queued_when_the_drain_begins_are_served(site: Path, issued: Issued) -> None:
    """A worker that was busy has not accepted them yet: neither drain nor the closing of the listener loses them."""
    with serve(site, "--workers", "1", issued=issued, ends_by_itself=True) as daemon, ExitStack() as stack:
        worker = pid_of(daemon, "worker")
        stop_and_wait(worker)
        clients = [stack.enter_context(MemoryClient(daemon.address, daemon.ca)) for _ in range(20)]
        for client in clients:
            with suppress(ssl.SSLWantReadError):
                client.tls.do_handshake()
            client.send()
        daemon.signal()
        eventually(lambda: b"draining" in daemon.stderr, "the drain has begun")
        late = socket.socket()
        stack.callback(late.close)
        late.setblocking(False)
        assert late.connect_ex(daemon.address) == errno.EINPROGRESS, "no new connection is let in"
        os.kill(worker, signal.SIGCONT)
        for client in clients:
            client.handshake()
            client.request()
            client.send()
        assert [client.response().status for client in clients] == [200] * len(clients)
        assert daemon.wait() == 0
        daemon.assert_nothing_left()
        late.setblocking(True)
        late.settimeout(DEADLINE_S)
        with pytest.raises(ConnectionRefusedError):
            late.connect(daemon.address)


def test_redirects_queued_when_the_drain_begins_are_answered(site: Path, issued: Issued, tmp_path: Path) -> None:
    """As TLS connections are; who has said nothing is not waited for."""
    configuration = tmp_path / "kdaemon.toml"
    configuration.write_text('[[redirect_listen]]\naddress = "127.0.0.1:0"\n')
    arguments = ("--workers", "1", "--config", str(configuration))
    with serve(site, *arguments, issued=issued, ends_by_itself=True) as daemon, ExitStack() as stack:
        host, _, port = json.loads(control(daemon, "status", "--json").stdout)["redirect_listeners"][0].partition(":")
        worker = pid_of(daemon, "worker")
        stop_and_wait(worker)
        clients = [
            stack.enter_context(socket.create_connection((host, int(port)), DEADLINE_S))
            for _ in range(redirect.CONNECTIONS_MAX + 20)
        ]
        silent = stack.enter_context(socket.create_connection((host, int(port)), DEADLINE_S))
        for number, client in enumerate(clients):
            client.sendall(f"GET /{number} HTTP/1.1\r\nHost: one.test\r\n\r\n".encode())
        daemon.signal()
        eventually(lambda: b"draining" in daemon.stderr, "the drain has begun")
        os.kill(worker, signal.SIGCONT)
        for number, client in enumerate(clients):
            assert f"\r\nLocation: https://one.test/{number}\r\n" in receive_to_end(client).decode()
            client.close()
        assert silent.recv(1) == b""
        assert daemon.wait() == 0
        daemon.assert_nothing_left()


def test_a_worker_that_stands_still_does_not_keep_the_daemon_from_its_end(site: Path, issued: Issued) -> None:
    """It is killed some seconds after the drain deadline; the exit status says that connections were cut."""
    with serve(site, "--workers", "2", "--drain-ms", "100", issued=issued, ends_by_itself=True) as daemon:
        stop_and_wait(pid_of(daemon, "worker"))
        daemon.stop(status=1)
        assert b"did not leave in time" in daemon.stderr
