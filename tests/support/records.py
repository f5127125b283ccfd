"""A TLS 1.3 peer without a handshake: both sides are given the same keys. For tests of the engine's record layers."""

import os
import select
import socket
import struct
import threading
import time
from dataclasses import dataclass, field

import pytest
from kdaemon_pyx import engine as e
from kdaemon_pyx.echo_service import EchoService
from kdaemon_pyx.engine import Engine
from kdaemon_pyx.record import RecordProtection

HASH_LENGTH = {0x1301: 32, 0x1302: 48, 0x1303: 32}
KEY_LENGTH = {0x1301: 16, 0x1302: 32, 0x1303: 32}


HELLO = b"\x16\x03\x01\x00\x05hello"  # the engine takes any record for a handshake's
LAYERS = [pytest.param("off", id="user"), pytest.param("require", id="kernel", marks=pytest.mark.guest)]
BACKENDS = {"off": ("user", "switched-off"), "require": ("kernel", "available")}
RELEASE = tuple(int(part) for part in os.uname().release.split("-")[0].split("+")[0].split(".")[:2])
REKEY = RELEASE >= (6, 14)
CLOSE_NOTIFY = (21, b"\x01\x00")
AEAD_LIMIT = int(2**24.5)  # records under one AES-GCM key (RFC 8446, section 5.5)


@dataclass
class Keys:
    """One direction."""

    suite: int
    label: int  # makes the keys of two directions or epochs differ

    @property
    def key(self) -> bytes:
        return bytes((self.label + i) & 255 for i in range(KEY_LENGTH[self.suite]))

    @property
    def iv(self) -> bytes:
        return bytes((self.label * 3 + i) & 255 for i in range(12))

    @property
    def secret(self) -> bytes:
        return bytes([self.label]) * HASH_LENGTH[self.suite]


@dataclass
class RecordPeer:
    """The client's end of a connection whose keys are known: seals what it sends, opens what it receives."""

    sock: socket.socket
    suite: int = 0x1301
    tx: RecordProtection = field(init=False)
    rx: RecordProtection = field(init=False)
    buffer: bytes = b""

    def __post_init__(self) -> None:
        self.rekey(tx=Keys(self.suite, 1), rx=Keys(self.suite, 2))

    def rekey(self, tx: Keys | None = None, rx: Keys | None = None) -> None:
        if tx:
            self.tx = RecordProtection(self.suite, tx.key, tx.iv)
        if rx:
            self.rx = RecordProtection(self.suite, rx.key, rx.iv, encrypt=False)

    def send(self, data: bytes, content_type: int = 23) -> None:
        self.sock.sendall(self.seal(data, content_type))

    def seal(self, data: bytes, content_type: int = 23) -> bytes:
        return b"".join(self.tx.seal(content_type, data[i : i + 16384]) for i in range(0, max(len(data), 1), 16384))

    def receive_exactly(self, count: int) -> bytes:
        while len(self.buffer) < count:
            data = self.sock.recv(65536)
            if not data:
                raise EOFError(f"{len(self.buffer)} of {count} bytes before the end of the stream")
            self.buffer += data
        data, self.buffer = self.buffer[:count], self.buffer[count:]
        return data

    def receive_record(self) -> tuple[int, bytes]:
        header = self.receive_exactly(5)
        return self.rx.open(header + self.receive_exactly(struct.unpack("!H", header[3:])[0]))  # type: ignore[no-any-return]

    def receive_data(self, count: int) -> bytes:
        """``count`` bytes of application data; anything else is an error."""
        parts: list[bytes] = []
        while count > 0:
            content_type, data = self.receive_record()
            assert content_type == 23, (content_type, data)
            parts.append(data)
            count -= len(data)
        assert count == 0, "more data than expected"
        return b"".join(parts)

    def receive_to_end(self) -> list[tuple[int, bytes]]:
        """All records up to the end of the stream."""
        records = []
        while True:
            try:
                records.append(self.receive_record())
            except EOFError:
                return records


def install_arguments(suite: int = 0x1301, **more: object) -> dict[str, object]:
    """Keys for Engine.install() that fit a RecordPeer."""
    tx, rx = Keys(suite, 2), Keys(suite, 1)
    return {
        "cipher_suite": suite, "tx_key": tx.key, "tx_iv": tx.iv, "tx_sequence": 0, "tx_secret": tx.secret,
        "rx_key": rx.key, "rx_iv": rx.iv, "rx_sequence": 0, "rx_secret": rx.secret,
        "resumption_secret": bytes([9]) * HASH_LENGTH[suite], **more,
    }  # fmt: skip


class RunningEngine:
    """An engine with its thread and one listening socket; ``stop`` joins it."""

    def __init__(self, **arguments: object) -> None:
        self.engine = Engine(**arguments)  # type: ignore[arg-type]
        self.layer = "off"
        self.error: OSError | None = None
        self.thread = threading.Thread(target=self._run, name="engine")
        self.thread.start()
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.engine.listen(7, self.listening.fileno())
        self.engine.flush()
        self.pending: list[tuple[object, ...]] = []

    def _run(self) -> None:
        try:
            self.engine.run()
        except OSError as error:
            self.error = error

    def event(self, kind: int, conn: int | None = None, timeout_s: float = 10) -> tuple:  # type: ignore[type-arg]
        """The next event of a kind (and connection); others stay for later."""
        deadline = time.monotonic() + timeout_s
        while True:
            for i, event in enumerate(self.pending):
                if event[0] == kind and (conn is None or event[1] == conn):
                    return self.pending.pop(i)
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no event {kind} for {conn} in {timeout_s} s; seen: {self.pending}; {self.error}")
            select.select([self.engine.event_fd()], [], [], left)
            self.pending += self.engine.events()

    def connect(self) -> socket.socket:
        sock = socket.create_connection(self.listening.getsockname(), timeout=10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def stop(self) -> None:
        self.engine.stop()
        self.thread.join(20)
        assert not self.thread.is_alive(), "the engine did not stop"
        self.listening.close()
        assert self.engine.counters()["buffers_in_use"] == 0
        assert self.engine.counters()["connections"] == 0


def start(layer: str, *, pull: bool = False, **arguments: object) -> RunningEngine:
    """An engine with the echo service, push or pull style, and a record layer ("off": user, "require": kernel)."""
    services = {0: EchoService(pull=pull)}
    running = RunningEngine(record_layer=layer, services=services, ktls_rekey=REKEY, **arguments)
    running.layer = layer
    return running


def established(running: RunningEngine, suite: int = 0x1301, **more: object) -> tuple[RecordPeer, int]:
    """A connection with keys, and its peer."""
    sock = running.connect()
    sock.sendall(HELLO)
    conn = running.event(e.EVENT_RECORDS)[1]
    running.engine.install(conn, **install_arguments(suite, **more))
    running.engine.flush()
    assert running.event(e.EVENT_INSTALLED, conn)[2:] == BACKENDS[running.layer]
    return RecordPeer(sock, suite), conn
