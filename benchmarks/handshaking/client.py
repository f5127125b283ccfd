"""A client that connects again and again, blocking: our engine with its own records, or Python's ssl.

Usage: client.py kdaemon|ssl full|resumed HOST PORT CAFILE SECONDS PATH. Prints connections and CPU seconds as JSON.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path

from kdaemon_pyx.hkdf import hmac_digest

from kdaemon.socket_records import UserRecords
from kdaemon.tls import key_schedule
from kdaemon.tls.certificates import TrustStore
from kdaemon.tls.client import ClientHandshake
from kdaemon.tls.configuration import ClientConfig
from kdaemon.tls.constants import ContentType, NamedGroup
from kdaemon.tls.post_handshake import ConnectionSecrets, ControlState, handle_control_record
from kdaemon.tls.session import SessionTicket
from kdaemon.tls.signing import Role
from kdaemon.worker import GC_THRESHOLD

NAME = "localhost"
CLOSE_NOTIFY = b"\x01\x00"


class KdaemonClient:
    """One connection at a time with our engine; remembers the last ticket."""

    def __init__(self, cafile: Path, *, resumes: bool) -> None:
        group = (NamedGroup.X25519,)
        trust = TrustStore.from_pem(cafile.read_bytes())
        self._config = ClientConfig(verify=trust.verify_server, groups=group, key_share_groups=group)
        self._resumes = resumes
        self._session: SessionTicket | None = None
        self.resumed = 0

    def connection(self, address: tuple[str, int], request: bytes) -> bytes:
        handshake = ClientHandshake(
            self._config, NAME, random=os.urandom, now_s=time.time(), session=self._session if self._resumes else None
        )
        with socket.create_connection(address) as sock:
            while not handshake.complete:
                sock.sendall(handshake.data_to_send())
                handshake.receive(sock.recv(65536))
            established = handshake.established
            self.resumed += established.resumed
            records = UserRecords(sock, established)
            # Finished and request leave together, as they do from OpenSSL.
            sock.sendall(handshake.data_to_send())
            records.send(ContentType.APPLICATION_DATA, request)
            data, state = b"", ControlState()
            while received := records.receive():
                content_type, content = received
                if content_type == ContentType.APPLICATION_DATA:
                    data += content
                elif content_type == ContentType.ALERT:
                    break
                else:
                    secrets = ConnectionSecrets(
                        established.cipher_suite, records.tx_secret, records.rx_secret, established.resumption_secret
                    )
                    reaction = handle_control_record(
                        Role.CLIENT, content_type, content, secrets, state=state, now_s=time.time()
                    )
                    self._session = reaction.tickets[-1] if reaction.tickets else self._session
            records.send(ContentType.ALERT, CLOSE_NOTIFY)
        return data


class SslClient:
    """The same with Python's ssl."""

    def __init__(self, cafile: Path, *, resumes: bool) -> None:
        self._context = ssl.create_default_context(cafile=str(cafile))
        self._context.minimum_version = ssl.TLSVersion.TLSv1_3
        self._resumes = resumes
        self._session: ssl.SSLSession | None = None
        self.resumed = 0

    def connection(self, address: tuple[str, int], request: bytes) -> bytes:
        session = self._session if self._resumes else None
        with (
            socket.create_connection(address) as sock,
            self._context.wrap_socket(sock, server_hostname=NAME, session=session) as tls,
        ):
            self.resumed += bool(tls.session_reused)
            tls.sendall(request)
            data = b""
            while piece := tls.recv(65536):
                data += piece
            self._session = tls.session
        return data


def main(arguments: list[str]) -> None:
    kind, mode, host, port, cafile, seconds, path = arguments
    key_schedule.use_hmac(hmac_digest)
    gc.set_threshold(*GC_THRESHOLD)
    make: Callable[..., KdaemonClient | SslClient] = {"kdaemon": KdaemonClient, "ssl": SslClient}[kind]
    client = make(Path(cafile), resumes=mode == "resumed")
    address = (host, int(port))
    request = f"GET /{path} HTTP/1.1\r\nHost: {NAME}\r\nConnection: close\r\n\r\n".encode()
    client.connection(address, request)  # imports what is imported late, and brings the first ticket
    connections, client.resumed = 0, 0
    before, end = time.process_time(), time.monotonic() + float(seconds)
    while time.monotonic() < end:
        data = client.connection(address, request)
        if not data.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"not a response: {data[:100]!r}")
        connections += 1
    used = time.process_time() - before
    if client.resumed != (connections if mode == "resumed" else 0):
        raise SystemExit(f"{client.resumed} of {connections} connections were resumed")
    print(json.dumps({"connections": connections, "cpu_seconds": used}))


if __name__ == "__main__":
    main(sys.argv[1:])
