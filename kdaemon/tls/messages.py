"""Handshake messages (RFC 8446 §4): ``parse_x`` takes a whole message with its four-byte header, ``serialize_x`` makes
one.

Lengths in headers have been checked before a parser sees the message (handshake.py reassembles them).
"""

from typing import Final, NamedTuple

from kdaemon.tls.codec import (
    Reader,
    parse_uint16_list,
    serialize_uint16_list,
    vector8,
    vector16,
    vector24,
)
from kdaemon.tls.constants import (
    CERTIFICATE_COUNT_MAX,
    CLIENT_HELLO_SIZE_MAX,
    HANDSHAKE_HEADER_SIZE,
    HELLO_RETRY_REQUEST_RANDOM,
    KEY_UPDATE_SIZE,
    RANDOM_SIZE,
    SESSION_ID_SIZE_MAX,
    VERSION_TLS_1_2,
    HandshakeType,
)
from kdaemon.tls.errors import BadCertificate, IllegalParameter, MalformedMessage
from kdaemon.tls.extensions import Extensions, parse_extensions, serialize_extensions

_LEGACY_VERSION: Final = VERSION_TLS_1_2.to_bytes(2, "big")


def serialize_message(message_type: int, body: bytes) -> bytes:
    """A body behind the handshake header."""
    return (message_type << 24 | len(body)).to_bytes(4, "big") + body


class ClientHello(NamedTuple):
    """RFC 8446 §4.1.2. ``extensions`` is None where the block is absent, as old clients may leave it."""

    legacy_version: int
    random: bytes
    session_id: bytes
    cipher_suites: tuple[int, ...]
    compression_methods: bytes
    extensions: Extensions | None


def parse_client_hello(message: bytes) -> ClientHello:
    """A ClientHello of any version from SSL 3.0 on."""
    if len(message) > HANDSHAKE_HEADER_SIZE + CLIENT_HELLO_SIZE_MAX:
        raise MalformedMessage("ClientHello is longer than any can be")
    reader = Reader(message, HANDSHAKE_HEADER_SIZE)
    legacy_version = reader.uint16("legacy_version")
    random = reader.opaque(RANDOM_SIZE, "random")
    session_id = reader.vector8("legacy_session_id", 0, SESSION_ID_SIZE_MAX)
    cipher_suites = parse_uint16_list(reader.vector16("cipher_suites", 2), "cipher_suites")
    compression_methods = reader.vector8("legacy_compression_methods", 1)
    extensions = None
    if reader.remaining():
        extensions = parse_extensions(reader, "ClientHello.extensions")
    reader.finish("ClientHello")
    return ClientHello(legacy_version, random, session_id, cipher_suites, compression_methods, extensions)


def serialize_client_hello(hello: ClientHello) -> bytes:
    """The inverse of :func:`parse_client_hello`."""
    return serialize_message(
        HandshakeType.CLIENT_HELLO,
        hello.legacy_version.to_bytes(2, "big")
        + hello.random
        + vector8(hello.session_id)
        + vector16(serialize_uint16_list(hello.cipher_suites))
        + vector8(hello.compression_methods)
        + (b"" if hello.extensions is None else serialize_extensions(hello.extensions)),
    )


class ServerHello(NamedTuple):
    """RFC 8446 §4.1.3; a HelloRetryRequest is one with a certain random."""

    legacy_version: int
    random: bytes
    session_id: bytes
    cipher_suite: int
    compression_method: int
    extensions: Extensions

    def is_retry_request(self) -> bool:
        """Whether this is a HelloRetryRequest."""
        return self.random == HELLO_RETRY_REQUEST_RANDOM


def parse_server_hello(message: bytes) -> ServerHello:
    """A ServerHello of any version, or a HelloRetryRequest."""
    reader = Reader(message, HANDSHAKE_HEADER_SIZE)
    legacy_version = reader.uint16("legacy_version")
    random = reader.opaque(RANDOM_SIZE, "random")
    session_id = reader.vector8("legacy_session_id_echo", 0, SESSION_ID_SIZE_MAX)
    cipher_suite = reader.uint16("cipher_suite")
    compression_method = reader.uint8("legacy_compression_method")
    extensions = parse_extensions(reader, "ServerHello.extensions") if reader.remaining() else {}
    reader.finish("ServerHello")
    return ServerHello(legacy_version, random, session_id, cipher_suite, compression_method, extensions)


def serialize_server_hello(random: bytes, session_id: bytes, cipher_suite: int, extensions: Extensions) -> bytes:
    """A ServerHello or HelloRetryRequest of TLS 1.3."""
    return serialize_message(
        HandshakeType.SERVER_HELLO,
        b"%b%b%b%b\x00%b"
        % (
            _LEGACY_VERSION,
            random,
            vector8(session_id),
            cipher_suite.to_bytes(2, "big"),
            serialize_extensions(extensions),
        ),
    )


def parse_encrypted_extensions(message: bytes) -> Extensions:
    """EncryptedExtensions (RFC 8446 §4.3.1)."""
    reader = Reader(message, HANDSHAKE_HEADER_SIZE)
    extensions = parse_extensions(reader, "EncryptedExtensions")
    reader.finish("EncryptedExtensions")
    return extensions


def serialize_encrypted_extensions(extensions: Extensions) -> bytes:
    """The inverse of :func:`parse_encrypted_extensions`."""
    return serialize_message(HandshakeType.ENCRYPTED_EXTENSIONS, serialize_extensions(extensions))


class CertificateRequest(NamedTuple):
    """RFC 8446 §4.3.2."""

    context: bytes
    extensions: Extensions


def parse_certificate_request(message: bytes) -> CertificateRequest:
    """A CertificateRequest."""
    reader = Reader(message, HANDSHAKE_HEADER_SIZE)
    context = reader.vector8("certificate_request_context")
    extensions = parse_extensions(reader, "CertificateRequest.extensions")
    reader.finish("CertificateRequest")
    return CertificateRequest(context, extensions)


def serialize_certificate_request(request: CertificateRequest) -> bytes:
    """The inverse of :func:`parse_certificate_request`."""
    return serialize_message(
        HandshakeType.CERTIFICATE_REQUEST, vector8(request.context) + serialize_extensions(request.extensions)
    )


class CertificateEntry(NamedTuple):
    """One certificate, DER, with its extensions."""

    certificate_der: bytes
    extensions: Extensions


class Certificate(NamedTuple):
    """RFC 8446 §4.4.2; the end entity comes first."""

    context: bytes
    entries: tuple[CertificateEntry, ...]


def parse_certificate(message: bytes) -> Certificate:
    """A Certificate of at most CERTIFICATE_COUNT_MAX entries."""
    reader = Reader(message, HANDSHAKE_HEADER_SIZE)
    context = reader.vector8("certificate_request_context")
    entries_reader = Reader(reader.vector24("certificate_list"))
    reader.finish("Certificate")
    entries: list[CertificateEntry] = []
    while entries_reader.remaining():
        if len(entries) == CERTIFICATE_COUNT_MAX:
            raise BadCertificate(f"a chain of more than {CERTIFICATE_COUNT_MAX} certificates")
        der = entries_reader.vector24("cert_data", 1)
        entries.append(CertificateEntry(der, parse_extensions(entries_reader, "CertificateEntry.extensions")))
    return Certificate(context, tuple(entries))


def serialize_certificate(certificate: Certificate) -> bytes:
    """The inverse of :func:`parse_certificate`."""
    return serialize_message(
        HandshakeType.CERTIFICATE,
        vector8(certificate.context)
        + vector24(
            b"".join(
                [
                    vector24(entry.certificate_der) + serialize_extensions(entry.extensions)
                    for entry in certificate.entries
                ]
            )
        ),
    )


def parse_certificate_verify(message: bytes) -> tuple[int, bytes]:
    """(scheme, signature) of a CertificateVerify (RFC 8446 §4.4.3)."""
    reader = Reader(message, HANDSHAKE_HEADER_SIZE)
    scheme = reader.uint16("algorithm")
    signature = reader.vector16("signature")
    reader.finish("CertificateVerify")
    return scheme, signature


def serialize_certificate_verify(scheme: int, signature: bytes) -> bytes:
    """The inverse of :func:`parse_certificate_verify`."""
    return serialize_message(HandshakeType.CERTIFICATE_VERIFY, scheme.to_bytes(2, "big") + vector16(signature))


def parse_finished(message: bytes, verify_data_size: int) -> bytes:
    """verify_data of a Finished (RFC 8446 §4.4.4)."""
    if len(message) != HANDSHAKE_HEADER_SIZE + verify_data_size:
        raise MalformedMessage("Finished has a length that does not fit the hash")
    return message[HANDSHAKE_HEADER_SIZE:]


def serialize_finished(verify_data: bytes) -> bytes:
    """The inverse of :func:`parse_finished`."""
    return serialize_message(HandshakeType.FINISHED, verify_data)


class NewSessionTicket(NamedTuple):
    """RFC 8446 §4.6.1."""

    lifetime_s: int
    age_add: int
    nonce: bytes
    ticket: bytes
    extensions: Extensions


def parse_new_session_ticket(message: bytes) -> NewSessionTicket:
    """A NewSessionTicket."""
    reader = Reader(message, HANDSHAKE_HEADER_SIZE)
    lifetime_s = reader.uint32("ticket_lifetime")
    age_add = reader.uint32("ticket_age_add")
    nonce = reader.vector8("ticket_nonce")
    ticket = reader.vector16("ticket", 1)
    extensions = parse_extensions(reader, "NewSessionTicket.extensions")
    reader.finish("NewSessionTicket")
    return NewSessionTicket(lifetime_s, age_add, nonce, ticket, extensions)


def serialize_new_session_ticket(ticket: NewSessionTicket) -> bytes:
    """The inverse of :func:`parse_new_session_ticket`."""
    return serialize_message(
        HandshakeType.NEW_SESSION_TICKET,
        ticket.lifetime_s.to_bytes(4, "big")
        + ticket.age_add.to_bytes(4, "big")
        + vector8(ticket.nonce)
        + vector16(ticket.ticket)
        + serialize_extensions(ticket.extensions),
    )


def parse_key_update(message: bytes) -> bool:
    """Whether the peer asks for a KeyUpdate in return (RFC 8446 §4.6.3)."""
    if len(message) != HANDSHAKE_HEADER_SIZE + KEY_UPDATE_SIZE:
        raise MalformedMessage("KeyUpdate has a length that does not fit")
    if message[HANDSHAKE_HEADER_SIZE] > 1:
        raise IllegalParameter(f"KeyUpdate has the unknown request {message[HANDSHAKE_HEADER_SIZE]}")
    return message[HANDSHAKE_HEADER_SIZE] == 1


def serialize_key_update(update_requested: bool) -> bytes:
    """The inverse of :func:`parse_key_update`."""
    return serialize_message(HandshakeType.KEY_UPDATE, b"\x01" if update_requested else b"\x00")


def message_hash(transcript_hash: bytes) -> bytes:
    """What stands for the first ClientHello after a HelloRetryRequest (RFC 8446 §4.4.1)."""
    return serialize_message(HandshakeType.MESSAGE_HASH, transcript_hash)
