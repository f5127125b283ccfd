"""Other people's TLS clients as programs: curl, `openssl s_client`, gnutls-cli; and Python's ssl on a real socket.

Each fetches one path from a daemon and returns the body. A peer is asked for a suite and a list of groups by their IANA
names; with more than one group its only key share is for the first, so that a first group which the server lacks asks
for a HelloRetryRequest. `interactive_server` is a server, for tests that type at both ends.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import ssl
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import pytest

from support.certificates import Issued
from support.clients import parse_response
from support.daemon import Daemon
from support.peer_commands import GNUTLS_CIPHERS, GNUTLS_GROUPS, OPENSSL_GROUPS
from support.waiting import DEADLINE_S, read_line

SUITES = ("TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256")


def program(name: str) -> str:
    """Its path; the test is skipped where it is not installed (the project's CI installs all of them)."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(
    command: Sequence[str], stdin: bytes = b"", stdout: IO[bytes] | int = subprocess.PIPE
) -> subprocess.CompletedProcess[bytes]:
    completed = subprocess.run(
        command, input=stdin, stdout=stdout, stderr=subprocess.PIPE, timeout=DEADLINE_S, check=False
    )
    assert completed.returncode == 0, (
        f"{' '.join(command)}: status {completed.returncode}\n{completed.stderr.decode(errors='replace')}"
    )
    return completed


@contextlib.contextmanager
def interactive_server(issued: Issued) -> Iterator[tuple[IO[bytes], IO[bytes], int]]:
    """`openssl s_server` for one connection: what to type into, what it shows, its port. Asserts its clean end."""
    command = [
        program("openssl"), "s_server", "-accept", "127.0.0.1:0", "-cert", str(issued.certificate), "-key",
        str(issued.key), "-tls1_3", "-naccept", "1",
    ]  # fmt: skip
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        try:
            line = b""
            while not line.startswith(b"ACCEPT "):
                line = read_line(server.stdout, "the server's port")
                assert line, "s_server ended"
            yield server.stdin, server.stdout, int(line.rpartition(b":")[2])
            assert server.wait(DEADLINE_S) == 0
        finally:
            server.kill()


def _request(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()


def _body(output: bytes) -> bytes:
    response = parse_response(output)
    assert response.status == 200, output[:200]
    return response.body


def curl(daemon: Daemon, path: str, suite: str, groups: Sequence[str]) -> bytes:
    completed = run([
        program("curl"), "--silent", "--show-error", "--fail", "--ipv4", "--tlsv1.3", "--cacert", str(daemon.ca),
        "--tls13-ciphers", suite, "--curves", ":".join(OPENSSL_GROUPS[group] for group in groups),
        f"https://localhost:{daemon.port}{path}",
    ])  # fmt: skip
    return completed.stdout


def s_client(daemon: Daemon, path: str, suite: str, groups: Sequence[str]) -> bytes:
    completed = run([
        program("openssl"), "s_client", "-connect", f"127.0.0.1:{daemon.port}", "-servername", "localhost", "-tls1_3",
        "-CAfile", str(daemon.ca), "-verify_return_error", "-verify_hostname", "localhost", "-quiet",
        "-ciphersuites", suite, "-groups", ":".join(OPENSSL_GROUPS[group] for group in groups),
    ], _request(path))  # fmt: skip
    return _body(completed.stdout)


def gnutls_cli(daemon: Daemon, path: str, suite: str, groups: Sequence[str]) -> bytes:
    """For small files: gnutls-cli writes its output in one system call per byte.

    In user-mode Linux that is some 50 KB a second, half as much on a busy machine: with a megabyte it passes any
    deadline, still at work, while the daemon, which has long sent and closed everything, shows FIN-WAIT-1 with a full
    send queue. Into a pipe each byte also wakes the reader, so the output goes into a file.
    """
    priority = ":".join([
        "NORMAL:-VERS-ALL:+VERS-TLS1.3:-CIPHER-ALL", f"+{GNUTLS_CIPHERS[suite]}", "-GROUP-ALL",
        *(f"+{GNUTLS_GROUPS[group]}" for group in groups),
    ])  # fmt: skip
    with tempfile.TemporaryFile() as output:
        run([
            program("gnutls-cli"), "--logfile", "/dev/stderr", "--x509cafile", str(daemon.ca),
            "--sni-hostname", "localhost", "--verify-hostname", "localhost",
            "--priority", priority, "--port", str(daemon.port), "127.0.0.1",
        ], _request(path), output)  # fmt: skip
        output.seek(0)
        return _body(output.read())


def python_ssl(daemon: Daemon, path: str, suite: str, groups: Sequence[str]) -> bytes:
    """Python 3.11's ssl cannot choose TLS 1.3 suites and takes one group alone; what it can choose, it does."""
    context = ssl.create_default_context(cafile=str(daemon.ca))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if len(groups) == 1:
        context.set_ecdh_curve({"x25519": "X25519", "secp256r1": "prime256v1"}.get(groups[0], groups[0]))
    with daemon.connect() as connection, context.wrap_socket(connection, server_hostname="localhost") as tls:
        tls.sendall(_request(path))
        output = b""
        while piece := tls.recv(65536):  # raises SSLEOFError if close_notify is missing
            output += piece
    return _body(output)


Peer = Callable[[Daemon, str, str, Sequence[str]], bytes]
PEERS: dict[str, Peer] = {"curl": curl, "s_client": s_client, "gnutls-cli": gnutls_cli}


def hello_count(daemon: Daemon, ca: Path, suite: str, groups: Sequence[str]) -> int:
    """How many ClientHellos `openssl s_client` needed: 2 after a HelloRetryRequest."""
    completed = run([
        program("openssl"), "s_client", "-connect", f"127.0.0.1:{daemon.port}", "-servername", "localhost", "-tls1_3",
        "-CAfile", str(ca), "-verify_return_error", "-msg", "-ciphersuites", suite,
        "-groups", ":".join(OPENSSL_GROUPS[group] for group in groups),
    ], _request("/small.txt"))  # fmt: skip
    return len(re.findall(rb"^>>> .*ClientHello", completed.stdout, re.MULTILINE))
