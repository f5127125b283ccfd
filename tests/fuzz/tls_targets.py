"""Fuzz targets for the TLS engine: each takes bytes and raises only if an invariant is broken.

The invariant: any bytes give progress, a wish for more, or a named TLS error, never an InternalError and never another
exception, and what is kept of them is bounded. ``tls_atheris`` drives the targets by coverage, ``test_tls_fuzz.py``
replays them.
"""

import random
from functools import cache

import tls_pair
from tls_puppet import PLAIN, ServerFlight, plain_record, writer_with

from kdaemon.tls import extensions, messages
from kdaemon.tls.certificates import load_certificate
from kdaemon.tls.client import ClientHandshake, ClientState
from kdaemon.tls.configuration import ClientAuthentication
from kdaemon.tls.constants import ContentType, NamedGroup
from kdaemon.tls.errors import InternalError, TlsError
from kdaemon.tls.handshake import Handshake
from kdaemon.tls.negotiation import parse_client_offer
from kdaemon.tls.post_handshake import ConnectionSecrets, ControlState, handle_control_record
from kdaemon.tls.record import BUFFER_SIZE_MAX
from kdaemon.tls.server import ServerState
from kdaemon.tls.signing import Role

SECRETS = ConnectionSecrets(0x1301, bytes(32), bytes(32), bytes(32))
KEPT_MAX = 1 << 18

MESSAGE_PARSERS = (
    messages.parse_client_hello,
    messages.parse_server_hello,
    messages.parse_encrypted_extensions,
    messages.parse_certificate_request,
    messages.parse_certificate,
    messages.parse_certificate_verify,
    lambda message: messages.parse_finished(message, 32),
    messages.parse_new_session_ticket,
    messages.parse_key_update,
    parse_client_offer,
)
EXTENSION_PARSERS = (
    (extensions.parse_server_name, None),
    (extensions.parse_supported_groups, extensions.serialize_supported_groups),
    (extensions.parse_signature_algorithms, extensions.serialize_signature_algorithms),
    (extensions.parse_supported_versions, extensions.serialize_supported_versions),
    (extensions.parse_application_protocols, extensions.serialize_application_protocols),
    (extensions.parse_key_shares, extensions.serialize_key_shares),
    (extensions.parse_key_share_entry, lambda entry: extensions.serialize_key_share_entry(*entry)),
    (extensions.parse_cookie, extensions.serialize_cookie),
    (extensions.parse_psk_key_exchange_modes, extensions.serialize_psk_key_exchange_modes),
    (extensions.parse_record_size_limit, None),
    (extensions.parse_status_request, None),
    (extensions.parse_certificate_status, extensions.serialize_certificate_status),
    (extensions.parse_certificate_authorities, extensions.serialize_certificate_authorities),
    (extensions.parse_oid_filters, extensions.serialize_oid_filters),
    (
        extensions.parse_offered_psks,
        lambda offered: extensions.serialize_offered_psks(offered.identities, offered.binders),
    ),
    (load_certificate, None),
)
MESSAGE_SERIALIZERS = {
    messages.parse_client_hello: messages.serialize_client_hello,
    messages.parse_encrypted_extensions: messages.serialize_encrypted_extensions,
    messages.parse_certificate_request: messages.serialize_certificate_request,
    messages.parse_certificate: messages.serialize_certificate,
    messages.parse_certificate_verify: lambda parsed: messages.serialize_certificate_verify(*parsed),
    messages.parse_new_session_ticket: messages.serialize_new_session_ticket,
}


def parsers(data: bytes) -> None:
    """Every parser; what it accepts, its serializer gives back."""
    if not data:
        return
    which, data = data[0] % (len(MESSAGE_PARSERS) + len(EXTENSION_PARSERS)), data[1:]
    try:
        if which < len(MESSAGE_PARSERS):
            parse = MESSAGE_PARSERS[which]
            message = b"\x01" + (len(data) & 0xFFFFFF).to_bytes(3, "big") + data
            parsed = parse(message)
            serialize = MESSAGE_SERIALIZERS.get(parse)
            if serialize is not None and serialize(parsed)[4:] != data:
                # An absent and an empty extension block parse alike; nothing else may.
                assert parse is messages.parse_client_hello and not parsed.extensions
        else:
            parse, serialize = EXTENSION_PARSERS[which - len(MESSAGE_PARSERS)]
            parsed = parse(data)
            if serialize is not None:
                assert serialize(parsed) == data
    except InternalError:
        raise
    except TlsError:
        pass


@cache
def _tickets():
    return tls_pair.ticket_keys()


def _config(number: int):
    groups = (NamedGroup.X25519MLKEM768, NamedGroup.X25519, NamedGroup.SECP256R1, NamedGroup.SECP384R1)
    auth = ClientAuthentication(lambda chain, now_s: None, required=False)
    return tls_pair.server_config(
        ticket_keys=_tickets(),
        alpn=(b"http/1.1",) if number & 2 else (),
        client_auth=lambda name: auth if number & 1 else None,
        groups=groups[2:] if number & 4 else groups,
        record_size_limit=1000 if number & 8 else None,
    )


def _feed(handshake: Handshake, chunks: list[bytes]) -> None:
    try:
        for chunk in chunks:
            handshake.receive(chunk)
            tls_pair.sign_if_asked(handshake, tls_pair.server_identity())
            handshake.data_to_send()
            kept = len(handshake._fragments) + len(handshake._reader._buffer)
            assert kept <= KEPT_MAX + BUFFER_SIZE_MAX
    except InternalError:
        raise
    except TlsError:
        assert not handshake.complete
        handshake.data_to_send()


def _split(data: bytes, seed: int) -> list[bytes]:
    generator = random.Random(seed)
    chunks = []
    while data:
        size = generator.choice((1, 5, 17, 100, 1000, 20000))
        chunks.append(data[:size])
        data = data[size:]
    return chunks


def server_bytes(data: bytes) -> None:
    """A server that receives anything: raw bytes, or a ClientHello in honest records, the first or the second."""
    if len(data) < 2:
        return
    options, seed, data = data[0], data[1], data[2:]
    server = tls_pair.make_server(_config(options | 4 if options & 32 else options))
    if options & 32:
        server.receive(_retried_hello())
        assert server.state == ServerState.EXPECT_SECOND_CLIENT_HELLO
    _feed(server, _split(_in_records(1, data) if options & 16 else data, seed))


def _in_records(message_type: int, body: bytes) -> bytes:
    message = bytes((message_type,)) + (len(body) & 0xFFFFFF).to_bytes(3, "big") + body
    return b"".join(plain_record(message[start : start + 16384]) for start in range(0, len(message), 16384))


@cache
def _retried_hello() -> bytes:
    """A ClientHello that asks for a retry; the same one always."""
    groups = (NamedGroup.X25519, NamedGroup.SECP256R1)
    config = tls_pair.client_config(**{**PLAIN, "groups": groups})
    return ClientHandshake(config, "localhost", random=bytes, now_s=0.0).data_to_send()


@cache
def _session():
    """A ticket of this process's server."""
    client = tls_pair.make_client(tls_pair.client_config(**PLAIN))
    tls_pair.run(client, tls_pair.make_server(tls_pair.server_config(ticket_keys=_tickets())))
    return tls_pair.receive_tickets(client)[0]


def _messages_of(data: bytes) -> list[bytes]:
    """Records' contents, each behind a two-byte length."""
    contents = []
    while len(data) > 2:
        size = (data[0] << 8 | data[1]) & 0x3FFF
        contents.append(data[2 : 2 + size])
        data = data[2 + size :]
    return contents


def server_flight(data: bytes) -> None:
    """What a client that has the keys can send behind the server's flight."""
    if len(data) < 2:
        return
    options, data = data[0], data[1:]
    client = tls_pair.make_client(tls_pair.client_config(**PLAIN))
    server = tls_pair.make_server(_config(options & ~4))
    server.receive(client.data_to_send())
    tls_pair.sign_if_asked(server, tls_pair.server_identity())
    assert server.state in (ServerState.EXPECT_CERTIFICATE, ServerState.EXPECT_FINISHED)
    writer = writer_with(server._suite, server._client_secret)
    types = (ContentType.HANDSHAKE, ContentType.HANDSHAKE, ContentType.HANDSHAKE, ContentType.ALERT)
    _feed(server, [writer.write(types[(options >> 4) & 3], content) for content in _messages_of(data) if content])


def client_bytes(data: bytes) -> None:
    """A client that receives anything: raw bytes, or a ServerHello in honest records, the first or behind a retry."""
    if len(data) < 2:
        return
    options, seed, data = data[0], data[1], data[2:]
    client = ClientHandshake(
        tls_pair.client_config(**{**PLAIN, "groups": (NamedGroup.X25519, NamedGroup.SECP256R1)}),
        "localhost",
        random=bytes,
        now_s=0.0,
    )
    if options & 2:
        server = tls_pair.make_server(tls_pair.server_config(groups=(NamedGroup.SECP256R1,)))
        server.receive(client.data_to_send())
        client.receive(server.data_to_send())
        assert client.state == ClientState.EXPECT_SECOND_SERVER_HELLO
    _feed(client, _split(_in_records(2, data) if options & 1 else data, seed))


def client_flight(data: bytes) -> None:
    """What a server that has the keys can send behind its ServerHello; honest up to a point."""
    if len(data) < 2:
        return
    options, data = data[0], data[1:]
    config = tls_pair.client_config(
        **PLAIN,
        alpn=(b"http/1.1",),
        record_size_limit=2000,
        credential=lambda request: tls_pair.server_identity().credential(),
    )
    client = tls_pair.make_client(config, session=_session() if options & 16 else None)
    flight = ServerFlight(client, _config(options & 3))
    client.receive(plain_record(flight.hello))
    chunks = [flight.writer.write(ContentType.HANDSHAKE, message) for message in flight.messages[: (options >> 2) & 3]]
    assert client.state == ClientState.EXPECT_ENCRYPTED_EXTENSIONS
    chunks += [flight.writer.write(ContentType.HANDSHAKE, content) for content in _messages_of(data) if content]
    _feed(client, chunks)


def post_handshake(data: bytes) -> None:
    """Control records of an established connection."""
    if len(data) < 2:
        return
    role = Role.CLIENT if data[0] & 1 else Role.SERVER
    content_type = (22, 22, 22, 21, 20, 24)[(data[0] >> 1) % 6]
    state = ControlState()
    for content in _messages_of(data[1:]):
        reaction = handle_control_record(role, content_type, content, SECRETS, state=state, now_s=0.0)
        assert len(state.fragment) <= KEPT_MAX
        assert not isinstance(reaction.error, InternalError)
        if reaction.error is not None:
            return


TARGETS = {
    "parsers": parsers,
    "server_bytes": server_bytes,
    "server_flight": server_flight,
    "client_bytes": client_bytes,
    "client_flight": client_flight,
    "post_handshake": post_handshake,
}


def seeds(name: str) -> list[bytes]:
    """Honest inputs to begin from."""
    client = tls_pair.make_client(tls_pair.client_config(**PLAIN, alpn=(b"http/1.1",)))
    hello = client.data_to_send()[5:]
    flight = ServerFlight(tls_pair.make_client(tls_pair.client_config(**PLAIN)))
    framed = b"".join(len(message).to_bytes(2, "big") + message for message in flight.messages)
    if name == "parsers":
        bodies = [hello[4:], flight.hello[4:], *(message[4:] for message in flight.messages)]
        bodies += list(messages.parse_client_hello(hello).extensions.values())
        return [
            bytes((which,)) + body for which in range(len(MESSAGE_PARSERS) + len(EXTENSION_PARSERS)) for body in bodies
        ]
    if name in ("server_bytes", "client_bytes"):
        body = hello if name == "server_bytes" else flight.hello
        whole = plain_record(body)
        honest = [bytes((0, 0)) + whole, bytes((17, 1)) + body[4:], bytes((19, 2)) + body[4:], b"\x15\x02" + body[4:]]
        if name == "server_bytes":
            resuming = tls_pair.make_client(tls_pair.client_config(**PLAIN), session=_session())
            honest += [b"\x10\x00" + resuming.data_to_send()[9:], b"\x30\x00" + _retried_hello()[9:]]
        return [*honest, b"\x03\x00" + body[4:]]
    if name == "post_handshake":
        ticket = messages.serialize_new_session_ticket(messages.NewSessionTicket(1, 2, b"n", b"ticket", {}))
        update = messages.serialize_key_update(True)
        return [b"\x01" + len(item).to_bytes(2, "big") + item for item in (ticket, update)] + [b"\x07\x00\x02\x02\x50"]
    return [bytes((option,)) + framed for option in (0, 1, 4, 8, 12, 16, 20)]
