"""What newer kernels' record layers can do: take new keys (Linux 6.14), so that KeyUpdates are followed in both
directions, and make smaller records (6.19).

/proc/net/tls_stat counts what the kernel did. The peers are OpenSSL, which does its records in user space: `k` and `K`
at the beginning of a line make s_client and s_server send a KeyUpdate, `K` asks for the other's as well.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import peers
from support.certificates import Issued
from support.content import pattern
from support.daemon import Daemon, serve
from support.waiting import DEADLINE_S, eventually, say_until

from kdaemon import ktls
from kdaemon.socket_records import UserRecords
from kdaemon.tls.certificates import TrustStore
from kdaemon.tls.client import ClientHandshake
from kdaemon.tls.configuration import ClientConfig
from libtls import Lane
from libtls.functions import tls_listen

SUPPORT = ktls.probe()

pytestmark = [pytest.mark.guest, pytest.mark.guest_new]
takes_new_keys = pytest.mark.skipif(
    not SUPPORT.rekey, reason="this kernel takes no new keys; test_serve_ktls has its orderly end"
)
makes_smaller_records = pytest.mark.skipif(
    not SUPPORT.tx_max_payload, reason="TLS_TX_MAX_PAYLOAD_LEN is in Linux since 6.19"
)

LIMIT = 4001  # bytes of content and type of a record; the engine gives the kernel 524288 bytes at a time
COMMANDS = b"kKKkkK"  # KeyUpdates in a row on one connection; those in capitals are answered by one


@pytest.fixture(scope="module")
def daemon(issued: Issued, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One for all: starting one takes long in a guest."""
    site: Path = tmp_path_factory.mktemp("site")
    (site / "small.txt").write_bytes(pattern(1024))
    with serve(site, "--ktls", "require", "--workers", "1", issued=issued) as daemon:
        yield daemon


@contextlib.contextmanager
def rekeyed(received: int, answered: int) -> Iterator[None]:
    """Inside, the kernel reads so many KeyUpdates, takes a new key for each, and one to send with for each answer."""
    before = ktls.tls_stat()
    yield
    grown = {name: value - before[name] for name, value in ktls.tls_stat().items() if "Rekey" in name}
    assert grown == {
        "TlsRxRekeyReceived": received, "TlsRxRekeyOk": received, "TlsRxRekeyError": 0,
        "TlsTxRekeyOk": answered, "TlsTxRekeyError": 0,
    }  # fmt: skip


@takes_new_keys
def test_a_server_follows_its_client(daemon: Daemon) -> None:
    command = [
        peers.program("openssl"), "s_client", "-connect", f"127.0.0.1:{daemon.port}", "-servername", "localhost",
        "-CAfile", str(daemon.ca), "-verify_return_error",
    ]  # fmt: skip
    with (
        rekeyed(len(COMMANDS), COMMANDS.count(b"K")),
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
        ) as client,
    ):
        assert client.stdin is not None and client.stdout is not None
        say_until(client.stdin, b"", client.stdout, b"Verify return code: 0 (ok)")
        request = b"GET /small.txt HTTP/1.1\r\nHost: localhost\r\n\r\n"
        last_line = pattern(1024).splitlines(keepends=True)[-1]
        say_until(client.stdin, request, client.stdout, last_line)
        for letter in COMMANDS:
            say_until(client.stdin, bytes((letter,)) + b"\n", client.stdout, b"KEYUPDATE")
            say_until(client.stdin, request, client.stdout, last_line)
        client.stdin.close()
        assert client.wait(DEADLINE_S) == 0


@takes_new_keys
def test_a_client_follows_its_server(issued: Issued) -> None:
    with peers.interactive_server(issued) as (typed, shown, port):
        command = [
            sys.executable, "-m", "kdaemon", "connect", f"127.0.0.1:{port}", "--servername", "localhost",
            "--cafile", str(issued.ca), "--ktls", "require",
        ]  # fmt: skip
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as client:
            assert client.stdin is not None and client.stdout is not None
            say_until(client.stdin, b"a first line\n", shown, b"a first line")
            with rekeyed(len(COMMANDS), COMMANDS.count(b"K")):  # not what `connect` tried at its start
                before = ktls.tls_stat()["TlsRxRekeyOk"]
                for count, letter in enumerate(COMMANDS, start=1):
                    typed.write(bytes((letter,)) + b"\n")
                    # Not before the update: s_server takes what is typed behind the letter for another command.
                    eventually(lambda due=before + count: ktls.tls_stat()["TlsRxRekeyOk"] == due, "the new key")
                    say_until(typed, b"down with it\n", client.stdout, b"down with it")
                    say_until(client.stdin, b"up with it\n", shown, b"up with it")
            client.stdin.close()
            assert client.wait(DEADLINE_S) == 0


@makes_smaller_records
def test_a_write_that_is_cut_short_keeps_nothing_back(daemon: Daemon, issued: Issued) -> None:
    """libtls: what its count says reaches the peer by itself, the last record though it is not full."""
    trust = TrustStore.from_pem(issued.ca.read_bytes())
    config = ClientConfig(verify=trust.verify_server, record_size_limit=LIMIT)
    handshake = ClientHandshake(config, "localhost", random=os.urandom, now_s=time.time())
    with (
        contextlib.closing(Lane.attach(daemon.socket_path)) as lane,
        socket.socket() as sock,
    ):
        listener = tls_listen(certificate="localhost", lane=lane).wait(DEADLINE_S)
        accept = listener.accept_operation()
        sock.settimeout(DEADLINE_S)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        sock.connect(("127.0.0.1", listener.port))
        while not handshake.complete:
            sock.sendall(handshake.data_to_send())
            handshake.receive(sock.recv(65536))
        sock.sendall(handshake.data_to_send())
        connection = accept.wait(DEADLINE_S)
        assert connection.info().record_layer == "kernel"
        records = UserRecords(sock, handshake.established)
        write = connection.write_operation(bytes(12 << 20))
        got = len((records.receive() or (0, b""))[1])  # it is under way
        write.cancel()
        count = write.wait(DEADLINE_S)
        assert count % (LIMIT - 1), "its last record is not full"
        while got < count:
            content_type, content = records.receive() or (0, b"")
            assert content_type == 23
            assert len(content) < LIMIT
            got += len(content)
        assert got == count
        connection.close()
        assert records.receive() == (21, b"\x01\x00")
