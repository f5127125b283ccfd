"""`kdaemon serve --ktls require` on a kernel that has kTLS: what is said, what the kernel counts, and what clients get.

/proc/net/tls_stat counts each installed direction: TlsTxSw and TlsRxSw ever, TlsCurrTxSw and TlsCurrRxSw now. The
clients here do their own records in user space, so every count is the daemon's.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import signal
import socket
import ssl
import struct
import subprocess
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.certificates import Issued
from support.clients import MemoryClient, fetch
from support.content import pattern
from support.daemon import Daemon, serve, status
from support.peers import PEERS, SUITES, Peer, python_ssl
from support.waiting import DEADLINE_S, eventually

from kdaemon import ktls

pytestmark = pytest.mark.guest

Serve = Callable[..., Daemon]
COUNTERS = ("TlsTxSw", "TlsRxSw", "TlsCurrTxSw", "TlsCurrRxSw")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    (directory / "small.txt").write_bytes(pattern(1024))
    (directory / "medium.bin").write_bytes(pattern(50_001))  # gnutls-cli writes it out in one system call per byte
    (directory / "large.bin").write_bytes(pattern((1 << 20) + 1))
    return directory


@pytest.fixture(scope="module")
def required(site: Path, issued: Issued) -> Iterator[Daemon]:
    """One daemon for all: starting one takes seconds in a guest."""
    with serve(site, "--ktls", "require", "--workers", "1", issued=issued) as daemon:
        yield daemon


def counted() -> dict[str, int]:
    everything = ktls.tls_stat()
    return {name: everything[name] for name in COUNTERS}


@contextlib.contextmanager
def counts(connections: int) -> Iterator[None]:
    """Inside, so many connections are handed to the kernel, both directions each; afterwards none is left there."""
    before = counted()
    assert before["TlsCurrTxSw"] == before["TlsCurrRxSw"] == 0
    yield
    eventually(
        lambda: counted()["TlsCurrTxSw"] == counted()["TlsCurrRxSw"] == 0, f"nothing current is left: {counted()}"
    )
    after = counted()
    assert after["TlsTxSw"] - before["TlsTxSw"] == connections
    assert after["TlsRxSw"] - before["TlsRxSw"] == connections


@pytest.mark.guest_core
def test_it_says_that_the_kernel_does_the_records(required: Daemon) -> None:
    assert [ready.backend for ready in required.ready] == ["kernel"]
    with counts(1):
        assert fetch(required.address, required.ca).status == 200
    told = status(required)
    assert told["ktls"]["available"] is True  # type: ignore[index]
    [worker] = told["workers"]  # type: ignore[misc]
    assert worker["record_layer"]["kernel"] >= 1
    assert worker["record_layer"]["user"] == 0


@pytest.mark.guest_core
@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("peer", [pytest.param(peer, id=name) for name, peer in PEERS.items()])
def test_each_peer_with_each_suite(required: Daemon, site: Path, peer: Peer, suite: str) -> None:
    with counts(1):
        assert peer(required, "/medium.bin", suite, ["x25519"]) == (site / "medium.bin").read_bytes()


@pytest.mark.guest_core
def test_python_ssl(required: Daemon, site: Path) -> None:
    with counts(2):
        for group in ("x25519", "secp256r1"):
            assert python_ssl(required, "/small.txt", SUITES[0], [group]) == (site / "small.txt").read_bytes()


def test_a_hello_retry_request_does_not_disturb_the_hand_over(required: Daemon, site: Path) -> None:
    peer = PEERS["s_client"]
    with counts(1):
        assert peer(required, "/small.txt", SUITES[0], ["secp521r1", "x25519"]) == (site / "small.txt").read_bytes()


def test_what_is_current_is_what_is_open(required: Daemon) -> None:
    """Idle connections stay in the kernel, each with both directions, until their clients go."""
    with counts(20), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(MemoryClient(required.address, required.ca)) for _ in range(20)]
        for number, client in enumerate(clients, start=1):
            client.handshake(send_finished=True)
            eventually(
                lambda number=number: counted()["TlsCurrTxSw"] == counted()["TlsCurrRxSw"] == number,  # type: ignore[misc]
                f"{number} connections are the kernel's",
            )


def test_keep_alive_uses_one_connection(required: Daemon, site: Path) -> None:
    urls = [f"https://localhost:{required.port}/small.txt"] * 50
    with counts(1):
        output = subprocess.run(
            ["curl", "--silent", "--show-error", "--fail", "--ipv4", "--cacert", required.ca, *urls],
            capture_output=True, timeout=DEADLINE_S, check=True,
        ).stdout  # fmt: skip
    assert output == (site / "small.txt").read_bytes() * 50


@pytest.mark.guest_core
@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 4097, 16384, 16385, 5_000_000])
def test_files_of_every_kind_of_length(required: Daemon, site: Path, length: int) -> None:
    """The page with EOF, whole pages, whole records, and more than fits any socket buffer."""
    content = pattern(length)
    (site / "file").write_bytes(content)
    with counts(1):
        response = fetch(required.address, required.ca, "/file")
    assert response.status == 200
    assert not response.truncated
    assert hashlib.sha256(response.body).digest() == hashlib.sha256(content).digest()


def test_ranges(required: Daemon, site: Path) -> None:
    content = (site / "large.bin").read_bytes()
    for first, last in [(0, 0), (4095, 4096), (100_000, 900_000), (len(content) - 1, len(content) - 1)]:
        with counts(1):
            got = subprocess.run(
                ["curl", "--silent", "--show-error", "--fail", "--ipv4", "--cacert", required.ca,
                 "--range", f"{first}-{last}", f"https://localhost:{required.port}/large.bin"],
                capture_output=True, timeout=DEADLINE_S, check=True,
            ).stdout  # fmt: skip
        assert got == content[first : last + 1]


def unread_by_peer(connection: socket.socket) -> int:
    """Bytes sent that the peer's kernel has not acknowledged (SIOCOUTQ, tcp(7))."""
    return int(struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4)))[0])


def test_data_glued_to_finished_at_every_split(required: Daemon, site: Path) -> None:
    """Invariant 1: client data behind Finished, cut at every byte, is neither lost nor decrypted twice."""
    content = (site / "small.txt").read_bytes()
    with MemoryClient(required.address, required.ca) as client:
        client.handshake()
        client.request()
        length = len(client.flight)
    # That one was never finished: the daemon sees a client go in the middle of its handshake.
    with counts(length + 1):
        for split in range(length + 1):
            with MemoryClient(required.address, required.ca) as client:
                client.handshake()
                client.request()
                flight = client.flight
                client.socket.sendall(flight[:split])
                eventually(lambda: unread_by_peer(client.socket) == 0, "the first piece has arrived")
                client.socket.sendall(flight[split:])
                response = client.response()
            assert (response.status, response.body, response.truncated) == (200, content, False), split


@pytest.mark.guest_core
def test_finished_and_request_and_fin_at_once(required: Daemon, site: Path) -> None:
    """TLS_TX after the peer's FIN still works because the ULP was attached at accept."""
    with counts(1), MemoryClient(required.address, required.ca) as client:
        client.handshake()
        client.request()
        client.send()
        client.socket.shutdown(socket.SHUT_WR)
        response = client.response()
    assert (response.status, response.body) == (200, (site / "small.txt").read_bytes())


@pytest.mark.guest_core
def test_a_forged_record_ends_its_connection_alone(required: Daemon) -> None:
    failures = ktls.tls_stat()["TlsDecryptError"]
    with counts(2):
        with MemoryClient(required.address, required.ca) as client:
            client.handshake(send_finished=True)
            eventually(lambda: counted()["TlsCurrRxSw"] == 1, "the connection is the kernel's")
            client.socket.sendall(b"\x17\x03\x03\x00\x40" + bytes(64))
            assert client.alert() in ("", "SSLV3_ALERT_BAD_RECORD_MAC", "SSL/TLS_ALERT_BAD_RECORD_MAC")
        assert fetch(required.address, required.ca).status == 200
    assert ktls.tls_stat()["TlsDecryptError"] == failures + 1


def test_a_client_that_vanishes_leaves_nothing_in_the_kernel(required: Daemon) -> None:
    """FIN without close_notify, and a reset, while a large response is on its way."""
    with counts(2):
        for linger in (struct.pack("ii", 0, 0), struct.pack("ii", 1, 0)):
            with MemoryClient(required.address, required.ca) as client:
                client.handshake()
                client.request(b"GET /large.bin HTTP/1.1\r\nHost: localhost\r\n\r\n")
                client.send()
                eventually(lambda: counted()["TlsCurrRxSw"] == 1, "the connection is the kernel's")
                client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


@pytest.mark.guest_core
def test_a_key_update_is_followed_or_ends_the_connection_in_order(required: Daemon) -> None:
    """Rekeying is the kernel's since 6.14. Before, the connection ends with close_notify and the daemon goes on."""
    rekey = ktls.probe().rekey
    with counts(2):
        with subprocess.Popen(
            ["openssl", "s_client", "-connect", f"127.0.0.1:{required.port}", "-CAfile", required.ca, "-tls1_3",
             "-servername", "localhost"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0,
        ) as client:  # fmt: skip
            assert client.stdin is not None
            assert client.stdout is not None
            eventually(lambda: counted()["TlsCurrRxSw"] == 1, "the connection is the kernel's")
            client.stdin.write(b"k\n")  # one KeyUpdate, not asking for the other's
            told = b""
            while b"KEYUPDATE" not in told:
                piece = os.read(client.stdout.fileno(), 65536)
                assert piece, told
                told += piece
            if rekey:
                client.stdin.write(b"GET /small.txt HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            rest = client.stdout.read()
            assert client.wait(DEADLINE_S) in (0, 1)
            if rekey:
                assert b"HTTP/1.1 200" in rest
        assert fetch(required.address, required.ca).status == 200


def test_sigterm_in_the_middle_of_a_download(site: Path, issued: Issued) -> None:
    """The download completes from the kernel's record layer, and the daemon ends with status 0."""
    content = pattern(20_000_000)
    (site / "big.bin").write_bytes(content)
    context = ssl.create_default_context(cafile=str(issued.ca))
    with serve(site, "--ktls", "require", "--workers", "1", issued=issued, ends_by_itself=True) as daemon:
        with counts(1), daemon.connect() as plain, context.wrap_socket(plain, server_hostname="localhost") as client:
            client.sendall(b"GET /big.bin HTTP/1.1\r\nHost: localhost\r\n\r\n")
            head, _, begin = client.recv(16384).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            daemon.signal(signal.SIGTERM)
            digest, length = hashlib.sha256(begin), len(begin)
            while piece := client.recv(1 << 20):
                digest.update(piece)
                length += len(piece)
        assert (length, digest.digest()) == (len(content), hashlib.sha256(content).digest())
        assert daemon.wait() == 0
        daemon.assert_nothing_left()


def test_ktls_off_leaves_the_kernel_out(kdaemon: Serve, site: Path) -> None:
    daemon = kdaemon("--ktls", "off", "--workers", "1")
    assert daemon.ready[0].backend == "user"
    with counts(0):
        assert fetch(daemon.address, daemon.ca).body == (site / "small.txt").read_bytes()


def test_auto_takes_the_kernel(kdaemon: Serve, site: Path) -> None:
    daemon = kdaemon("--workers", "1")
    assert daemon.ready[0].backend == "kernel"
    with counts(1):
        assert fetch(daemon.address, daemon.ca).body == (site / "small.txt").read_bytes()
