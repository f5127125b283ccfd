"""What a server owes a ClientHello that breaks a rule, and bytes that are no handshake at all."""

import pytest
import tls_pair
from tls_pair import client_config, make_client, make_server, server_config, server_identity
from tls_puppet import PLAIN, changed_hello, client_hello, fault_of, plain_record, with_extension

from kdaemon.tls import errors
from kdaemon.tls.constants import AlertDescription as Alert
from kdaemon.tls.constants import CipherSuite, NamedGroup
from kdaemon.tls.constants import ExtensionType as Extension
from kdaemon.tls.extensions import serialize_key_shares, serialize_offered_psks, serialize_supported_groups
from kdaemon.tls.key_schedule import EarlyStage
from kdaemon.tls.messages import parse_client_hello, serialize_client_hello
from kdaemon.tls.signing import CERTIFICATE_SCHEMES, HANDSHAKE_SCHEMES, PeerSchemes


def start(message, config=None):
    server = make_server(config or server_config())
    server.receive(plain_record(message))
    return server


def extension(code, data):
    return lambda hello: with_extension(hello, code, data)


def without_last_list(hello):
    return hello._replace(extensions=None)


POINT = bytes.fromhex("04") + bytes(64)
PSK = serialize_offered_psks(((b"unknown", 0),), (bytes(32),))

RULES = {
    # versions
    "TLS 1.2 only": (extension(Extension.SUPPORTED_VERSIONS, None), Alert.PROTOCOL_VERSION),
    "versions without 1.3": (extension(Extension.SUPPORTED_VERSIONS, b"\x04\x03\x03\x03\x02"), Alert.PROTOCOL_VERSION),
    "no extensions": (without_last_list, Alert.PROTOCOL_VERSION),
    "TLS 1.0": (lambda hello: without_last_list(hello)._replace(legacy_version=0x0301), Alert.PROTOCOL_VERSION),
    "SSL 3.0": (lambda hello: hello._replace(legacy_version=0x0300), Alert.PROTOCOL_VERSION),
    "fallback": (
        lambda hello: without_last_list(hello)._replace(cipher_suites=(0xC02F, CipherSuite.TLS_FALLBACK_SCSV)),
        Alert.INAPPROPRIATE_FALLBACK,
    ),
    **{
        f"legacy_version {version:#06x} with 1.3": (
            lambda hello, version=version: hello._replace(legacy_version=version),
            Alert.PROTOCOL_VERSION,
        )
        for version in (0x0000, 0x0002, 0x0102, 0x0200, 0x0300, 0x0301, 0x0302, 0x0304, 0x0404)
    },
    "versions of odd length": (extension(Extension.SUPPORTED_VERSIONS, b"\x03\x03\x04\x03"), Alert.DECODE_ERROR),
    "versions empty": (extension(Extension.SUPPORTED_VERSIONS, b"\x00"), Alert.DECODE_ERROR),
    # fields
    "compression": (lambda hello: hello._replace(compression_methods=b"\x00\x01"), Alert.ILLEGAL_PARAMETER),
    "deflate only": (lambda hello: hello._replace(compression_methods=b"\x01"), Alert.ILLEGAL_PARAMETER),
    "no compression method": (lambda hello: hello._replace(compression_methods=b""), Alert.DECODE_ERROR),
    "session id too long": (lambda hello: hello._replace(session_id=bytes(33)), Alert.DECODE_ERROR),
    "no cipher suites": (lambda hello: hello._replace(cipher_suites=()), Alert.DECODE_ERROR),
    "no common suite": (lambda hello: hello._replace(cipher_suites=(0x1304, 0xC02F)), Alert.HANDSHAKE_FAILURE),
    # mandatory extensions
    "no signature_algorithms": (extension(Extension.SIGNATURE_ALGORITHMS, None), Alert.MISSING_EXTENSION),
    "no supported_groups": (extension(Extension.SUPPORTED_GROUPS, None), Alert.MISSING_EXTENSION),
    "no key_share": (extension(Extension.KEY_SHARE, None), Alert.MISSING_EXTENSION),
    # groups and shares
    "no common group": (
        lambda hello: with_extension(
            with_extension(hello, Extension.SUPPORTED_GROUPS, serialize_supported_groups((0x0019,))),
            Extension.KEY_SHARE,
            serialize_key_shares({}),
        ),
        Alert.HANDSHAKE_FAILURE,
    ),
    "share of a group not supported": (
        extension(Extension.KEY_SHARE, serialize_key_shares({NamedGroup.SECP256R1: POINT})),
        Alert.ILLEGAL_PARAMETER,
    ),
    "share twice": (extension(Extension.KEY_SHARE, b"\x00\x4a" + (b"\x00\x1d\x00\x21" + b"x" * 33) * 2), 47),
    "share empty": (extension(Extension.KEY_SHARE, b"\x00\x04\x00\x1d\x00\x00"), Alert.DECODE_ERROR),
    "share too short": (
        extension(Extension.KEY_SHARE, serialize_key_shares({NamedGroup.X25519: bytes(31)})),
        Alert.ILLEGAL_PARAMETER,
    ),
    "degenerate X25519": (
        extension(Extension.KEY_SHARE, serialize_key_shares({NamedGroup.X25519: bytes(32)})),
        Alert.ILLEGAL_PARAMETER,
    ),
    "groups empty": (extension(Extension.SUPPORTED_GROUPS, b"\x00\x00"), Alert.DECODE_ERROR),
    "groups of odd length": (extension(Extension.SUPPORTED_GROUPS, b"\x00\x03\x00\x1d\x00"), Alert.DECODE_ERROR),
    "groups with bytes behind": (extension(Extension.SUPPORTED_GROUPS, b"\x00\x02\x00\x1d\x00"), Alert.DECODE_ERROR),
    # authentication
    "no common scheme": (extension(Extension.SIGNATURE_ALGORITHMS, b"\x00\x02\x08\x07"), Alert.HANDSHAKE_FAILURE),
    "PKCS#1 schemes only": (extension(Extension.SIGNATURE_ALGORITHMS, b"\x00\x02\x04\x01"), Alert.HANDSHAKE_FAILURE),
    "schemes empty": (extension(Extension.SIGNATURE_ALGORITHMS, b"\x00\x00"), Alert.DECODE_ERROR),
    # names, protocols, limits
    "no common protocol": (
        extension(Extension.APPLICATION_LAYER_PROTOCOL_NEGOTIATION, b"\x00\x03\x02h9"),
        Alert.NO_APPLICATION_PROTOCOL,
    ),
    "protocol empty": (
        extension(Extension.APPLICATION_LAYER_PROTOCOL_NEGOTIATION, b"\x00\x01\x00"),
        Alert.DECODE_ERROR,
    ),
    "server_name empty": (extension(Extension.SERVER_NAME, b""), Alert.DECODE_ERROR),
    "server_name twice": (
        extension(Extension.SERVER_NAME, b"\x00\x08\x00\x00\x01a\x00\x00\x01b"),
        Alert.ILLEGAL_PARAMETER,
    ),
    "server_name with NUL": (extension(Extension.SERVER_NAME, b"\x00\x06\x00\x00\x03a\x00b"), Alert.ILLEGAL_PARAMETER),
    "unknown name": (extension(Extension.SERVER_NAME, b"\x00\x0a\x00\x00\x07unknown"), Alert.UNRECOGNIZED_NAME),
    "record_size_limit too small": (extension(Extension.RECORD_SIZE_LIMIT, b"\x00\x3f"), Alert.ILLEGAL_PARAMETER),
    "record_size_limit too long": (extension(Extension.RECORD_SIZE_LIMIT, b"\x00\x40\x00"), Alert.DECODE_ERROR),
    # PSK
    "PSK not last": (
        lambda hello: with_extension(with_extension(hello, Extension.PRE_SHARED_KEY, PSK), 0x1234, b""),
        Alert.ILLEGAL_PARAMETER,
    ),
    "PSK without modes": (
        lambda hello: with_extension(
            with_extension(hello, Extension.PSK_KEY_EXCHANGE_MODES, None), Extension.PRE_SHARED_KEY, PSK
        ),
        Alert.MISSING_EXTENSION,
    ),
    "more binders than identities": (
        extension(Extension.PRE_SHARED_KEY, serialize_offered_psks(((b"unknown", 0),), (bytes(32), bytes(32)))),
        Alert.ILLEGAL_PARAMETER,
    ),
    "binder too short": (
        extension(Extension.PRE_SHARED_KEY, serialize_offered_psks(((b"unknown", 0),), (bytes(31),))),
        Alert.DECODE_ERROR,
    ),
    "modes empty": (extension(Extension.PSK_KEY_EXCHANGE_MODES, b"\x00"), Alert.DECODE_ERROR),
    "early_data with content": (extension(Extension.EARLY_DATA, b"\x00"), Alert.DECODE_ERROR),
}


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule):
    change, alert = RULES[rule]
    credential = server_identity().credential()

    def find(name, algorithms):
        if name == "unknown":
            raise errors.UnrecognizedName("no such name")
        return credential

    config = server_config(alpn=(b"http/1.1",))
    config.credentials = find
    record = plain_record(changed_hello(change))
    faults = []
    for feed in (tls_pair.feed_whole, tls_pair.feed_bytes, tls_pair.feed_randomly):
        server = make_server(config)
        faults.append(fault_of(feed, server, record))
        assert server.data_to_send() == bytes((21, 3, 3, 0, 2, 2, alert))
    assert {(type(fault), fault.alert, str(fault)) for fault in faults} == {(type(faults[0]), alert, str(faults[0]))}


TOLERATED = {
    "unknown extension": extension(0x7777, b"anything"),
    "unknown suites": lambda hello: hello._replace(cipher_suites=tuple(range(0x2000, 0x9000)) + hello.cipher_suites),
    "unknown PSK": extension(Extension.PRE_SHARED_KEY, PSK),
    "early data without a known PSK": lambda hello: with_extension(
        with_extension(hello, Extension.EARLY_DATA, b""), Extension.PRE_SHARED_KEY, PSK
    ),
    "PSK without (EC)DHE": lambda hello: with_extension(
        with_extension(hello, Extension.PSK_KEY_EXCHANGE_MODES, b"\x01\x00"), Extension.PRE_SHARED_KEY, PSK
    ),
    "another status type": extension(Extension.STATUS_REQUEST, b"\x02\x00\x00\x00\x00"),
    "fallback value with 1.3": lambda hello: hello._replace(
        cipher_suites=(*hello.cipher_suites, CipherSuite.TLS_FALLBACK_SCSV)
    ),
    "many extensions": lambda hello: hello._replace(
        extensions={**hello.extensions, **dict.fromkeys(range(32768, 45056), b"")}
    ),
    "no session id": lambda hello: hello._replace(session_id=b""),
}


@pytest.mark.parametrize("what", TOLERATED)
def test_tolerated(what):
    message = changed_hello(TOLERATED[what])
    server = make_server(server_config(alpn=(b"http/1.1",), ticket_keys=tls_pair.ticket_keys()))
    for position in range(0, len(message), 16000):
        server.receive(plain_record(message[position : position + 16000]))
    assert server.sign_request is not None


def test_what_the_client_verifies_decides_on_the_certificate():
    seen = []
    config = server_config()
    config.credentials = lambda name, schemes: seen.append(schemes) or server_identity().credential()
    for change in (lambda hello: hello, extension(Extension.SIGNATURE_ALGORITHMS_CERT, None)):
        make_server(config).receive(plain_record(changed_hello(change)))
    with_extension_of_its_own = PeerSchemes(HANDSHAKE_SCHEMES, CERTIFICATE_SCHEMES)
    assert seen == [with_extension_of_its_own, PeerSchemes(HANDSHAKE_SCHEMES, HANDSHAKE_SCHEMES)]


def test_truncated_everywhere():
    """A ClientHello cut at every byte, with its header's length adjusted: always a named fault, mostly decode_error."""
    message, _ = client_hello()
    for size in range(4, len(message)):
        cut = message[:1] + (size - 4).to_bytes(3, "big") + message[4:size]
        fault = fault_of(make_server(server_config()).receive, plain_record(cut))
        assert fault.alert in (Alert.DECODE_ERROR, Alert.PROTOCOL_VERSION), size


def test_cut_in_the_stream_everywhere():
    message, _ = client_hello()
    record = plain_record(message)
    for size in range(len(record)):
        server = make_server(server_config())
        server.receive(record[:size])
        assert server.sign_request is None
        server.receive(record[size:])
        assert server.sign_request is not None


def test_every_byte_changed_is_answered_by_name():
    message, _ = client_hello()
    for position in range(len(message)):
        changed = bytearray(message)
        changed[position] ^= 0xFF
        server = make_server(server_config())
        try:
            server.receive(plain_record(bytes(changed)))
        except errors.TlsFault as fault:
            assert not isinstance(fault, errors.InternalError), (position, fault)


def test_fragments_of_one_byte():
    message, _ = client_hello()
    server = make_server(server_config())
    for position in range(len(message)):
        server.receive(plain_record(message[position : position + 1]))
    assert server.sign_request is not None


def test_bytes_behind_the_client_hello_in_its_record():
    message, _ = client_hello()
    fault = fault_of(make_server(server_config()).receive, plain_record(message + b"\x14"))
    assert isinstance(fault, errors.ExcessHandshakeData)


@pytest.mark.parametrize("first", [b"GET / HTTP/1.1\r\n\r\n", b"POST /x HTTP/1.1\r\n", b"OPTIONS * HTTP/1.1\r\n"])
def test_http_in_the_clear(first):
    for feed in (tls_pair.feed_whole, tls_pair.feed_bytes):
        server = make_server(server_config())
        assert isinstance(fault_of(feed, server, first), errors.PlainHttpReceived)
        assert server.data_to_send() == b""


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"\x80\x2e\x01\x03\x01", errors.UnexpectedRecord),  # an SSL 2.0 hello
        (b"\x00" * 5, errors.UnexpectedRecord),
        (b"SSH-2.0-x", errors.UnexpectedRecord),
        (b"\x16\x03\x01\x40\x01", errors.RecordOverflow),
        (b"\x16\x03\x01\x00\x00", errors.EmptyRecord),
        (b"\x14\x03\x03\x00\x01\x01", errors.UnexpectedRecord),
        (b"\x17\x03\x03\x00\x01\x01", errors.UnexpectedRecord),
        (b"\x15\x03\x03\x00\x01\x01", errors.MalformedMessage),
        (b"\x15\x03\x03\x00\x00", errors.EmptyRecord),
    ],
)
def test_first_bytes(data, fault):
    assert type(fault_of(make_server(server_config()).receive, data)) is fault


def test_alert_instead_of_a_hello():
    server = make_server(server_config())
    with pytest.raises(errors.AlertReceived) as info:
        server.receive(b"\x15\x03\x03\x00\x02\x02\x50")
    assert info.value.description == Alert.INTERNAL_ERROR
    assert server.data_to_send() == b""


# --- the second ClientHello


SECOND = {
    "another group": lambda first, second: with_extension(
        second, Extension.KEY_SHARE, serialize_key_shares({NamedGroup.X25519: b"x" * 32})
    ),
    "two shares": lambda first, second: with_extension(
        second,
        Extension.KEY_SHARE,
        serialize_key_shares({NamedGroup.X25519: b"x" * 32, NamedGroup.SECP256R1: POINT}),
    ),
    "no share": lambda first, second: with_extension(second, Extension.KEY_SHARE, b"\x00\x00"),
    "another random": lambda first, second: second._replace(random=bytes(32)),
    "another session id": lambda first, second: second._replace(session_id=b"other"),
    "other suites": lambda first, second: second._replace(cipher_suites=second.cipher_suites[:1]),
    "another name": lambda first, second: with_extension(second, Extension.SERVER_NAME, b"\x00\x04\x00\x00\x01a"),
    "early data": lambda first, second: with_extension(second, Extension.EARLY_DATA, b""),
    "a pre-shared key": lambda first, second: with_extension(second, Extension.PRE_SHARED_KEY, PSK),
    "no name": lambda first, second: with_extension(second, Extension.SERVER_NAME, None),
    "no status_request": lambda first, second: with_extension(second, Extension.STATUS_REQUEST, None),
    "a record_size_limit": lambda first, second: with_extension(second, Extension.RECORD_SIZE_LIMIT, b"\x40\x00"),
    "a protocol": lambda first, second: with_extension(second, 16, b"\x00\x03\x02h2"),
    "authorities": lambda first, second: with_extension(
        second, Extension.CERTIFICATE_AUTHORITIES, b"\x00\x04\x00\x020\x00"
    ),
    "other certificate schemes": lambda first, second: with_extension(
        second, Extension.SIGNATURE_ALGORITHMS_CERT, b"\x00\x02\x04\x03"
    ),
}


@pytest.mark.parametrize("what", SECOND)
def test_second_client_hello(what):
    first, client = client_hello(groups=(NamedGroup.X25519, NamedGroup.SECP256R1))
    server = start(first, server_config(groups=(NamedGroup.SECP256R1,)))
    client.receive(server.data_to_send())
    data = client.data_to_send()
    assert data[:6] == b"\x14\x03\x03\x00\x01\x01"
    second = SECOND[what](parse_client_hello(first), parse_client_hello(data[11:]))
    fault = fault_of(server.receive, plain_record(serialize_client_hello(second)))
    assert fault.alert == Alert.ILLEGAL_PARAMETER


def test_second_client_hello_may_differ_in_what_is_not_recognised():
    first, client = client_hello(groups=(NamedGroup.X25519, NamedGroup.SECP256R1))
    server = start(first, server_config(groups=(NamedGroup.SECP256R1,)))
    client.receive(server.data_to_send())
    second = parse_client_hello(client.data_to_send()[11:])
    padding = 21  # RFC 7685; RFC 8446 §4.1.2 names it
    for code in (padding, 0x7777):
        second = with_extension(second, code, b"\x00" * 7)
    order = dict(reversed(second.extensions.items()))
    server.receive(plain_record(serialize_client_hello(second._replace(extensions=order))))
    assert server.sign_request is not None


# --- names of faults


def test_every_fault_has_its_alert():
    def subclasses(cls):
        for sub in cls.__subclasses__():
            yield sub
            yield from subclasses(sub)

    for fault in subclasses(errors.TlsFault):
        if fault is not errors.PlainHttpReceived:
            assert fault in errors._ALERTS, fault


def test_cancel():
    for fault, expected in (
        (None, b"\x01\x5a\x01\x00"),
        (errors.InternalError("no signature"), b"\x02\x50"),
        (errors.RefusedByPolicy("no"), b"\x02\x75"),
        (errors.AccessDenied("no"), b"\x02\x31"),
    ):
        message, _ = client_hello()
        server = start(message)
        server.cancel(fault)
        assert server.sign_request is None
        data = server.data_to_send()
        # ServerHello and change_cipher_spec were made already; the alert behind them is protected.
        records = []
        while data:
            end = 5 + int.from_bytes(data[3:5], "big")
            records.append(data[:end])
            data = data[end:]
        alerts = [record for record in records if record[0] == 0x17]
        reader = tls_pair.ApplicationReader()
        from kdaemon.tls.key_schedule import traffic_key

        reader.set_key(server._suite, *traffic_key(server._suite, server._server_secret))
        reader.feed(b"".join(alerts))
        content = b"".join(reader.open_one()[1] for _ in alerts)
        assert content == expected


def test_nothing_secret_in_reprs():
    keys = tls_pair.ticket_keys()
    client = make_client(client_config(**PLAIN))
    server = make_server(server_config(ticket_keys=keys))
    tls_pair.run(client, server)
    (ticket,) = tls_pair.receive_tickets(client)
    secrets = [
        client.established.tx.secret,
        client.established.tx.key,
        client.established.resumption_secret,
        ticket.psk,
    ]
    for thing in (client, server, client.established, client.established.tx, ticket, EarlyStage, keys):
        for secret in secrets:
            assert secret.hex() not in repr(thing)
            assert repr(secret) not in repr(thing)
