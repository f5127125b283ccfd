"""What a client owes a server that breaks a rule."""

import time

import pytest
import tls_pair
from tls_pair import client_config, make_client, make_server, server_config
from tls_puppet import PLAIN, ServerFlight, fault_of, plain_record, with_extension

from kdaemon.tls import errors
from kdaemon.tls.client import ClientState
from kdaemon.tls.configuration import ClientAuthentication, ExternalPsk
from kdaemon.tls.constants import COOKIE_SIZE_MAX, HELLO_RETRY_REQUEST_RANDOM, NamedGroup
from kdaemon.tls.constants import AlertDescription as Alert
from kdaemon.tls.constants import ExtensionType as Extension
from kdaemon.tls.extensions import parse_server_name, serialize_key_share_entry
from kdaemon.tls.key_schedule import SHA256
from kdaemon.tls.messages import (
    Certificate,
    CertificateEntry,
    CertificateRequest,
    parse_certificate,
    parse_certificate_verify,
    parse_client_hello,
    parse_encrypted_extensions,
    parse_server_hello,
    serialize_certificate,
    serialize_certificate_request,
    serialize_certificate_verify,
    serialize_encrypted_extensions,
    serialize_finished,
    serialize_message,
)
from kdaemon.tls.session import TICKET_SIZE_MAX, SessionTicket

VERSION, SHARE = Extension.SUPPORTED_VERSIONS, Extension.KEY_SHARE


def serialize_any_server_hello(hello):
    """Also those that no server of TLS 1.3 makes."""
    blocks = b"".join(
        code.to_bytes(2, "big") + len(data).to_bytes(2, "big") + data for code, data in hello.extensions.items()
    )
    body = (
        hello.legacy_version.to_bytes(2, "big")
        + hello.random
        + len(hello.session_id).to_bytes(1, "big")
        + hello.session_id
        + hello.cipher_suite.to_bytes(2, "big")
        + hello.compression_method.to_bytes(1, "big")
        + len(blocks).to_bytes(2, "big")
        + blocks
    )
    return serialize_message(2, body)


def extension(code, data):
    return lambda hello: with_extension(hello, code, data)


def sentinel(tail):
    return lambda hello: with_extension(hello, VERSION, None)._replace(random=bytes(24) + tail)


HELLOS = {
    "TLS 1.2": (extension(VERSION, None), Alert.PROTOCOL_VERSION),
    "downgrade from 1.3 to 1.2": (sentinel(b"DOWNGRD\x01"), Alert.ILLEGAL_PARAMETER),
    "downgrade from 1.3 to 1.1": (sentinel(b"DOWNGRD\x00"), Alert.ILLEGAL_PARAMETER),
    "TLS 1.2 in supported_versions": (extension(VERSION, b"\x03\x03"), Alert.ILLEGAL_PARAMETER),
    "a version from nowhere": (extension(VERSION, b"\x03\x05"), Alert.ILLEGAL_PARAMETER),
    "version list": (extension(VERSION, b"\x02\x03\x04"), Alert.DECODE_ERROR),
    **{
        f"legacy_version {version:#06x}": (
            lambda hello, version=version: hello._replace(legacy_version=version),
            Alert.PROTOCOL_VERSION,
        )
        for version in (0x0300, 0x0301, 0x0302, 0x0304)
    },
    "session id": (lambda hello: hello._replace(session_id=b"x" * 32), Alert.ILLEGAL_PARAMETER),
    "session id missing": (lambda hello: hello._replace(session_id=b""), Alert.ILLEGAL_PARAMETER),
    "compression": (lambda hello: hello._replace(compression_method=1), Alert.ILLEGAL_PARAMETER),
    "unknown suite": (lambda hello: hello._replace(cipher_suite=0x1304), Alert.ILLEGAL_PARAMETER),
    "suite of TLS 1.2": (lambda hello: hello._replace(cipher_suite=0xC02F), Alert.ILLEGAL_PARAMETER),
    "no share": (extension(SHARE, None), Alert.MISSING_EXTENSION),
    "share of another group": (
        extension(SHARE, serialize_key_share_entry(NamedGroup.SECP256R1, b"\x04" + bytes(64))),
        Alert.ILLEGAL_PARAMETER,
    ),
    "all-zero share": (extension(SHARE, serialize_key_share_entry(NamedGroup.X25519, bytes(32))), 47),
    "short share": (extension(SHARE, serialize_key_share_entry(NamedGroup.X25519, bytes(31))), 47),
    "share cut": (extension(SHARE, b"\x00\x1d\x00\x20" + bytes(31)), Alert.DECODE_ERROR),
    "PSK nobody offered": (extension(Extension.PRE_SHARED_KEY, b"\x00\x00"), Alert.UNSUPPORTED_EXTENSION),
    "extension nobody sent": (extension(0x7777, b""), Alert.UNSUPPORTED_EXTENSION),
    "extension of another message": (extension(Extension.SERVER_NAME, b""), Alert.ILLEGAL_PARAMETER),
    "cookie": (extension(Extension.COOKIE, b"\x00\x01x"), Alert.ILLEGAL_PARAMETER),
    "retry without a change": (
        lambda hello: hello._replace(random=HELLO_RETRY_REQUEST_RANDOM, extensions={VERSION: b"\x03\x04"}),
        Alert.ILLEGAL_PARAMETER,
    ),
    "retry for the group that was sent": (
        lambda hello: hello._replace(
            random=HELLO_RETRY_REQUEST_RANDOM, extensions={VERSION: b"\x03\x04", SHARE: b"\x00\x1d"}
        ),
        Alert.ILLEGAL_PARAMETER,
    ),
    "retry for a group that was not offered": (
        lambda hello: hello._replace(
            random=HELLO_RETRY_REQUEST_RANDOM, extensions={VERSION: b"\x03\x04", SHARE: b"\x00\x18"}
        ),
        Alert.ILLEGAL_PARAMETER,
    ),
    "retry with an empty cookie": (
        lambda hello: hello._replace(
            random=HELLO_RETRY_REQUEST_RANDOM, extensions={VERSION: b"\x03\x04", Extension.COOKIE: b"\x00\x00"}
        ),
        Alert.DECODE_ERROR,
    ),
    "retry with an extension nobody sent": (
        lambda hello: hello._replace(
            random=HELLO_RETRY_REQUEST_RANDOM,
            extensions={VERSION: b"\x03\x04", SHARE: b"\x00\x17", 0x7777: b""},
        ),
        Alert.UNSUPPORTED_EXTENSION,
    ),
}


@pytest.mark.parametrize("what", HELLOS)
def test_server_hello(what):
    change, alert = HELLOS[what]
    faults = set()
    for feed in (tls_pair.feed_whole, tls_pair.feed_bytes, tls_pair.feed_randomly):
        client = make_client(client_config(**{**PLAIN, "groups": (NamedGroup.X25519, NamedGroup.SECP256R1)}))
        flight = ServerFlight(client)
        hello = change(parse_server_hello(flight.hello))
        fault = fault_of(feed, client, plain_record(serialize_any_server_hello(hello)))
        faults.add((type(fault), str(fault)))
        assert fault.alert == alert
        assert client.data_to_send() == bytes((21, 3, 3, 0, 2, 2, alert))
    assert len(faults) == 1


def test_duplicate_extension():
    client = make_client(client_config(**PLAIN))
    flight = ServerFlight(client)
    body = flight.hello[4:]
    block = body[-6:]  # supported_versions
    size = int.from_bytes(body[70:72], "big")
    assert size == len(body) - 72
    changed = body[:70] + (size + 6).to_bytes(2, "big") + body[72:] + block
    fault = fault_of(client.receive, plain_record(serialize_message(2, changed)))
    assert isinstance(fault, errors.DuplicateExtension)


def test_a_second_retry_request():
    client = make_client(client_config(**{**PLAIN, "groups": (NamedGroup.X25519, NamedGroup.SECP256R1)}))
    server = make_server(server_config(groups=(NamedGroup.SECP256R1,)))
    server.receive(client.data_to_send())
    retry = server.data_to_send()[:-6]
    client.receive(retry)
    assert fault_of(client.receive, retry).alert == Alert.UNEXPECTED_MESSAGE


def test_suite_changes_after_a_retry():
    client = make_client(client_config(**{**PLAIN, "groups": (NamedGroup.X25519, NamedGroup.SECP256R1)}))
    server = make_server(server_config(groups=(NamedGroup.SECP256R1,)))
    server.receive(client.data_to_send())
    client.receive(server.data_to_send())
    server.receive(client.data_to_send())
    tls_pair.sign_if_asked(server, tls_pair.server_identity())
    data = server.data_to_send()
    message = data[5 : 5 + int.from_bytes(data[3:5], "big")]
    changed = parse_server_hello(message)._replace(cipher_suite=0x1303)
    fault = fault_of(client.receive, plain_record(serialize_any_server_hello(changed)))
    assert fault.alert == Alert.ILLEGAL_PARAMETER


def retry_with_cookie(client, cookie):
    hello = ServerFlight(make_client(client_config(**PLAIN))).hello
    retry = parse_server_hello(hello)._replace(
        random=HELLO_RETRY_REQUEST_RANDOM,
        session_id=client._session_id,
        extensions={VERSION: b"\x03\x04", Extension.COOKIE: len(cookie).to_bytes(2, "big") + cookie},
    )
    message = serialize_any_server_hello(retry)
    return b"".join(plain_record(message[start : start + 16384]) for start in range(0, len(message), 16384))


def test_a_cookie_that_leaves_no_room_in_the_second_hello():
    ticket = SessionTicket(0x1301, bytes(32), bytes(TICKET_SIZE_MAX), 0, 3600, time.time())
    client = make_client(client_config(), session=ticket)
    client.data_to_send()
    client.receive(retry_with_cookie(client, bytes(COOKIE_SIZE_MAX)))
    assert len(client.data_to_send()) > COOKIE_SIZE_MAX + TICKET_SIZE_MAX
    for size in (COOKIE_SIZE_MAX + 1, 65_500):
        client = make_client(client_config())
        assert fault_of(client.receive, retry_with_cookie(client, bytes(size))).alert == Alert.ILLEGAL_PARAMETER


def test_change_cipher_spec_before_the_server_hello_is_dropped():
    """RFC 8446 §5: at any time after the first ClientHello has been sent."""
    client = make_client(client_config(**PLAIN))
    flight = ServerFlight(client)
    for byte in b"\x14\x03\x03\x00\x01\x01":
        client.receive(bytes((byte,)))
    client.receive(plain_record(flight.hello))
    assert client.state == ClientState.EXPECT_ENCRYPTED_EXTENSIONS
    client = make_client(client_config(**PLAIN))
    assert fault_of(client.receive, b"\x14\x03\x03\x00\x01\x02").alert == Alert.UNEXPECTED_MESSAGE


def test_psk_without_a_key_exchange():
    psk = ExternalPsk(b"id", bytes(32), SHA256)
    client = make_client(client_config(**PLAIN), session=psk)
    flight = ServerFlight(client, server_config(external_psk={b"id": psk}.get))
    hello = with_extension(parse_server_hello(flight.hello), SHARE, None)
    fault = fault_of(client.receive, plain_record(serialize_any_server_hello(hello)))
    assert fault.alert == Alert.ILLEGAL_PARAMETER


def test_names_go_out_as_a_labels():
    client = make_client(client_config(**PLAIN), "B\u00fccher.Example.")
    extensions = parse_client_hello(client.data_to_send()[5:]).extensions
    assert parse_server_name(extensions[Extension.SERVER_NAME]) == "xn--bcher-kva.example"
    with pytest.raises(errors.CertificateNameMismatch):
        make_client(client_config(**PLAIN), "\u00fc" * 64)


def test_cookie_is_returned():
    client = make_client(client_config(**PLAIN))
    first = client.data_to_send()
    client.receive(retry_with_cookie(client, b"abc"))
    second = client.data_to_send()
    assert b"\x00\x2c\x00\x05\x00\x03abc" in second
    before, after = parse_client_hello(first[5:]), parse_client_hello(second[11:])
    assert before[:5] == after[:5]
    extensions = dict(after.extensions)
    del extensions[Extension.COOKIE]
    assert extensions == before.extensions


# --- the protected flight


def client_and_flight(config=None, **options):
    client = make_client(client_config(**{**PLAIN, **options}))
    flight = ServerFlight(client, config)
    client.receive(plain_record(flight.hello))
    client.data_to_send()
    return client, flight


ENCRYPTED = {
    "extension nobody sent": ({0x7777: b""}, Alert.UNSUPPORTED_EXTENSION),
    "early data": ({Extension.EARLY_DATA: b""}, Alert.UNSUPPORTED_EXTENSION),
    "key_share": ({SHARE: b""}, Alert.ILLEGAL_PARAMETER),
    "supported_versions": ({VERSION: b"\x03\x04"}, Alert.ILLEGAL_PARAMETER),
    "signature_algorithms": ({Extension.SIGNATURE_ALGORITHMS: b"\x00\x02\x04\x03"}, Alert.ILLEGAL_PARAMETER),
    "protocol nobody offered": ({16: b"\x00\x03\x02h2"}, Alert.ILLEGAL_PARAMETER),
    "two protocols": ({16: b"\x00\x04\x01a\x01b"}, Alert.ILLEGAL_PARAMETER),
    "no protocol": ({16: b"\x00\x00"}, Alert.DECODE_ERROR),
    "server_name with a name": ({Extension.SERVER_NAME: b"\x00"}, Alert.DECODE_ERROR),
    "limit too small": ({Extension.RECORD_SIZE_LIMIT: b"\x00\x3f"}, Alert.ILLEGAL_PARAMETER),
    "groups empty": ({Extension.SUPPORTED_GROUPS: b"\x00\x00"}, Alert.DECODE_ERROR),
}


@pytest.mark.parametrize("what", ENCRYPTED)
def test_encrypted_extensions(what):
    added, alert = ENCRYPTED[what]
    client, flight = client_and_flight(alpn=(b"a", b"b"), record_size_limit=16385)
    extensions = {**parse_encrypted_extensions(flight.messages[0]), **added}
    fault = fault_of(flight.send, client, serialize_encrypted_extensions(extensions))
    assert fault.alert == alert


def test_alpn_answer_to_no_offer():
    client, flight = client_and_flight()
    fault = fault_of(flight.send, client, serialize_encrypted_extensions({16: b"\x00\x03\x02h2"}))
    assert fault.alert == Alert.UNSUPPORTED_EXTENSION


CERTIFICATES = {
    "empty": (lambda certificate: Certificate(b"", ()), Alert.DECODE_ERROR),
    "context": (lambda certificate: certificate._replace(context=b"x"), Alert.ILLEGAL_PARAMETER),
    "garbage": (lambda certificate: Certificate(b"", (CertificateEntry(b"garbage", {}),)), Alert.BAD_CERTIFICATE),
    "too many": (lambda certificate: Certificate(b"", certificate.entries * 17), Alert.BAD_CERTIFICATE),
    "extension": (
        lambda certificate: Certificate(b"", (certificate.entries[0]._replace(extensions={18: b""}),)),
        Alert.UNSUPPORTED_EXTENSION,
    ),
    "bad status": (
        lambda certificate: Certificate(b"", (certificate.entries[0]._replace(extensions={5: b"\x01\x00"}),)),
        Alert.BAD_CERTIFICATE_STATUS_RESPONSE,
    ),
}


@pytest.mark.parametrize("what", CERTIFICATES)
def test_certificate(what):
    change, alert = CERTIFICATES[what]
    client, flight = client_and_flight()
    flight.send(client, flight.messages[0])
    message = serialize_certificate(change(parse_certificate(flight.messages[1])))
    assert fault_of(flight.send, client, message).alert == alert


def test_empty_certificate_data():
    client, flight = client_and_flight()
    flight.send(client, flight.messages[0])
    message = serialize_message(11, b"\x00" + b"\x00\x00\x05" + b"\x00\x00\x00" + b"\x00\x00")
    assert fault_of(flight.send, client, message).alert == Alert.DECODE_ERROR


VERIFIES = {
    "scheme nobody offered": (lambda scheme, signature: (0x0806 ^ 0xFF, signature), Alert.ILLEGAL_PARAMETER),
    "PKCS#1": (lambda scheme, signature: (0x0401, signature), Alert.ILLEGAL_PARAMETER),
    "SHA-1": (lambda scheme, signature: (0x0203, signature), Alert.ILLEGAL_PARAMETER),
    "scheme of another curve": (lambda scheme, signature: (0x0503, signature), Alert.ILLEGAL_PARAMETER),
    "scheme of another key": (lambda scheme, signature: (0x0804, signature), Alert.ILLEGAL_PARAMETER),
    "wrong signature": (
        lambda scheme, signature: (scheme, signature[:-1] + bytes((signature[-1] ^ 1,))),
        Alert.DECRYPT_ERROR,
    ),
    "no signature": (lambda scheme, signature: (scheme, b""), Alert.DECRYPT_ERROR),
}


@pytest.mark.parametrize("what", VERIFIES)
def test_certificate_verify(what):
    change, alert = VERIFIES[what]
    client, flight = client_and_flight()
    for message in flight.messages[:2]:
        flight.send(client, message)
    message = serialize_certificate_verify(*change(*parse_certificate_verify(flight.messages[2])))
    assert fault_of(flight.send, client, message).alert == alert


def test_certificate_verify_with_bytes_behind():
    client, flight = client_and_flight()
    for message in flight.messages[:2]:
        flight.send(client, message)
    message = serialize_message(15, flight.messages[2][4:] + b"\x00")
    assert fault_of(flight.send, client, message).alert == Alert.DECODE_ERROR


def test_bad_finished():
    client, flight = client_and_flight()
    for message in flight.messages[:3]:
        flight.send(client, message)
    assert isinstance(fault_of(flight.send, client, serialize_finished(bytes(32))), errors.BadFinished)


def test_bytes_behind_finished_in_its_record():
    client, flight = client_and_flight()
    for message in flight.messages[:3]:
        flight.send(client, message)
    fault = fault_of(flight.send, client, flight.messages[3] + b"\x04\x00")
    assert isinstance(fault, errors.ExcessHandshakeData)


def test_bytes_behind_the_server_hello_in_its_record():
    client = make_client(client_config(**PLAIN))
    flight = ServerFlight(client)
    fault = fault_of(client.receive, plain_record(flight.hello + flight.messages[0]))
    assert isinstance(fault, errors.ExcessHandshakeData)


REQUESTS = {
    "context": (CertificateRequest(b"x", {13: b"\x00\x02\x04\x03"}), Alert.ILLEGAL_PARAMETER),
    "no algorithms": (CertificateRequest(b"", {}), Alert.MISSING_EXTENSION),
    "algorithms empty": (CertificateRequest(b"", {13: b"\x00\x00"}), Alert.DECODE_ERROR),
    "foreign extension": (CertificateRequest(b"", {13: b"\x00\x02\x04\x03", 51: b""}), Alert.ILLEGAL_PARAMETER),
    "filters": (CertificateRequest(b"", {13: b"\x00\x02\x04\x03", 48: b"\x00\x01\x01"}), Alert.DECODE_ERROR),
    "a filter twice": (
        CertificateRequest(b"", {13: b"\x00\x02\x04\x03", 48: b"\x00\x0c" + b"\x01\x06\x00\x02\x05\x00" * 2}),
        Alert.ILLEGAL_PARAMETER,
    ),
    "status_request with content": (CertificateRequest(b"", {13: b"\x00\x02\x04\x03", 5: b"\x01"}), Alert.DECODE_ERROR),
    "authorities empty": (CertificateRequest(b"", {13: b"\x00\x02\x04\x03", 47: b"\x00\x00"}), Alert.DECODE_ERROR),
}


@pytest.mark.parametrize("what", REQUESTS)
def test_certificate_request(what):
    request, alert = REQUESTS[what]
    client, flight = client_and_flight()
    flight.send(client, flight.messages[0])
    assert fault_of(flight.send, client, serialize_certificate_request(request)).alert == alert


def test_certificate_request_in_a_resumption():
    keys = tls_pair.ticket_keys()
    client = make_client(client_config(**PLAIN))
    tls_pair.run(client, make_server(server_config(ticket_keys=keys)))
    (ticket,) = tls_pair.receive_tickets(client)
    client = make_client(client_config(**PLAIN), session=ticket)
    flight = ServerFlight(client, server_config(ticket_keys=keys))
    client.receive(plain_record(flight.hello))
    flight.send(client, flight.messages[0])
    request = serialize_certificate_request(CertificateRequest(b"", {13: b"\x00\x02\x04\x03"}))
    assert isinstance(fault_of(flight.send, client, request), errors.UnexpectedMessage)


@pytest.mark.parametrize("selected", [b"\x00\x01", b"\xff\xff"])
def test_psk_that_was_not_offered(selected):
    keys = tls_pair.ticket_keys()
    client = make_client(client_config(**PLAIN))
    tls_pair.run(client, make_server(server_config(ticket_keys=keys)))
    (ticket,) = tls_pair.receive_tickets(client)
    client = make_client(client_config(**PLAIN), session=ticket)
    flight = ServerFlight(client, server_config(ticket_keys=keys))
    hello = with_extension(parse_server_hello(flight.hello), Extension.PRE_SHARED_KEY, selected)
    fault = fault_of(client.receive, plain_record(serialize_any_server_hello(hello)))
    assert fault.alert == Alert.ILLEGAL_PARAMETER


def test_psk_with_a_suite_of_another_hash():
    keys = tls_pair.ticket_keys()
    client = make_client(client_config(**PLAIN))
    tls_pair.run(client, make_server(server_config(ticket_keys=keys)))
    (ticket,) = tls_pair.receive_tickets(client)
    client = make_client(client_config(**PLAIN), session=ticket)
    flight = ServerFlight(client, server_config(ticket_keys=keys))
    hello = parse_server_hello(flight.hello)._replace(cipher_suite=0x1302)
    fault = fault_of(client.receive, plain_record(serialize_any_server_hello(hello)))
    assert fault.alert == Alert.ILLEGAL_PARAMETER


def test_plaintext_alert_behind_the_server_hello():
    client, _ = client_and_flight()
    fault = fault_of(client.receive, b"\x15\x03\x03\x00\x02\x02\x28")
    assert isinstance(fault, errors.UnexpectedRecord)


def test_plaintext_alert_instead_of_a_server_hello():
    client = make_client(client_config(**PLAIN))
    with pytest.raises(errors.AlertReceived) as info:
        client.receive(b"\x15\x03\x01\x00\x02\x02\x28")
    assert info.value.description == Alert.HANDSHAKE_FAILURE


@pytest.mark.parametrize(
    "fault",
    [
        errors.CertificateRevoked,
        errors.CertificateUnknown,
        errors.AccessDenied,
        errors.UnknownCertificateAuthority,
        errors.CertificateExpired,
        errors.UnsupportedCertificate,
        errors.InsufficientSecurity,
    ],
)
def test_the_verifier_names_the_fault(fault):
    def refuse(chain, now_s):
        raise fault("no")

    identity = tls_pair.server_identity()
    config = server_config(client_auth=ClientAuthentication(refuse))
    client = make_client(client_config(**PLAIN, credential=lambda request: identity.credential()))
    server = make_server(config)
    with pytest.raises(fault):
        tls_pair.run(client, server, client_identity=identity)
    # The alert goes out under the application keys: the server's Finished is already sent.
    reader = tls_pair.ApplicationReader()
    reader.set_key(server._suite, server._result.tx.key, server._result.tx.iv)
    reader.feed(server.data_to_send())
    assert reader.open_one() == (21, bytes((2, errors._ALERTS[fault])))
