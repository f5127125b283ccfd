"""Test material for the TLS engine: keys, certificates, and loops that let two ends talk in memory."""

import datetime
import ipaddress
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from random import Random

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.x509.oid import NameOID

from kdaemon.tls import signing
from kdaemon.tls.certificates import TrustStore
from kdaemon.tls.client import ClientHandshake
from kdaemon.tls.configuration import ClientAuthentication, ClientConfig, Credential, ServerConfig
from kdaemon.tls.handshake import Handshake, TrafficKeys
from kdaemon.tls.key_schedule import SUITES
from kdaemon.tls.post_handshake import ConnectionSecrets, ControlState, handle_control_record
from kdaemon.tls.record import RecordReader, RecordWriter
from kdaemon.tls.server import ServerHandshake
from kdaemon.tls.session import SessionTicket
from kdaemon.tls.signing import Role
from kdaemon.tls.tickets import TicketKey, TicketKeys

KEY_KINDS = ("p256", "p384", "ed25519", "rsa")


_NO = (False, False, False, False)  # content commitment, key and data encipherment, key agreement


def make_key(kind: str) -> CertificateIssuerPrivateKeyTypes:
    """A fresh private key."""
    if kind == "p256":
        return ec.generate_private_key(ec.SECP256R1())
    if kind == "p384":
        return ec.generate_private_key(ec.SECP384R1())
    if kind == "ed25519":
        return ed25519.Ed25519PrivateKey.generate()
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@dataclass(frozen=True)
class Identity:
    """A key with a certificate (and its issuer, unless it is its own)."""

    key: CertificateIssuerPrivateKeyTypes
    certificate: x509.Certificate
    issuer: x509.Certificate

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.DER)

    @property
    def issuer_pem(self) -> str:
        return self.issuer.public_bytes(serialization.Encoding.PEM).decode()

    def credential(self, **options: object) -> Credential:
        return Credential("key", [self.der], signing.schemes_of_key(self.key), **options)


def issue(
    subject: str,
    key: CertificateIssuerPrivateKeyTypes,
    issuer: Identity | None = None,
    *,
    is_ca: bool = False,
    names: Iterable[str] = (),
    usage: x509.ObjectIdentifier | None = None,
    valid_days: tuple[float, float] = (-1, 30),
    key_usage: x509.KeyUsage | None = None,
    constraints: x509.NameConstraints | None = None,
) -> Identity:
    """Makes a certificate; names that parse as addresses become IP SANs."""
    now = datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    signer = issuer.key if issuer else key
    alternatives: list[x509.GeneralName] = []
    for entry in names:
        try:
            alternatives.append(x509.IPAddress(ipaddress.ip_address(entry)))
        except ValueError:
            alternatives.append(x509.DNSName(entry))
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer.certificate.subject if issuer else name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=valid_days[0]))
        .not_valid_after(now + datetime.timedelta(days=valid_days[1]))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .add_extension(key_usage or x509.KeyUsage(not is_ca, *_NO, is_ca, is_ca, False, False), critical=True)
    )
    if alternatives:
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    if usage is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    if constraints is not None:
        builder = builder.add_extension(constraints, critical=True)
    hash_ = None if isinstance(signer, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    certificate = builder.sign(signer, hash_)
    return Identity(key, certificate, issuer.certificate if issuer else certificate)


@cache
def authority() -> Identity:
    """The test CA."""
    return issue("kdaemon test CA", make_key("p256"), is_ca=True)


def server_identity(kind: str = "p256") -> Identity:
    """A certificate for localhost, 127.0.0.1 and ::1 with a key of a kind."""
    return _server_identity(kind)


@cache
def _server_identity(kind: str) -> Identity:
    return issue("localhost", make_key(kind), authority(), names=("localhost", "127.0.0.1", "::1"))


def ticket_keys() -> TicketKeys:
    """Fresh keys for tickets."""
    return TicketKeys([TicketKey(os.urandom(16), os.urandom(32))])


def server_config(kind: str = "p256", **options: object) -> ServerConfig:
    """A configuration with one certificate, and one rule for those of clients, for all names."""
    credential = server_identity(kind).credential()
    if isinstance(auth := options.get("client_auth"), ClientAuthentication):
        options["client_auth"] = lambda name: auth
    return ServerConfig(credentials=lambda name, algorithms: credential, **options)


def make_server(config: ServerConfig, *, now_s: float | None = None) -> ServerHandshake:
    """A server's handshake with real randomness."""
    return ServerHandshake(config, random=os.urandom, now_s=time.time() if now_s is None else now_s)


def sign_if_asked(handshake: Handshake, identity: Identity) -> None:
    """Answers a sign request with the identity's key."""
    request = handshake.sign_request
    if request is not None:
        handshake.signature_ready(signing.sign(identity.key, request.scheme, request.role, request.transcript_hash))


def client_config(**options: object) -> ClientConfig:
    """A configuration that trusts the test CA."""
    options.setdefault("verify", trust().verify_server)
    return ClientConfig(**options)


@cache
def trust() -> TrustStore:
    """A store with the test CA."""
    return TrustStore([authority().certificate])


def make_client(config: ClientConfig, name: str = "localhost", **options: object) -> ClientHandshake:
    """A client's handshake with real randomness."""
    options.setdefault("now_s", time.time())
    return ClientHandshake(config, name, random=os.urandom, **options)


Feed = Callable[[Handshake, bytes], None]


def feed_whole(handshake: Handshake, data: bytes) -> None:
    """Everything at once."""
    handshake.receive(data)


def feed_randomly(handshake: Handshake, data: bytes) -> None:
    """In pieces of random size; the seed is the data's own length, so that failures repeat."""
    random = Random(len(data))
    position = 0
    while position < len(data):
        size = random.randint(1, 400)
        handshake.receive(data[position : position + size])
        position += size


def feed_bytes(handshake: Handshake, data: bytes) -> None:
    """Byte at a time."""
    for index in range(len(data)):
        handshake.receive(data[index : index + 1])


def run(
    client: ClientHandshake,
    server: ServerHandshake,
    *,
    identity: Identity | None = None,
    client_identity: Identity | None = None,
    feed: Feed = feed_whole,
) -> None:
    """Lets the two talk until neither has anything to say. Raises what they raise."""
    identity = identity or server_identity()
    while True:
        to_server = client.data_to_send()
        if to_server:
            feed(server, to_server)
        sign_if_asked(server, identity)
        to_client = server.data_to_send()
        if to_client:
            feed(client, to_client)
        if client_identity is not None:
            sign_if_asked(client, client_identity)
        if not to_server and not to_client:
            return


class Direction:
    """One direction of an established connection, as the record layer would run it."""

    def __init__(self, suite_code: int, keys: TrafficKeys) -> None:
        suite = SUITES[suite_code]
        self.writer, self.reader = RecordWriter(), ApplicationReader()
        self.writer.set_key(suite, keys.key, keys.iv)
        self.reader.set_key(suite, keys.key, keys.iv)
        self.writer.sequence = self.reader.sequence = keys.sequence


class ApplicationReader(RecordReader):
    """The handshake's reader, which refuses application data, made to give the inner content of any record."""

    def open_one(self) -> tuple[int, bytes]:
        size = int.from_bytes(self._buffer[3:5], "big")
        record = bytes(self._buffer[: 5 + size])
        del self._buffer[: 5 + size]
        nonce = (self._iv ^ self.sequence).to_bytes(12, "big")
        self.sequence += 1
        inner = self._aead.decrypt(nonce, record[5:], record[:5]).rstrip(b"\x00")
        return inner[-1], inner[:-1]


def assert_agree(client: ClientHandshake, server: ServerHandshake) -> None:
    """Both ends have the same result, and the same keys crosswise."""
    ours, theirs = client.established, server.established
    assert ours.cipher_suite == theirs.cipher_suite
    for mine, its in ((ours.tx, theirs.rx), (ours.rx, theirs.tx)):
        assert (mine.key, mine.iv, mine.secret) == (its.key, its.iv, its.secret)
    assert ours.exporter_secret == theirs.exporter_secret
    assert ours.export(b"EXPORTER-test", b"context", 50) == theirs.export(b"EXPORTER-test", b"context", 50)
    assert ours.alpn == theirs.alpn
    assert ours.group == theirs.group
    assert (ours.resumed, ours.retried) == (theirs.resumed, theirs.retried)


def receive_tickets(client: ClientHandshake, *, now_s: float | None = None) -> list[SessionTicket]:
    """Takes the tickets out of what came behind the server's Finished."""
    established = client.established
    secrets = ConnectionSecrets(
        established.cipher_suite, established.tx.secret, established.rx.secret, established.resumption_secret
    )
    direction = Direction(established.cipher_suite, established.rx)
    direction.reader.feed(established.leftover)
    established.leftover = b""
    tickets: list[SessionTicket] = []
    state = ControlState()
    while direction.reader._buffer:
        content_type, content = direction.reader.open_one()
        reaction = handle_control_record(
            Role.CLIENT, content_type, content, secrets, state=state, now_s=time.time() if now_s is None else now_s
        )
        assert reaction.error is None
        tickets.extend(reaction.tickets)
    return tickets
