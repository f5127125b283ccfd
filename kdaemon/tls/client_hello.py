"""The client's offer (RFC 8446 §4.1.2): what goes into a ClientHello, GREASE (RFC 8701) and PSK binders included."""

import hashlib

from kdaemon.tls.configuration import ClientConfig, ExternalPsk
from kdaemon.tls.constants import (
    VERSION_TLS_1_2,
    VERSION_TLS_1_3,
    NamedGroup,
    PskKeyExchangeMode,
)
from kdaemon.tls.constants import ExtensionType as Extension
from kdaemon.tls.extensions import (
    STATUS_REQUEST_OCSP,
    Extensions,
    PskIdentity,
    serialize_application_protocols,
    serialize_key_shares,
    serialize_offered_psks,
    serialize_psk_key_exchange_modes,
    serialize_record_size_limit,
    serialize_server_name,
    serialize_signature_algorithms,
    serialize_supported_groups,
    serialize_supported_versions,
)
from kdaemon.tls.key_exchange import HybridKeyShare, KeyShare
from kdaemon.tls.key_schedule import SUITES, EarlyStage, HashParameters, finished_verify_data
from kdaemon.tls.messages import ClientHello, serialize_client_hello
from kdaemon.tls.session import SessionTicket
from kdaemon.tls.signing import CERTIFICATE_SCHEMES


class Grease:
    """Values that no peer may understand, chosen once per connection (RFC 8701 §3.1)."""

    __slots__ = ("cipher_suite", "extension", "group", "last_extension", "version")

    def __init__(self, seed: bytes) -> None:
        values = [(byte & 0xF0 | 0x0A) * 0x0101 for byte in seed]
        self.cipher_suite, self.group, self.version, self.extension, self.last_extension = values[:5]
        if self.last_extension == self.extension:
            self.last_extension ^= 0x1010


class ClientPsk:
    """The one PSK that is offered: from a ticket or from outside."""

    __slots__ = ("early_stage", "external", "hash", "identity", "obfuscated_age")

    def __init__(self, source: SessionTicket | ExternalPsk, now_s: float) -> None:
        self.external: ExternalPsk | None = None
        if isinstance(source, ExternalPsk):
            self.external = source
            self.hash: HashParameters = source.hash
            self.early_stage = EarlyStage(source.hash, source.key)
            self.identity = source.identity
            self.obfuscated_age = 0
        else:
            self.hash = SUITES[source.cipher_suite].hash
            self.early_stage = EarlyStage(self.hash, source.psk)
            self.identity = source.ticket
            self.obfuscated_age = source.obfuscated_age(now_s)

    def binder(self, transcript_before: bytes, truncated_hello: bytes) -> bytes:
        """The binder over everything up to the binder list (RFC 8446 §4.2.11.2)."""
        transcript = hashlib.new(self.hash.name, transcript_before)
        transcript.update(truncated_hello)
        binder_key = self.early_stage.binder_key(self.external is not None)
        return finished_verify_data(self.hash, binder_key, transcript.digest())


def offered_shares(
    config: ClientConfig, shares: dict[int, KeyShare], grease: Grease | None, *, selected: bool
) -> dict[int, bytes]:
    """The public halves. A hybrid's X25519 half also stands alone, for servers without the hybrid.

    ``selected``: the server asked for one group; it gets that and nothing else (RFC 8446 §4.1.2).
    """
    if selected:
        return {group: share.public for group, share in shares.items()}
    public = {} if grease is None else {grease.group: b"\x00"}
    for group, share in shares.items():
        public[group] = share.public
        if isinstance(share, HybridKeyShare) and NamedGroup.X25519 in config.groups:
            public[NamedGroup.X25519] = share.classical.public
    return public


def make_extensions(
    config: ClientConfig, host_name: str | None, shares: dict[int, bytes], cookie: bytes | None, grease: Grease | None
) -> Extensions:
    """All extensions but pre_shared_key; ``cookie`` is the extension's data from a HelloRetryRequest."""
    groups = config.groups
    versions: tuple[int, ...] = (VERSION_TLS_1_3,)
    extensions: Extensions = {}
    if grease is not None:
        extensions[grease.extension] = b""
        groups = (grease.group, *groups)
        versions = (grease.version, *versions)
    if host_name is not None:
        extensions[Extension.SERVER_NAME] = serialize_server_name(host_name)
    if config.request_ocsp:
        extensions[Extension.STATUS_REQUEST] = STATUS_REQUEST_OCSP
    extensions[Extension.SUPPORTED_GROUPS] = serialize_supported_groups(groups)
    extensions[Extension.SIGNATURE_ALGORITHMS] = serialize_signature_algorithms(config.signature_schemes)
    extensions[Extension.SIGNATURE_ALGORITHMS_CERT] = serialize_signature_algorithms(CERTIFICATE_SCHEMES)
    if config.alpn:
        extensions[Extension.APPLICATION_LAYER_PROTOCOL_NEGOTIATION] = serialize_application_protocols(config.alpn)
    if config.record_size_limit is not None:
        extensions[Extension.RECORD_SIZE_LIMIT] = serialize_record_size_limit(config.record_size_limit)
    extensions[Extension.SUPPORTED_VERSIONS] = serialize_supported_versions(versions)
    if cookie is not None:
        extensions[Extension.COOKIE] = cookie
    extensions[Extension.PSK_KEY_EXCHANGE_MODES] = serialize_psk_key_exchange_modes(
        bytes((PskKeyExchangeMode.PSK_DHE_KE,))
    )
    extensions[Extension.KEY_SHARE] = serialize_key_shares(shares)
    if grease is not None:
        extensions[grease.last_extension] = b"\x00"
    return extensions


def make_client_hello(
    config: ClientConfig,
    identifiers: tuple[bytes, bytes],
    extensions: Extensions,
    grease: Grease | None,
    *,
    psk: ClientPsk | None,
    transcript_before: bytes,
) -> bytes:
    """The ClientHello message, with the binder in its place if there is a PSK. ``identifiers``: random, session id."""
    random, session_id = identifiers
    suites = config.cipher_suites if grease is None else (grease.cipher_suite, *config.cipher_suites)
    if psk is None:
        return serialize_client_hello(ClientHello(VERSION_TLS_1_2, random, session_id, suites, b"\x00", extensions))
    identities = (PskIdentity(psk.identity, psk.obfuscated_age),)
    placeholder = bytes(psk.hash.size)
    extensions = {**extensions, Extension.PRE_SHARED_KEY: serialize_offered_psks(identities, (placeholder,))}
    message = serialize_client_hello(ClientHello(VERSION_TLS_1_2, random, session_id, suites, b"\x00", extensions))
    binders_size = 2 + 1 + psk.hash.size
    binder = psk.binder(transcript_before, message[:-binders_size])
    return message[: -psk.hash.size] + binder
