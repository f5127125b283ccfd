"""What the owner of an engine decides: credentials, preferences, policies. Shared by all connections of a worker, never
changed by one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kdaemon.tls.constants import RECORD_SIZE_LIMIT_MAX, CipherSuite, NamedGroup
from kdaemon.tls.extensions import serialize_certificate_status
from kdaemon.tls.handshake import KeyLog
from kdaemon.tls.key_exchange import SUPPORTED_GROUPS, KeyShareFactory, generate_key_share
from kdaemon.tls.key_schedule import HashParameters
from kdaemon.tls.messages import Certificate, CertificateEntry, serialize_certificate
from kdaemon.tls.signing import HANDSHAKE_SCHEMES, PeerSchemes
from kdaemon.tls.tickets import TicketKeys

#: Judges a peer's chain, end entity first, at a time in seconds since the epoch. Raises a TlsFault that names what is
#: wrong.
ChainVerifier = Callable[[Sequence[bytes], float], None]

DEFAULT_CIPHER_SUITES = (
    CipherSuite.TLS_AES_128_GCM_SHA256,
    CipherSuite.TLS_AES_256_GCM_SHA384,
    CipherSuite.TLS_CHACHA20_POLY1305_SHA256,
)


class Credential:
    """A certificate chain and the name under which the key holder knows its key.

    ``chain_der``: end entity first. ``schemes``: what the key can sign with, best first (signing.schemes_of_key).
    ``ocsp``: a DER OCSP response to staple, or None. Immutable: make a new one when the response changes.
    """

    __slots__ = ("_messages", "chain_der", "key_id", "ocsp", "schemes")

    def __init__(
        self, key_id: str, chain_der: Sequence[bytes], schemes: Sequence[int], ocsp: bytes | None = None
    ) -> None:
        if not chain_der or not schemes:
            raise ValueError("a credential needs a certificate and a signature scheme")
        self.key_id = key_id
        self.chain_der = tuple(chain_der)
        self.schemes = tuple(schemes)
        self.ocsp = ocsp
        # The Certificate message is the same for all connections: made once, without and with the stapled response.
        self._messages = (self._serialize(False), self._serialize(ocsp is not None))

    def certificate_message(self, with_status: bool) -> bytes:
        """The Certificate message of a handshake (empty request context)."""
        return self._messages[with_status]

    def _serialize(self, with_status: bool) -> bytes:
        status = {5: serialize_certificate_status(self.ocsp)} if with_status and self.ocsp is not None else {}
        entries = [CertificateEntry(der, status if index == 0 else {}) for index, der in enumerate(self.chain_der)]
        return serialize_certificate(Certificate(b"", tuple(entries)))


@dataclass(frozen=True, slots=True)
class ExternalPsk:
    """A pre-shared key from outside TLS (RFC 8446 §4.2.11); its hash decides which suites it can be used with."""

    identity: bytes
    key: bytes
    hash: HashParameters

    def __repr__(self) -> str:
        return f"ExternalPsk(identity={self.identity!r}, hash={self.hash.name})"


@dataclass(frozen=True, slots=True)
class ClientAuthentication:
    """Ask clients for a certificate.

    ``authorities``: DER distinguished names to hint at. ``context`` stands for what ``verify`` trusts: a session made
    under another one is not resumed (RFC 8446 §4.6.1 leaves what a ticket proves to the server).
    """

    verify: ChainVerifier
    required: bool = True
    authorities: tuple[bytes, ...] = ()
    context: bytes = b""


def _no_client_auth(_server_name: str | None) -> ClientAuthentication | None:
    return None


@dataclass(slots=True, kw_only=True)
class ServerConfig:
    """A server's decisions.

    ``credentials(server_name, schemes)`` gives the credential for a name (None: the client sent none), or None, or
    raises UnrecognizedName. ``client_auth(server_name)`` says whether clients are asked for a certificate.
    ``ticket_keys`` None: no tickets, no resumption; assign a new object to rotate.
    ``psk_required`` refuses clients that bring no known PSK. ``record_size_limit`` is what this side takes (64..16385);
    None leaves RFC 8449 unnegotiated: needed where whoever sends on the connection cannot honour
    ``Established.record_size_max``.
    """

    credentials: Callable[[str | None, PeerSchemes], Credential | None] | None = None
    cipher_suites: tuple[int, ...] = DEFAULT_CIPHER_SUITES
    groups: tuple[int, ...] = SUPPORTED_GROUPS
    alpn: tuple[bytes, ...] = ()
    ticket_keys: TicketKeys | None = None
    ticket_count: int = 1
    ticket_lifetime_s: int = 86_400
    external_psk: Callable[[bytes], ExternalPsk | None] | None = None
    psk_required: bool = False
    client_auth: Callable[[str | None], ClientAuthentication | None] = _no_client_auth
    record_size_limit: int | None = RECORD_SIZE_LIMIT_MAX
    advertise_groups: tuple[int, ...] = ()
    key_log: KeyLog | None = None
    generate_key_share: KeyShareFactory = generate_key_share


class CredentialRequest(NamedTuple):
    """What a server that asks for a client certificate accepts.

    ``oid_filters``: values that certificate extensions must have, by OID, both DER (RFC 8446 §4.2.5).
    """

    signature_algorithms: tuple[int, ...]
    authorities: tuple[bytes, ...]
    oid_filters: dict[bytes, bytes]


@dataclass(slots=True, kw_only=True)
class ClientConfig:
    """A client's decisions.

    ``verify(chain_der, server_name, now_s)`` judges the server's chain (``TrustStore.verify_server``) and raises a
    TlsFault; None accepts any certificate, which is for tests and explicit wishes only. ``key_share_groups``: the
    groups of the first ClientHello's shares; a hybrid brings its X25519 half along. ``credential`` chooses a client
    certificate, or None for an empty Certificate. ``record_size_limit`` as in :class:`ServerConfig`.
    """

    verify: Callable[[Sequence[bytes], str, float], None] | None
    cipher_suites: tuple[int, ...] = DEFAULT_CIPHER_SUITES
    groups: tuple[int, ...] = SUPPORTED_GROUPS
    key_share_groups: tuple[int, ...] = (NamedGroup.X25519MLKEM768,)
    signature_schemes: tuple[int, ...] = HANDSHAKE_SCHEMES
    alpn: tuple[bytes, ...] = ()
    credential: Callable[[CredentialRequest], Credential | None] | None = None
    request_ocsp: bool = True
    record_size_limit: int | None = RECORD_SIZE_LIMIT_MAX
    compatibility_mode: bool = True
    grease: bool = True
    key_log: KeyLog | None = None
    generate_key_share: KeyShareFactory = generate_key_share
