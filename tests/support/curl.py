"""Requests by curl, and bytes over TLS as they are, to a running daemon."""

from __future__ import annotations

import socket
import ssl
import subprocess

from support.daemon import Daemon
from support.http import Response, read_responses
from support.peers import program
from support.waiting import DEADLINE_S


def curl(daemon: Daemon, target: str, *arguments: str, name: str = "localhost", origin: str = "") -> Response:
    """One request by curl; the path goes out as it is written here. The last of the responses.

    `name`: of the server, at the daemon's address. `origin`: scheme, name and port, if not those of the daemon.
    """
    origin = origin or f"https://{name}:{daemon.port}"
    completed = subprocess.run(
        [
            program("curl"), "--silent", "--show-error", "--include", "--tlsv1.3", "--cacert", str(daemon.ca),
            "--path-as-is", "--max-time", str(int(DEADLINE_S)),
            "--resolve", f"*:{origin.rpartition(':')[2]}:{daemon.host}",
            *(["--insecure"] if name != "localhost" else []), *arguments, origin + target,
        ],
        capture_output=True,
        check=True,
    )  # fmt: skip
    return read_responses(completed.stdout, "H" if "--head" in arguments else "")[-1]


def exchange(daemon: Daemon, data: bytes) -> bytes:
    """Sends `data` in one piece over TLS and reads to the end, which must be an orderly one."""
    context = ssl.create_default_context(cafile=str(daemon.ca))
    with (
        socket.create_connection(daemon.address, DEADLINE_S) as plain,
        context.wrap_socket(plain, server_hostname="localhost", suppress_ragged_eofs=False) as tls,
    ):
        tls.sendall(data)
        received = b""
        while piece := tls.recv(65536):
            received += piece
    return received


def get(target: str, *headers: str) -> bytes:
    """A request for localhost, to send as it is."""
    return "\r\n".join([f"GET {target} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()
