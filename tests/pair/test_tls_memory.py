"""What a worker keeps in Python for a connection: little while its handshake lasts, nothing when it is established.

The bounds are those that docs/tls-engine.md states.
"""

import gc
import tracemalloc
from collections.abc import Callable, Iterator

import pytest
import tls_pair
from kdaemon_pyx import engine as e

from kdaemon.handoff import ConnectionPolicy
from kdaemon.handshake_driver import HandshakeDriver
from kdaemon.tls import signing
from kdaemon.tls.client import ClientHandshake
from kdaemon.tls.configuration import Credential
from kdaemon.tls.constants import NamedGroup
from kdaemon.tls.signing import Role

COUNT = 50
KEY_ID = "ab" * 32
X25519 = {"groups": (NamedGroup.X25519,), "key_share_groups": (NamedGroup.X25519,)}


class FlightRecorder:
    """In the place of the engine and of keymgr: forgets what it is given, but for the last flight and request."""

    def __init__(self) -> None:
        self.sent = b""
        self.transcript_hash = b""
        self.scheme = 0
        self.installed = 0

    def send(self, connection: int, data: bytes) -> None:
        self.sent = data

    def receive(self, connection: int) -> None: ...

    def install(self, connection: int, **keys: object) -> None:
        self.installed += 1

    def request(self, connection: int, key_id: bytes, scheme: int, role: int, transcript_hash: bytes) -> None:
        self.scheme, self.transcript_hash = scheme, transcript_hash


@pytest.fixture
def recorder() -> FlightRecorder:
    return FlightRecorder()


@pytest.fixture
def driver(recorder: FlightRecorder) -> HandshakeDriver:
    identity = tls_pair.server_identity()
    credential = Credential(KEY_ID, [identity.der], signing.schemes_of_key(identity.key))
    config = tls_pair.server_config(ticket_keys=tls_pair.ticket_keys(), alpn=(b"http/1.1",))
    config.credentials = lambda name, algorithms: credential
    driver = HandshakeDriver(recorder, recorder, None)
    driver.configure(config, ConnectionPolicy([]))
    return driver


@pytest.fixture(autouse=True)
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def make_client() -> ClientHandshake:
    return tls_pair.make_client(tls_pair.client_config(alpn=(b"http/1.1",), **X25519))


def kept(action: Callable[[], None]) -> float:
    """Bytes per connection that are allocated after `action` and were not before."""
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    action()
    gc.collect()
    return (tracemalloc.get_traced_memory()[0] - before) / COUNT


def engine_objects() -> list[object]:
    """Everything alive of the classes of kdaemon.tls that the collector knows of."""
    gc.collect()
    return [one for one in gc.get_objects() if str(getattr(type(one), "__module__", "")).startswith("kdaemon.tls")]


def sign(driver: HandshakeDriver, recorder: FlightRecorder, connection: int) -> None:
    key = tls_pair.server_identity().key
    driver.signature(connection, signing.sign(key, recorder.scheme, Role.SERVER, recorder.transcript_hash))


def handshake(driver: HandshakeDriver, recorder: FlightRecorder, connection: int) -> None:
    client = make_client()
    driver.records(connection, client.data_to_send())
    sign(driver, recorder, connection)
    client.receive(recorder.sent)
    driver.records(connection, client.data_to_send())
    client.receive(recorder.sent)
    assert client.complete


def test_an_established_connection_keeps_nothing(driver: HandshakeDriver, recorder: FlightRecorder) -> None:
    def handshakes() -> None:
        for connection in range(COUNT):
            handshake(driver, recorder, connection)

    handshakes()  # what is made once is there
    objects = len(engine_objects())
    # The interpreter's own pools of freed objects go up and down, and threads that other tests left allocate, too; but
    # what each connection kept would be there in every round.
    assert any(kept(handshakes) < 64 for _ in range(10))
    assert len(engine_objects()) == objects
    assert recorder.installed == driver.full >= 2 * COUNT
    assert driver.under_way == 0


def test_a_handshake_that_waits_keeps_little(driver: HandshakeDriver, recorder: FlightRecorder) -> None:
    handshake(driver, recorder, 0)
    clients = [make_client() for _ in range(COUNT)]
    hellos = [client.data_to_send() for client in clients]
    requests: list[tuple[int, bytes]] = []

    def receive_hellos() -> None:
        for connection, hello in enumerate(hellos):
            driver.records(connection, hello)
            requests.append((recorder.scheme, recorder.transcript_hash))

    def answer() -> None:
        for connection, (recorder.scheme, recorder.transcript_hash) in enumerate(requests):
            sign(driver, recorder, connection)

    signature_awaited = kept(receive_hellos)
    finished_awaited = signature_awaited + kept(answer)
    print(f"\n{signature_awaited:.0f} bytes while the signature, {finished_awaited:.0f} while Finished is awaited")
    assert driver.under_way == COUNT
    assert signature_awaited < 8192
    assert finished_awaited < 4096


def test_the_engine_keeps_less_than_a_kilobyte() -> None:
    assert e.CONNECTION_BYTES < 1024
