"""Test material for the TLS engine: keys, certificates, and loops that let two ends talk in memory."""

import datetime
import ipaddress
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.x509.oid import NameOID

from kdaemon.tls import signing
from kdaemon.tls.configuration import Credential, ServerConfig
from kdaemon.tls.handshake import Handshake
from kdaemon.tls.server import ServerHandshake
from kdaemon.tls.tickets import TicketKey, TicketKeys

KEY_KINDS = ("p256", "p384", "ed25519", "rsa")


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
        .add_extension(x509.KeyUsage(not is_ca, False, False, False, False, is_ca, is_ca, False, False), critical=True)
    )
    if alternatives:
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    if usage is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    hash_ = None if isinstance(signer, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    certificate = builder.sign(signer, hash_)
    return Identity(key, certificate, issuer.certificate if issuer else certificate)


@cache
def authority() -> Identity:
    """The test CA."""
    return issue("kdaemon test CA", make_key("p256"), is_ca=True)


@cache
def server_identity(kind: str = "p256") -> Identity:
    """A certificate for localhost, 127.0.0.1 and ::1 with a key of a kind."""
    return issue("localhost", make_key(kind), authority(), names=("localhost", "127.0.0.1", "::1"))


def ticket_keys() -> TicketKeys:
    """Fresh keys for tickets."""
    return TicketKeys([TicketKey(os.urandom(16), os.urandom(32))])


def server_config(kind: str = "p256", **options: object) -> ServerConfig:
    """A configuration with one certificate for all names."""
    credential = server_identity(kind).credential()
    return ServerConfig(credentials=lambda name, algorithms: credential, **options)


def make_server(config: ServerConfig, *, now_s: float | None = None) -> ServerHandshake:
    """A server's handshake with real randomness."""
    return ServerHandshake(config, random=os.urandom, now_s=time.time() if now_s is None else now_s)


def sign_if_asked(handshake: Handshake, identity: Identity) -> None:
    """Answers a sign request with the identity's key."""
    request = handshake.sign_request
    if request is not None:
        handshake.signature_ready(signing.sign(identity.key, request.scheme, request.role, request.transcript_hash))


Feed = Callable[[Handshake, bytes], None]


def feed_whole(handshake: Handshake, data: bytes) -> None:
    """Everything at once."""
    handshake.receive(data)


def feed_bytes(handshake: Handshake, data: bytes) -> None:
    """Byte at a time."""
    for index in range(len(data)):
        handshake.receive(data[index : index + 1])
