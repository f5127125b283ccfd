"""Connections that programs open through the daemon resume sessions, and begin with the group that a server asked for.

Each server here, by Python's ssl, tells its clients whether they resumed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.certificates import Issued, issue
from support.daemon import Daemon, serve
from support.rings import Peer, in_thread, server_context, worker
from support.waiting import DEADLINE_S

from libtls import Lane, errors
from libtls.connection import Connection
from libtls.functions import tls_connect, tls_open, tls_start

NOBODY = 65534
RESUMED, FULL = b"resumed", b"in full"


@pytest.fixture(scope="module", params=["off", pytest.param("require", marks=pytest.mark.guest)])
def daemon(
    request: pytest.FixtureRequest, issued: Issued, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Daemon]:
    directory: Path = tmp_path_factory.mktemp("site")
    client = issue(tmp_path_factory.mktemp("client"), names=["client.test"], client_only=True)
    configuration = directory / "kdaemon.toml"
    configuration.write_text(
        f'workers = 1\nktls = "{request.param}"\nclients.users = ["{NOBODY}"]\n'
        + "".join(f'[[certificate]]\nchain = "{own.certificate}"\nkey = "{own.key}"\n' for own in (issued, client))
    )
    with serve(directory, "--config", str(configuration), ends_by_itself=True) as daemon:
        daemon.issued = issued
        yield daemon
        daemon.stop()


@pytest.fixture(scope="module")
def lane(daemon: Daemon) -> Iterator[Lane]:
    """One for all tests, which have a server each: nothing that is remembered of one holds for another."""
    lane = Lane.attach(daemon.socket_path)
    yield lane
    lane.close()


class Server(Peer):
    """Any number of connections in turn."""

    def __init__(self, issued: Issued) -> None:
        super().__init__()
        self.context = server_context(issued)
        self.context.set_alpn_protocols(["one", "two"])
        self.context.num_tickets = 1
        self.hellos = 0
        self.context._msg_callback = self._watch  # type: ignore[attr-defined]
        self.thread = in_thread(self._run)

    def _watch(self, _socket: Any, direction: str, _version: Any, _kind: Any, message: int, _data: bytes) -> None:
        self.hellos += (direction, message) == ("read", 1)

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                taken, _ = self.listener.accept()
                taken.settimeout(DEADLINE_S)
                with contextlib.suppress(OSError), taken, self.context.wrap_socket(taken, server_side=True) as tls:
                    tls.sendall(RESUMED if tls.session_reused else FULL)
                    tls.unwrap()


@pytest.fixture
def server(issued: Issued) -> Iterator[Server]:
    server = Server(issued)
    yield server
    with contextlib.suppress(OSError):
        server.listener.shutdown(2)
    server.thread.join(DEADLINE_S)
    server.listener.close()


def answer(connection: Connection) -> bytes:
    """What the server says; with that its ticket, which goes before, is here."""
    with connection:
        said = connection.read(timeout=DEADLINE_S)
        info = connection.info()
        assert info.resumed == (said == RESUMED)
        assert info.peer_certificate  # of a resumed session, too
        assert connection.read(timeout=DEADLINE_S) == b""
    return said


@pytest.fixture
def ask(daemon: Daemon, lane: Lane, server: Server) -> Callable[..., bytes]:
    def ask(host: str = "localhost", **options: Any) -> bytes:
        options = {"cafile": daemon.ca, "alpn": ["one"], **options}
        return answer(tls_open(host, server.port, lane=lane, **options).wait(DEADLINE_S))

    return ask


def test_the_second_connection_resumes(daemon: Daemon, ask: Callable[..., bytes]) -> None:
    before: Any = worker(daemon)["handshakes"]
    assert [ask(), ask(), ask()] == [FULL, RESUMED, RESUMED]
    after: Any = worker(daemon)["handshakes"]
    assert after["full"] - before["full"] == 1
    assert after["resumed"] - before["resumed"] == 2
    assert after["failed"] == before["failed"]


def test_a_ticket_is_for_one_use(ask: Callable[..., bytes], server: Server) -> None:
    assert ask() == FULL
    server.context.num_tickets = 0
    assert [ask(), ask()] == [RESUMED, FULL]


def test_a_server_that_does_not_resume_any_more(ask: Callable[..., bytes], server: Server, issued: Issued) -> None:
    assert ask() == FULL
    server.context = server_context(issued)  # with other ticket keys
    assert ask() == FULL


def test_start_tls_resumes(daemon: Daemon, lane: Lane, server: Server) -> None:
    def ask() -> bytes:
        connection = tls_connect("localhost", server.port, lane=lane).wait(DEADLINE_S)
        tls_start(connection, "localhost", cafile=daemon.ca).wait(DEADLINE_S)
        return answer(connection)

    assert [ask(), ask()] == [FULL, RESUMED]


def test_sessions_hold_for_the_terms_that_they_were_made_on(
    daemon: Daemon, ask: Callable[..., bytes], make_issued: Callable[..., Issued]
) -> None:
    assert ask() == FULL
    for terms in (
        {"insecure": True, "cafile": None},
        {"cafile": None, "cadata": daemon.ca.read_bytes() + make_issued().ca.read_bytes()},
        {"alpn": ["two"]},
        {"alpn": ["one", "two"]},
        {"server_name": "127.0.0.1"},
        {"host": "127.0.0.1"},
        {"certificate": "client.test"},
    ):
        assert ask(**terms) == FULL, terms
        assert ask(**terms) == RESUMED, terms
    assert ask() == RESUMED


def test_what_was_not_verified_is_not_believed_later(
    ask: Callable[..., bytes], make_issued: Callable[..., Issued]
) -> None:
    other = make_issued().ca
    assert ask(insecure=True, cafile=None) == FULL
    with pytest.raises(errors.CertificateUntrusted):
        ask(cafile=other)
    assert ask(insecure=True, cafile=None) == RESUMED


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become another user")
def test_users_do_not_share_sessions(daemon: Daemon, ask: Callable[..., bytes], server: Server) -> None:
    """Programs of one user do."""
    path, trusted = daemon.stderr_path.parent / "kdaemon.sock", daemon.ca.read_bytes()
    path.parent.chmod(0o755)

    def another_program(user: int) -> bytes:
        child = os.fork()
        if child == 0:
            code = 0
            try:
                os.setresuid(user, user, user)
                lane = Lane.attach(str(path))
                opening = tls_open("localhost", server.port, cadata=trusted, alpn=["one"], lane=lane)
                code = 1 + (answer(opening.wait(DEADLINE_S)) == RESUMED)
            finally:
                os._exit(code)
        return (b"an error", FULL, RESUMED)[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]

    assert ask() == FULL
    assert another_program(NOBODY) == FULL
    assert another_program(os.geteuid()) == RESUMED


def test_the_group_that_a_server_asked_for_comes_first(ask: Callable[..., bytes], server: Server) -> None:
    server.context.set_ecdh_curve("secp384r1")
    server.context.num_tickets = 0
    for total in (2, 3):  # the first time there is a retry
        assert ask() == FULL
        assert server.hellos == total
