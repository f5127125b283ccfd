"""The server's choices (RFC 8446 §4.1.1, §4.2, §9.2): pure functions from a ClientHello and a configuration to
decisions.
"""

from functools import lru_cache
from typing import Any, Final

from kdaemon.tls.constants import (
    VERSION_SSL_3_0,
    VERSION_TLS_1_2,
    VERSION_TLS_1_3,
    CipherSuite,
)
from kdaemon.tls.constants import ExtensionType as Extension
from kdaemon.tls.errors import (
    IllegalParameter,
    InappropriateFallback,
    MissingExtension,
    NoCommonApplicationProtocol,
    NoCommonCipherSuite,
    NoCommonGroup,
    NoCommonVersion,
)
from kdaemon.tls.extensions import (
    Extensions,
    OfferedPsks,
    parse_application_protocols,
    parse_certificate_authorities,
    parse_cookie,
    parse_key_shares,
    parse_offered_psks,
    parse_psk_key_exchange_modes,
    parse_record_size_limit,
    parse_server_name,
    parse_signature_algorithms,
    parse_status_request,
    parse_supported_groups,
    parse_supported_versions,
    require_empty,
)
from kdaemon.tls.messages import ClientHello, parse_client_hello


class ClientOffer:
    """A ClientHello, its message, and those of its extensions that the server knows, parsed; None where absent."""

    __slots__ = (
        "application_protocols",
        "certificate_authorities",
        "cookie",
        "early_data",
        "hello",
        "key_shares",
        "message",
        "psk_modes",
        "psks",
        "record_size_limit",
        "server_name",
        "signature_algorithms",
        "signature_algorithms_cert",
        "status_request",
        "supported_groups",
        "supported_versions",
    )

    def __init__(self, hello: ClientHello, message: bytes) -> None:
        self.hello = hello
        self.message = message
        self.server_name: str | None = None
        self.status_request = False
        self.supported_groups: tuple[int, ...] | None = None
        self.signature_algorithms: tuple[int, ...] | None = None
        self.signature_algorithms_cert: tuple[int, ...] | None = None
        self.application_protocols: tuple[bytes, ...] | None = None
        self.record_size_limit: int | None = None
        self.psks: OfferedPsks | None = None
        self.early_data = False
        self.supported_versions: tuple[int, ...] | None = None
        self.cookie: bytes | None = None
        self.psk_modes: bytes | None = None
        self.certificate_authorities: tuple[bytes, ...] | None = None
        self.key_shares: dict[int, bytes] | None = None


def _parse_early_data(data: bytes) -> bool:
    require_empty(data, "early_data")
    return True


#: Clients of one make send most extensions in the same bytes every time: what those mean is remembered. Only short ones
#: and so many of them, so that what hostile clients can make a server keep is bounded.
_REMEMBERED_SIZE_MAX: Final = 64
_remember: Final = lru_cache(maxsize=64)

_recall_supported_versions: Final = _remember(parse_supported_versions)
_PARSERS: Final[dict[int, tuple[str, Any]]] = {
    Extension.STATUS_REQUEST: ("status_request", parse_status_request),
    Extension.RECORD_SIZE_LIMIT: ("record_size_limit", parse_record_size_limit),
    Extension.PRE_SHARED_KEY: ("psks", parse_offered_psks),
    Extension.EARLY_DATA: ("early_data", _parse_early_data),
    Extension.COOKIE: ("cookie", parse_cookie),
    Extension.CERTIFICATE_AUTHORITIES: ("certificate_authorities", parse_certificate_authorities),
    Extension.KEY_SHARE: ("key_shares", parse_key_shares),
}
_PARSERS_OF_PREFERENCES: Final[dict[int, tuple[str, Any]]] = {
    Extension.SERVER_NAME: ("server_name", parse_server_name),
    Extension.SUPPORTED_GROUPS: ("supported_groups", parse_supported_groups),
    Extension.SIGNATURE_ALGORITHMS: ("signature_algorithms", parse_signature_algorithms),
    Extension.SIGNATURE_ALGORITHMS_CERT: ("signature_algorithms_cert", parse_signature_algorithms),
    Extension.APPLICATION_LAYER_PROTOCOL_NEGOTIATION: ("application_protocols", parse_application_protocols),
    Extension.PSK_KEY_EXCHANGE_MODES: ("psk_modes", parse_psk_key_exchange_modes),
}
#: By extension: the attribute of the offer, what parses it, and what parses it if it is short.
_KNOWN: Final[dict[int, tuple[str, Any, Any]]] = {
    **{code: (name, parse, parse) for code, (name, parse) in _PARSERS.items()},
    **{code: (name, parse, _remember(parse)) for code, (name, parse) in _PARSERS_OF_PREFERENCES.items()},
}


def check_version(hello: ClientHello) -> None:
    """TLS 1.3 must be offered in supported_versions, behind the legacy_version of TLS 1.2 (RFC 9846 §4.2.2, §4.3.1)."""
    if hello.legacy_version <= VERSION_SSL_3_0:
        raise NoCommonVersion("the client speaks SSL")
    versions_data = (hello.extensions or {}).get(Extension.SUPPORTED_VERSIONS)
    if versions_data is not None:
        parse = _recall_supported_versions if len(versions_data) <= _REMEMBERED_SIZE_MAX else parse_supported_versions
        if VERSION_TLS_1_3 in parse(versions_data):
            if hello.legacy_version != VERSION_TLS_1_2:  # RFC 9846 §4.2.2
                raise NoCommonVersion("the client offers TLS 1.3 with a legacy_version other than that of TLS 1.2")
            return
    elif CipherSuite.TLS_FALLBACK_SCSV in hello.cipher_suites and hello.legacy_version <= VERSION_TLS_1_2:
        raise InappropriateFallback("the client fell back to an older version although it speaks newer ones")
    raise NoCommonVersion("the client does not offer TLS 1.3")


def parse_client_offer(message: bytes) -> ClientOffer:
    """Parses and cross-checks a ClientHello (RFC 8446 §4.1.2, §9.2)."""
    hello = parse_client_hello(message)
    check_version(hello)
    if hello.compression_methods != b"\x00":
        raise IllegalParameter("legacy_compression_methods offers compression")
    extensions: Extensions = hello.extensions or {}
    offer = ClientOffer(hello, message)
    for extension_type, data in extensions.items():
        known = _KNOWN.get(extension_type)
        if known is not None:
            name, parse, recall = known
            setattr(offer, name, recall(data) if len(data) <= _REMEMBERED_SIZE_MAX else parse(data))
    if offer.psks is not None:
        if next(reversed(extensions)) != Extension.PRE_SHARED_KEY:
            raise IllegalParameter("pre_shared_key is not the last extension")
        if offer.psk_modes is None:
            raise MissingExtension("pre_shared_key comes without psk_key_exchange_modes")
    elif offer.signature_algorithms is None or offer.supported_groups is None:
        raise MissingExtension("neither a PSK nor both signature_algorithms and supported_groups are offered")
    if (offer.supported_groups is None) != (offer.key_shares is None):
        raise MissingExtension("supported_groups and key_share come one without the other")
    if offer.key_shares and not set(offer.supported_groups or ()).issuperset(offer.key_shares):
        raise IllegalParameter("key_share has a group that supported_groups has not")
    return offer


def choose_cipher_suite(ours: tuple[int, ...], theirs: tuple[int, ...]) -> int:
    """Our first suite that they have; ChaCha20-Poly1305 if that is their first choice."""
    if theirs[0] == CipherSuite.TLS_CHACHA20_POLY1305_SHA256 and theirs[0] in ours:
        return theirs[0]
    for suite in ours:
        if suite in theirs:
            return suite
    raise NoCommonCipherSuite("no cipher suite in common")


def choose_group(ours: tuple[int, ...], offer: ClientOffer) -> tuple[int, bytes | None]:
    """(group, the client's share of it); share None means that a HelloRetryRequest has to ask for one.

    A usable share always wins over a retry.
    """
    shares = offer.key_shares
    if shares is None:
        raise MissingExtension("key_share is absent, and PSK without a key exchange is not accepted")
    for group in ours:
        if group in shares:
            return group, shares[group]
    theirs = offer.supported_groups or ()
    for group in ours:
        if group in theirs:
            return group, None
    raise NoCommonGroup("no key exchange group in common")


def choose_application_protocol(ours: tuple[bytes, ...], theirs: tuple[bytes, ...] | None) -> bytes | None:
    """Our first protocol that they have (RFC 7301 §3.2); None if they offer none or we configured none."""
    if theirs is None or not ours:
        return None
    for protocol in ours:
        if protocol in theirs:
            return protocol
    raise NoCommonApplicationProtocol("no application protocol in common")


def check_second_client_hello(first: ClientHello, offer: ClientOffer, group: int) -> bytes:
    """What RFC 8446 §4.1.2 lets a client change after a HelloRetryRequest, and nothing else.

    Returns its share of ``group``.
    """
    second = offer.hello
    if first[:5] != second[:5]:
        raise IllegalParameter("the second ClientHello differs from the first in a field that may not change")
    if offer.early_data:
        raise IllegalParameter("the second ClientHello offers early data")
    if offer.key_shares is None or list(offer.key_shares) != [group]:
        raise IllegalParameter("the second ClientHello has not exactly the share that was asked for")
    before, after = first.extensions or {}, second.extensions or {}
    if offer.psks is not None and Extension.PRE_SHARED_KEY not in before:
        raise IllegalParameter("the second ClientHello adds a pre-shared key")
    for extension_type in _UNCHANGED_BY_RETRY:
        if before.get(extension_type) != after.get(extension_type):
            raise IllegalParameter(f"the second ClientHello changes extension {extension_type}")
    return offer.key_shares[group]


#: What is not recognised here may change: its rules are not ours to know.
_UNCHANGED_BY_RETRY: Final = (
    Extension.SERVER_NAME,
    Extension.STATUS_REQUEST,
    Extension.SUPPORTED_GROUPS,
    Extension.SIGNATURE_ALGORITHMS,
    Extension.APPLICATION_LAYER_PROTOCOL_NEGOTIATION,
    Extension.RECORD_SIZE_LIMIT,
    Extension.SUPPORTED_VERSIONS,
    Extension.PSK_KEY_EXCHANGE_MODES,
    Extension.CERTIFICATE_AUTHORITIES,
    Extension.SIGNATURE_ALGORITHMS_CERT,
)
