"""`kdaemon connect` and servers that break the protocol after the handshake: each is told so by its alert.

And what it owes its own keys.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.daemon import environment
from support.waiting import DEADLINE_S

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pair"))
import tls_pair
from tls_socket import Connection, complete

from kdaemon import connect
from kdaemon.socket_records import UserRecords
from kdaemon.tls.constants import AlertDescription as Alert
from kdaemon.tls.constants import ContentType
from kdaemon.tls.messages import serialize_key_update
from kdaemon.tls.signing import Role

DATA, HANDSHAKE, ALERT = ContentType.APPLICATION_DATA, ContentType.HANDSHAKE, ContentType.ALERT
Answer = Callable[[Any], bytes]  # from a record writer


def sealed(inner: bytes) -> Answer:
    """A record with this inside, however wrong."""

    def answer(writer: Any) -> bytes:
        header = b"\x17\x03\x03" + (len(inner) + 16).to_bytes(2, "big")
        return header + bytes(writer._aead.encrypt(writer._iv.to_bytes(12, "big"), inner, header))

    return answer


KEY_UPDATE = serialize_key_update(False)
ANSWERS: dict[str, tuple[Answer, int]] = {
    "too long": (lambda writer: b"\x17\x03\x03\x41\x01", Alert.RECORD_OVERFLOW),
    "too long inside": (sealed(bytes(16385) + b"\x17"), Alert.RECORD_OVERFLOW),
    "does not decrypt": (lambda writer: b"\x17\x03\x03\x00\x20" + bytes(32), Alert.BAD_RECORD_MAC),
    "too short": (lambda writer: b"\x17\x03\x03\x00\x05" + bytes(5), Alert.BAD_RECORD_MAC),
    "nothing inside": (sealed(b""), Alert.UNEXPECTED_MESSAGE),
    "padding only": (sealed(bytes(20)), Alert.UNEXPECTED_MESSAGE),
    "heartbeat": (sealed(b"x\x18"), Alert.UNEXPECTED_MESSAGE),
    "change_cipher_spec": (lambda writer: b"\x14\x03\x03\x00\x01\x01", Alert.UNEXPECTED_MESSAGE),
    "alert in the clear": (lambda writer: b"\x15\x03\x03\x00\x02\x02\x28", Alert.UNEXPECTED_MESSAGE),
    "CertificateRequest": (lambda writer: writer.write(HANDSHAKE, b"\x0d\0\0\3\0\0\0"), Alert.UNEXPECTED_MESSAGE),
    "HelloRequest": (lambda writer: writer.write(HANDSHAKE, b"\0\0\0\0"), Alert.UNEXPECTED_MESSAGE),
    "KeyUpdate 2": (lambda writer: writer.write(HANDSHAKE, b"\x18\0\0\1\2"), Alert.ILLEGAL_PARAMETER),
    "message behind KeyUpdate": (lambda writer: writer.write(HANDSHAKE, KEY_UPDATE * 2), Alert.UNEXPECTED_MESSAGE),
    "ticket too long": (lambda writer: writer.write(HANDSHAKE, b"\x04\xff\0\0"), Alert.DECODE_ERROR),
    "half an alert": (lambda writer: writer.write(ALERT, b"\1"), Alert.DECODE_ERROR),
    "data between fragments": (
        lambda writer: writer.write(HANDSHAKE, KEY_UPDATE[:2]) + writer.write(DATA, b"x"),
        Alert.UNEXPECTED_MESSAGE,
    ),
    "empty records": (lambda writer: b"".join(writer.write(DATA, b"") for _ in range(200)), Alert.UNEXPECTED_MESSAGE),
    "warnings": (lambda writer: b"".join(writer.write(ALERT, b"\1\x5a") for _ in range(200)), Alert.UNEXPECTED_MESSAGE),
}


@pytest.mark.parametrize("what", ANSWERS)
def test_a_server_that_breaks_the_protocol(what: str, tmp_path: Path) -> None:
    answer, alert = ANSWERS[what]
    told: list[object] = []

    def serve() -> None:
        sock, _ = listener.accept()
        with sock:
            sock.settimeout(DEADLINE_S)
            server = tls_pair.make_server(tls_pair.server_config())
            complete(server, sock, tls_pair.server_identity())
            connection = Connection(server, sock, Role.SERVER)
            sock.sendall(answer(connection.tx.writer))
            reader = connection.rx.reader
            while len(reader._buffer) < 5 + 2 + 1 + 16:
                data = sock.recv(65536)
                if not data:
                    break
                reader.feed(data)
            told.append(reader.open_one() if reader._buffer else None)

    ca = tmp_path / "ca.pem"
    ca.write_text(tls_pair.authority().issuer_pem)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(DEADLINE_S)
        thread = threading.Thread(target=serve)
        thread.start()
        target = f"127.0.0.1:{listener.getsockname()[1]}"
        # Standard input stays open: nothing but the server's breach ends the connection.
        with subprocess.Popen(
            [sys.executable, "-m", "kdaemon", "connect", target, "--cafile", str(ca), "--ktls", "off"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment("connect", tmp_path),
        ) as client:  # fmt: skip
            assert client.stdout is not None and client.stderr is not None
            status = client.wait(DEADLINE_S)
            output, complaint = client.stdout.read(), client.stderr.read()
        thread.join(DEADLINE_S)
    assert told == [(ALERT, bytes((2, alert)))]
    assert status == 1
    assert output == b""
    assert len(complaint.splitlines()) == 1


def test_a_record_that_is_too_long_in_the_handshake_is_refused_at_its_header(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(DEADLINE_S)
        command = [sys.executable, "-m", "kdaemon", "connect", f"127.0.0.1:{listener.getsockname()[1]}", "--insecure"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment("connect", tmp_path)
        ) as client:
            sock, _ = listener.accept()
            with sock:
                sock.settimeout(DEADLINE_S)
                hello = sock.recv(65536)
                while len(hello) < 5 + int.from_bytes(hello[3:5], "big"):
                    hello += sock.recv(65536)
                sock.sendall(b"\x16\x03\x03\xff\xff")
                assert sock.recv(65536) == b"\x15\x03\x03\x00\x02\x02\x16"
            assert client.wait(DEADLINE_S) == 1


def test_our_own_key_update_before_the_limit_of_the_key() -> None:
    server, client = tls_pair.make_server(tls_pair.server_config()), tls_pair.make_client(tls_pair.client_config())
    tls_pair.run(client, server)
    established = client.established
    limit = established.suite.record_count_max
    established.tx.sequence = server.established.rx.sequence = limit - 3
    ours, theirs = socket.socketpair()
    with ours, theirs:
        records = UserRecords(ours, established)
        connection = Connection(server, theirs, Role.SERVER)
        connection.rx.reader.sequence = limit - 3
        for data in (b"one", b"two", b"three"):
            connect._update_before_limit(records, established)
            records.send(DATA, data)
        assert [connection.read() for _ in range(3)] == [b"one", b"two", b"three"]
        assert connection.key_updates == 1
        assert records.tx_records == 1
