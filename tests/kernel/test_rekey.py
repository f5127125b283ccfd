"""KeyUpdate where the kernel's record layer takes new keys (Linux 6.14 and later): followed in both directions, by it.

/proc/net/tls_stat counts what the kernel did. The peers are OpenSSL, which does its records in user space: `k` and `K`
at the beginning of a line make s_client and s_server send a KeyUpdate, `K` asks for the other's as well.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import peers
from support.certificates import Issued
from support.content import pattern
from support.daemon import Daemon
from support.waiting import DEADLINE_S, eventually, read_line, say_until

from kdaemon import ktls

Serve = Callable[..., Daemon]

SUPPORT = ktls.probe()

pytestmark = [
    pytest.mark.guest,
    pytest.mark.guest_new,
    pytest.mark.skipif(not SUPPORT.rekey, reason="this kernel takes no new keys; test_serve_ktls has its orderly end"),
]

COMMANDS = b"kKKkkK"  # KeyUpdates in a row on one connection; those in capitals are answered by one


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


def test_a_server_follows_its_client(kdaemon: Serve, site: Path) -> None:
    daemon = kdaemon("--ktls", "require", "--workers", "1")
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


def test_a_client_follows_its_server(issued: Issued) -> None:
    server = [
        peers.program("openssl"), "s_server", "-accept", "127.0.0.1:0", "-cert", str(issued.certificate), "-key",
        str(issued.key), "-tls1_3", "-naccept", "1",
    ]  # fmt: skip
    with subprocess.Popen(
        server, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
    ) as peer:
        assert peer.stdin is not None and peer.stdout is not None
        line = b""
        while not line.startswith(b"ACCEPT "):
            line = read_line(peer.stdout, "the server's port")
        command = [
            sys.executable, "-m", "kdaemon", "connect", line.split()[1].decode(), "--servername", "localhost",
            "--cafile", str(issued.ca), "--ktls", "require",
        ]  # fmt: skip
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as client:
            assert client.stdin is not None and client.stdout is not None
            say_until(client.stdin, b"a first line\n", peer.stdout, b"a first line")
            with rekeyed(len(COMMANDS), COMMANDS.count(b"K")):  # not what `connect` tried at its start
                before = ktls.tls_stat()["TlsRxRekeyOk"]
                for count, letter in enumerate(COMMANDS, start=1):
                    peer.stdin.write(bytes((letter,)) + b"\n")
                    # Not before the update: s_server takes what is typed behind the letter for another command.
                    eventually(lambda due=before + count: ktls.tls_stat()["TlsRxRekeyOk"] == due, "the new key")
                    say_until(peer.stdin, b"down with it\n", client.stdout, b"down with it")
                    say_until(client.stdin, b"up with it\n", peer.stdout, b"up with it")
            client.stdin.close()
            assert client.wait(DEADLINE_S) == 0
