"""`kdaemon connect` against OpenSSL's server: data both ways, ends, and a name for every failure."""

from __future__ import annotations

import hashlib
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.certificates import Issued
from support.daemon import Daemon, environment, status
from support.waiting import DEADLINE_S

MIB = 1 << 20


@pytest.fixture
def daemon(kdaemon: Callable[..., Daemon]) -> Daemon:
    """Two workers, for each test anew (conftest's is one for all of a module, for libtls)."""
    return kdaemon("--workers", "2")


@contextmanager
def server(
    issued: Issued, handle: Callable[[ssl.SSLSocket], None], connections: int = 1, curve: str = "", **options: object
) -> Iterator[int]:
    """A TLS server for one connection, or several in turn, in Python's ssl; gives its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(issued.certificate, issued.key)
    context.set_alpn_protocols(["two"])
    if curve:
        context.set_ecdh_curve(curve)
    for name, value in options.items():
        setattr(context, name, value)

    def run() -> None:
        for _ in range(connections):
            serve_one()

    def serve_one() -> None:
        plain, _ = listener.accept()
        plain.settimeout(DEADLINE_S)
        try:
            with context.wrap_socket(plain, server_side=True) as connection:
                handle(connection)
        except OSError:
            pass  # what the client makes of it is what the test looks at
        finally:
            plain.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(DEADLINE_S)
        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            thread.join(DEADLINE_S)


def connect(port: int, arguments: Sequence[str], data: bytes, folder: Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "kdaemon", "connect", f"127.0.0.1:{port}", *arguments],
        input=data,
        capture_output=True,
        timeout=DEADLINE_S,
        check=False,
        env=environment("connect", folder),
    )


def echo(connection: ssl.SSLSocket) -> None:
    """Until close_notify, then close_notify back."""
    while data := connection.recv(65536):
        connection.sendall(data)
    connection.unwrap()


def test_data_goes_both_ways_and_ends_in_order(issued: Issued, tmp_path: Path) -> None:
    data = os.urandom(3 * MIB + 1)
    with server(issued, echo) as port:
        completed = connect(port, ["--cafile", str(issued.ca)], data, tmp_path)
    assert completed.stderr == b""
    assert completed.returncode == 0
    assert hashlib.sha256(completed.stdout).digest() == hashlib.sha256(data).digest()


def test_alpn_and_the_name_reach_the_server(issued: Issued, tmp_path: Path) -> None:
    seen: list[str | None] = []

    def note(connection: ssl.SSLSocket) -> None:
        seen.append(connection.selected_alpn_protocol())
        echo(connection)

    with server(issued, note, sni_callback=lambda _s, name, _c: seen.append(name)) as port:
        completed = connect(
            port,
            ["--cafile", str(issued.ca), "--servername", "localhost", "--alpn", "one", "--alpn", "two"],
            b"x",
            tmp_path,
        )
    assert completed.returncode == 0
    assert seen == ["localhost", "two"]


def test_an_end_without_close_notify_is_a_failure_that_keeps_the_data(issued: Issued, tmp_path: Path) -> None:
    def cut(connection: ssl.SSLSocket) -> None:
        connection.sendall(b"half")
        connection.shutdown(socket.SHUT_WR)  # FIN, no alert
        connection.recv(1)

    with server(issued, cut) as port:
        completed = connect(port, ["--cafile", str(issued.ca)], b"", tmp_path)
    assert completed.returncode == 1
    assert completed.stdout == b"half"
    assert b"truncated: the peer ended the connection without close_notify" in completed.stderr


@pytest.mark.parametrize(
    ("issue_options", "arguments", "complaint"),
    [
        ({"expired": True}, ["--ca"], b"expired"),
        ({"names": ("other.test",)}, ["--ca"], b"is not for 127.0.0.1"),
        ({}, [], b"authority"),
        ({}, ["--cafile", "/nowhere"], b"no trusted certificates in /nowhere"),
    ],
    ids=["expired", "other name", "unknown authority", "no file"],
)
def test_each_bad_certificate_has_its_own_complaint(
    make_issued: Callable[..., Issued],
    tmp_path: Path,
    issue_options: dict[str, object],
    arguments: list[str],
    complaint: bytes,
) -> None:
    issued = make_issued(**issue_options)
    arguments = ["--cafile", str(issued.ca)] if arguments == ["--ca"] else arguments
    if "/nowhere" in arguments:
        completed = connect(1, arguments, b"", tmp_path)
    else:
        with server(issued, echo) as port:
            completed = connect(port, arguments, b"", tmp_path)
    assert completed.returncode == 1
    assert complaint in completed.stderr.lower()
    assert len(completed.stderr.splitlines()) == 1
    if issue_options:
        with server(issued, echo) as port:
            assert connect(port, ["--insecure"], b"", tmp_path).returncode == 0


def test_a_server_that_speaks_tls_1_2_only(issued: Issued, tmp_path: Path) -> None:
    with server(issued, echo, maximum_version=ssl.TLSVersion.TLSv1_2) as port:
        completed = connect(port, ["--insecure"], b"", tmp_path)
    assert completed.returncode == 1
    assert b"alert" in completed.stderr or b"version" in completed.stderr.lower()


def test_nobody_there_and_nobody_speaking_tls(tmp_path: Path) -> None:
    completed = connect(1, ["--insecure"], b"", tmp_path)
    assert (completed.returncode, completed.stderr) == (1, b"kdaemon: 127.0.0.1:1: Connection refused\n")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"220 mail.test ESMTP\r\n")
                connection.recv(65536)

        thread = threading.Thread(target=greet)
        thread.start()
        completed = connect(listener.getsockname()[1], ["--insecure"], b"", tmp_path)
        thread.join(DEADLINE_S)
    assert completed.returncode == 1
    assert len(completed.stderr.splitlines()) == 1


REQUEST = b"GET /large.bin HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def test_a_file_through_both_our_ends(daemon: Daemon, site: Path, tmp_path: Path) -> None:
    completed = connect(daemon.port, ["--cafile", str(daemon.ca)], REQUEST, tmp_path)
    assert (completed.returncode, completed.stderr) == (0, b"")
    assert completed.stdout.partition(b"\r\n\r\n")[2] == (site / "large.bin").read_bytes()


@pytest.mark.guest
def test_a_file_through_two_kernel_ends(kdaemon: Callable[..., Daemon], site: Path, tmp_path: Path) -> None:
    daemon = kdaemon("--ktls", "require", "--workers", "1")
    completed = connect(daemon.port, ["--cafile", str(daemon.ca), "--ktls", "require"], REQUEST, tmp_path)
    assert (completed.returncode, completed.stderr) == (0, b"")
    assert completed.stdout.partition(b"\r\n\r\n")[2] == (site / "large.bin").read_bytes()
    workers: Any = status(daemon)["workers"]
    assert workers[0]["record_layer"] == {"kernel": 1, "user": 0, "none": 0}


def test_ktls_required_where_there_is_none(daemon: Daemon, tmp_path: Path) -> None:
    if status(daemon)["ktls"]["available"]:  # type: ignore[index]
        pytest.skip("this kernel has kTLS")
    completed = connect(daemon.port, ["--insecure", "--ktls", "require"], b"", tmp_path)
    assert completed.returncode == 1
    assert b"ktls is required and cannot be used" in completed.stderr


@pytest.mark.guest
def test_sessions_are_resumed_from_a_file(kdaemon: Callable[..., Daemon], site: Path, tmp_path: Path) -> None:
    daemon, file = kdaemon("--workers", "1"), tmp_path / "session"
    trusting = ["--cafile", str(daemon.ca), "--session", str(file)]

    def handshakes(arguments: Sequence[str]) -> tuple[int, int]:
        completed = connect(daemon.port, arguments, REQUEST, tmp_path)
        assert (completed.returncode, completed.stderr) == (0, b"")
        assert completed.stdout.partition(b"\r\n\r\n")[2] == (site / "large.bin").read_bytes()
        workers: Any = status(daemon)["workers"]
        return workers[0]["handshakes"]["full"], workers[0]["handshakes"]["resumed"]

    assert handshakes(trusting) == (1, 0)
    assert handshakes(trusting) == (1, 1)
    assert file.stat().st_mode & 0o777 == 0o600
    # Whoever was believed otherwise, or under another name, has to show a certificate.
    assert handshakes(["--insecure", "--session", str(file)]) == (2, 1)
    assert handshakes([*trusting, "--servername", "localhost"]) == (3, 1)
    file.write_text("a letter to somebody")
    completed = connect(daemon.port, trusting, b"", tmp_path)
    assert (completed.returncode, b"a file of another kind" in completed.stderr) == (1, True)
    assert file.read_text() == "a letter to somebody"


def test_the_group_that_a_server_asked_for_is_offered_the_next_time(issued: Issued, tmp_path: Path) -> None:
    hellos: list[int] = []

    def watch(_connection: object, direction: str, _version: object, _kind: object, message: int, _data: bytes) -> None:
        if (direction, message) == ("read", 1):  # ClientHello
            hellos.append(message)

    arguments = ["--cafile", str(issued.ca), "--session", str(tmp_path / "session")]
    with server(issued, echo, 2, "secp384r1", num_tickets=0, _msg_callback=watch) as port:
        for total in (2, 3):  # the first time there is a retry
            completed = connect(port, arguments, b"hello", tmp_path)
            assert (completed.returncode, completed.stdout) == (0, b"hello"), completed.stderr
            assert len(hellos) == total
