"""Extension bodies (RFC 8446 §4.2): ``parse_x`` takes the whole extension_data and leaves nothing unread,
``serialize_x`` makes it.

An extension's data is ``bytes`` without its type and length. Blocks of extensions are dictionaries in order of
appearance.
"""

from struct import Struct
from typing import Final, NamedTuple

from kdaemon.tls.codec import (
    Reader,
    parse_uint16_list,
    serialize_uint16_list,
    vector8,
    vector16,
)
from kdaemon.tls.constants import (
    NAME_TYPE_HOST_NAME,
    RECORD_SIZE_LIMIT_MAX,
    RECORD_SIZE_LIMIT_MIN,
    STATUS_TYPE_OCSP,
    ExtensionType,
)
from kdaemon.tls.errors import BadCertificateStatus, DuplicateExtension, IllegalParameter, MalformedMessage

Extensions = dict[int, bytes]

_HEADER: Final = Struct(">HH")  # type, length

_HOST_NAME_CHARACTERS: Final = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._*"


def parse_extensions(reader: Reader, name: str) -> Extensions:
    """An extension block with its length in front; its order is kept, duplicates are refused."""
    block = reader.vector16(name)
    extensions: Extensions = {}
    position, end = 0, len(block)
    while position < end:
        if position + 4 > end:
            raise MalformedMessage(f"{name} ends inside an extension header")
        extension_type, size = _HEADER.unpack_from(block, position)
        start = position + 4
        position = start + size
        if position > end:
            raise MalformedMessage(f"{name} ends inside extension {extension_type}")
        if extension_type in extensions:
            raise DuplicateExtension(f"{name} has extension {extension_type} twice")
        extensions[extension_type] = block[start:position]
    return extensions


def serialize_extensions(extensions: Extensions) -> bytes:
    """The inverse of :func:`parse_extensions`."""
    return vector16(
        b"".join([_HEADER.pack(extension_type, len(data)) + data for extension_type, data in extensions.items()])
    )


def require_empty(data: bytes, name: str) -> None:
    """An extension that is a mere flag."""
    if data:
        raise MalformedMessage(f"{name} is not empty")


def parse_server_name(data: bytes) -> str:
    """The host name a client asks for, in lower case (RFC 6066 §3)."""
    reader = Reader(data)
    names = Reader(reader.vector16("server_name", 1))
    reader.finish("server_name")
    host_name: bytes | None = None
    while names.remaining():
        name_type = names.uint8("server_name")
        name = names.vector16("server_name", 1)
        if name_type != NAME_TYPE_HOST_NAME:
            continue
        if host_name is not None:
            raise IllegalParameter("server_name has two host names")
        host_name = name
    if host_name is None:
        raise IllegalParameter("server_name has no host name")
    if len(host_name) > 255 or host_name.translate(None, _HOST_NAME_CHARACTERS):
        raise IllegalParameter("server_name is no host name")
    return host_name.decode("ascii").lower().rstrip(".")


def serialize_server_name(host_name: str) -> bytes:
    """A list of one host name, ASCII (A-labels)."""
    return vector16(b"\x00" + vector16(host_name.encode("ascii")))


def parse_supported_groups(data: bytes) -> tuple[int, ...]:
    """Groups, best first."""
    return _parse_uint16_vector(data, "supported_groups")


def serialize_supported_groups(groups: tuple[int, ...]) -> bytes:
    """The inverse of :func:`parse_supported_groups`."""
    return vector16(serialize_uint16_list(groups))


def parse_signature_algorithms(data: bytes) -> tuple[int, ...]:
    """Signature schemes, best first; signature_algorithms_cert too."""
    return _parse_uint16_vector(data, "signature_algorithms")


def serialize_signature_algorithms(schemes: tuple[int, ...]) -> bytes:
    """The inverse of :func:`parse_signature_algorithms`."""
    return vector16(serialize_uint16_list(schemes))


def _parse_uint16_vector(data: bytes, name: str) -> tuple[int, ...]:
    if len(data) < 4 or (data[0] << 8 | data[1]) != len(data) - 2:
        raise MalformedMessage(f"{name} has a length that does not fit")
    return parse_uint16_list(data[2:], name)


def parse_supported_versions(data: bytes) -> tuple[int, ...]:
    """The versions in a ClientHello."""
    if len(data) < 3 or data[0] != len(data) - 1:
        raise MalformedMessage("supported_versions has a length that does not fit")
    return parse_uint16_list(data[1:], "supported_versions")


def serialize_supported_versions(versions: tuple[int, ...]) -> bytes:
    """The inverse of :func:`parse_supported_versions`."""
    return vector8(serialize_uint16_list(versions))


def parse_application_protocols(data: bytes) -> tuple[bytes, ...]:
    """ALPN names (RFC 7301 §3.1)."""
    reader = Reader(data)
    names = Reader(reader.vector16("application_layer_protocol_negotiation", 2))
    reader.finish("application_layer_protocol_negotiation")
    protocols = []
    while names.remaining():
        protocols.append(names.vector8("application_layer_protocol_negotiation", 1))
    return tuple(protocols)


def serialize_application_protocols(protocols: tuple[bytes, ...]) -> bytes:
    """The inverse of :func:`parse_application_protocols`."""
    return vector16(b"".join([vector8(protocol) for protocol in protocols]))


def parse_key_shares(data: bytes) -> dict[int, bytes]:
    """The shares in a ClientHello by group, in order; none is legal and asks for a HelloRetryRequest."""
    if len(data) < 2 or (data[0] << 8 | data[1]) != len(data) - 2:
        raise MalformedMessage("key_share has a length that does not fit")
    entries = Reader(data, 2)
    shares: dict[int, bytes] = {}
    while entries.remaining():
        group = entries.uint16("key_share")
        share = entries.vector16("key_share", 1)
        if group in shares:
            raise IllegalParameter("key_share has two shares for one group")  # RFC 8446 §4.2.8
        shares[group] = share
    return shares


def serialize_key_shares(shares: dict[int, bytes]) -> bytes:
    """The inverse of :func:`parse_key_shares`."""
    return vector16(b"".join([serialize_key_share_entry(group, share) for group, share in shares.items()]))


def parse_key_share_entry(data: bytes) -> tuple[int, bytes]:
    """The one share in a ServerHello: (group, share)."""
    reader = Reader(data)
    entry = reader.uint16("key_share"), reader.vector16("key_share", 1)
    reader.finish("key_share")
    return entry


def serialize_key_share_entry(group: int, share: bytes) -> bytes:
    """The inverse of :func:`parse_key_share_entry`."""
    return _HEADER.pack(group, len(share)) + share


def parse_uint16(data: bytes, name: str) -> int:
    """A bare number: the version of a ServerHello, the group of a HelloRetryRequest."""
    if len(data) != 2:
        raise MalformedMessage(f"{name} has a length that does not fit")
    return data[0] << 8 | data[1]


def parse_cookie(data: bytes) -> bytes:
    """The cookie, opaque."""
    reader = Reader(data)
    cookie = reader.vector16("cookie", 1)
    reader.finish("cookie")
    return cookie


def serialize_cookie(cookie: bytes) -> bytes:
    """The inverse of :func:`parse_cookie`."""
    return vector16(cookie)


def parse_psk_key_exchange_modes(data: bytes) -> bytes:
    """The modes, one byte each."""
    reader = Reader(data)
    modes = reader.vector8("psk_key_exchange_modes", 1)
    reader.finish("psk_key_exchange_modes")
    return modes


def serialize_psk_key_exchange_modes(modes: bytes) -> bytes:
    """The inverse of :func:`parse_psk_key_exchange_modes`."""
    return vector8(modes)


def parse_record_size_limit(data: bytes) -> int:
    """The largest content, type included, that the peer takes (RFC 8449 §4).

    More than the protocol allows means its maximum.
    """
    limit = parse_uint16(data, "record_size_limit")
    if limit < RECORD_SIZE_LIMIT_MIN:
        raise IllegalParameter(f"record_size_limit is {limit}")
    return min(limit, RECORD_SIZE_LIMIT_MAX)


def serialize_record_size_limit(limit: int) -> bytes:
    """The inverse of :func:`parse_record_size_limit`."""
    return limit.to_bytes(2, "big")


def parse_status_request(data: bytes) -> bool:
    """Whether the client wants a stapled OCSP response (RFC 6066 §8)."""
    reader = Reader(data)
    if reader.uint8("status_request") != STATUS_TYPE_OCSP:
        return False
    reader.vector16("status_request")
    reader.vector16("status_request")
    reader.finish("status_request")
    return True


STATUS_REQUEST_OCSP: Final = b"\x01\x00\x00\x00\x00"


def parse_certificate_status(data: bytes) -> bytes:
    """The OCSP response, DER, in a certificate entry (RFC 8446 §4.4.2.1)."""
    if len(data) < 5 or data[0] != STATUS_TYPE_OCSP or int.from_bytes(data[1:4], "big") != len(data) - 4:
        raise BadCertificateStatus("the stapled certificate status is malformed")
    return data[4:]


def serialize_certificate_status(response: bytes) -> bytes:
    """The inverse of :func:`parse_certificate_status`."""
    return b"\x01" + len(response).to_bytes(3, "big") + response


def parse_certificate_authorities(data: bytes) -> tuple[bytes, ...]:
    """Distinguished names, DER (RFC 8446 §4.2.4)."""
    reader = Reader(data)
    entries = Reader(reader.vector16("certificate_authorities", 3))
    reader.finish("certificate_authorities")
    names = []
    while entries.remaining():
        names.append(entries.vector16("certificate_authorities", 1))
    return tuple(names)


def serialize_certificate_authorities(names: tuple[bytes, ...]) -> bytes:
    """The inverse of :func:`parse_certificate_authorities`."""
    return vector16(b"".join([vector16(name) for name in names]))


def parse_oid_filters(data: bytes) -> dict[bytes, bytes]:
    """Wanted values of certificate extensions by OID, both DER (RFC 8446 §4.2.5); an OID may be there once only."""
    reader = Reader(data)
    entries = Reader(reader.vector16("oid_filters"))
    reader.finish("oid_filters")
    filters: dict[bytes, bytes] = {}
    while entries.remaining():
        oid = entries.vector8("oid_filters", 1)
        values = entries.vector16("oid_filters")
        if oid in filters:
            raise IllegalParameter("oid_filters has an OID twice")
        filters[oid] = values
    return filters


def serialize_oid_filters(filters: dict[bytes, bytes]) -> bytes:
    """The inverse of :func:`parse_oid_filters`."""
    return vector16(b"".join([vector8(oid) + vector16(values) for oid, values in filters.items()]))


class PskIdentity(NamedTuple):
    """One offered PSK (RFC 8446 §4.2.11)."""

    identity: bytes
    obfuscated_ticket_age: int


class OfferedPsks(NamedTuple):
    """pre_shared_key of a ClientHello; ``binders_size`` is the size of the binder list, its length field included."""

    identities: tuple[PskIdentity, ...]
    binders: tuple[bytes, ...]
    binders_size: int


def parse_offered_psks(data: bytes) -> OfferedPsks:
    """pre_shared_key of a ClientHello."""
    reader = Reader(data)
    entries = Reader(reader.vector16("pre_shared_key", 7))
    binders_start = reader.position()
    binder_entries = Reader(reader.vector16("pre_shared_key", 33))
    reader.finish("pre_shared_key")
    identities = []
    while entries.remaining():
        identity = entries.vector16("pre_shared_key", 1)
        identities.append(PskIdentity(identity, entries.uint32("pre_shared_key")))
    binders = []
    while binder_entries.remaining():
        binders.append(binder_entries.vector8("pre_shared_key", 32))
    if len(identities) != len(binders):
        raise IllegalParameter("pre_shared_key has another number of binders than of identities")
    return OfferedPsks(tuple(identities), tuple(binders), len(data) - binders_start)


def serialize_offered_psks(identities: tuple[PskIdentity, ...], binders: tuple[bytes, ...]) -> bytes:
    """The inverse of :func:`parse_offered_psks`."""
    return vector16(b"".join([vector16(identity) + age.to_bytes(4, "big") for identity, age in identities])) + vector16(
        b"".join([vector8(binder) for binder in binders])
    )


#: Where RFC 8446 §4.2 allows the extensions that this engine recognises, among the messages that answer a request.
ALLOWED_IN_SERVER_HELLO: Final = frozenset(
    (ExtensionType.KEY_SHARE, ExtensionType.PRE_SHARED_KEY, ExtensionType.SUPPORTED_VERSIONS)
)
ALLOWED_IN_HELLO_RETRY_REQUEST: Final = frozenset(
    (ExtensionType.KEY_SHARE, ExtensionType.COOKIE, ExtensionType.SUPPORTED_VERSIONS)
)
ALLOWED_IN_ENCRYPTED_EXTENSIONS: Final = frozenset(
    (
        ExtensionType.SERVER_NAME,
        ExtensionType.SUPPORTED_GROUPS,
        ExtensionType.APPLICATION_LAYER_PROTOCOL_NEGOTIATION,
        ExtensionType.RECORD_SIZE_LIMIT,
        ExtensionType.EARLY_DATA,
    )
)
ALLOWED_IN_CERTIFICATE_REQUEST: Final = frozenset(
    (
        ExtensionType.STATUS_REQUEST,
        ExtensionType.SIGNATURE_ALGORITHMS,
        ExtensionType.CERTIFICATE_AUTHORITIES,
        ExtensionType.OID_FILTERS,
        ExtensionType.SIGNATURE_ALGORITHMS_CERT,
    )
)
