"""What a server does with records after the ClientHello: in the clear, protected, and early data that it refuses."""

import pytest
from tls_pair import ApplicationReader, make_server, server_config, server_identity, sign_if_asked
from tls_puppet import client_hello, fault_of, plain_record, with_extension, writer_with

from kdaemon.tls import errors
from kdaemon.tls.constants import AlertDescription as Alert
from kdaemon.tls.constants import ContentType, NamedGroup
from kdaemon.tls.constants import ExtensionType as Extension
from kdaemon.tls.extensions import serialize_offered_psks
from kdaemon.tls.messages import parse_client_hello, serialize_client_hello

PSK = serialize_offered_psks(((b"unknown", 0),), (bytes(32),))


def start(message, config=None):
    server = make_server(config or server_config())
    server.receive(plain_record(message))
    return server


def extension(code, data):
    return lambda hello: with_extension(hello, code, data)


# --- records after the hello


def server_before_finished(**options):
    message, client = client_hello(**options)
    server = start(message)
    sign_if_asked(server, server_identity())
    client.receive(server.data_to_send())
    return server, client, writer_with(server._suite, server._client_secret)


def test_change_cipher_spec_is_dropped_and_counted():
    server, client, _ = server_before_finished()
    for _ in range(31):
        server.receive(b"\x14\x03\x03\x00\x01\x01")
    server.receive(client.data_to_send())  # has one of its own
    assert server.complete
    server, _, _ = server_before_finished()
    fault = fault_of(server.receive, b"\x14\x03\x03\x00\x01\x01" * 33)
    assert isinstance(fault, errors.TooManyRecords)


@pytest.mark.parametrize("body", [b"", b"\x00", b"\x02", b"\x01\x01"])
def test_malformed_change_cipher_spec(body):
    server, _, _ = server_before_finished()
    fault = fault_of(server.receive, plain_record(body, ContentType.CHANGE_CIPHER_SPEC))
    assert fault.alert == Alert.UNEXPECTED_MESSAGE


def test_change_cipher_spec_under_protection():
    server, _, writer = server_before_finished()
    fault = fault_of(server.receive, writer.write(ContentType.CHANGE_CIPHER_SPEC, b"\x01"))
    assert fault.alert == Alert.UNEXPECTED_MESSAGE


def test_padded_records():
    for padding in (1, 255, 16384 - 36):
        server, client, writer = server_before_finished()
        finished = tls_pair_finished(client, server)
        aead, nonce = writer._aead, writer._iv.to_bytes(12, "big")
        inner = finished + b"\x16" + bytes(padding)
        header = b"\x17\x03\x03" + (len(inner) + 16).to_bytes(2, "big")
        server.receive(header + aead.encrypt(nonce, inner, header))
        assert server.complete


def tls_pair_finished(client, server):
    """The client's Finished message, in the clear."""
    from tls_puppet import read_messages

    data = client.data_to_send()
    return read_messages(data[6:], server._suite, server._client_secret)[0]


@pytest.mark.parametrize(
    ("inner", "alert"),
    [
        (b"", Alert.UNEXPECTED_MESSAGE),
        (bytes(100), Alert.UNEXPECTED_MESSAGE),
        (b"\x16", Alert.UNEXPECTED_MESSAGE),
        (b"\x16\x00\x00", Alert.UNEXPECTED_MESSAGE),
        (b"\x15", Alert.UNEXPECTED_MESSAGE),
        (b"data\x17", Alert.UNEXPECTED_MESSAGE),
        (b"data\x40", Alert.UNEXPECTED_MESSAGE),
        (bytes(16385) + b"\x16", Alert.RECORD_OVERFLOW),
        (b"\x14" + bytes(16385), Alert.RECORD_OVERFLOW),
    ],
)
def test_protected_records(inner, alert):
    server, _, writer = server_before_finished()
    header = b"\x17\x03\x03" + (len(inner) + 16).to_bytes(2, "big")
    record = header + writer._aead.encrypt(writer._iv.to_bytes(12, "big"), inner, header)
    assert fault_of(server.receive, record).alert == alert


def test_records_that_do_not_decrypt():
    for size in (0, 1, 15, 16, 17, 100):
        server, _, _ = server_before_finished()
        fault = fault_of(server.receive, b"\x17\x03\x03" + size.to_bytes(2, "big") + bytes(size))
        assert isinstance(fault, errors.BadRecordMac)
    server, _, _ = server_before_finished()
    assert isinstance(fault_of(server.receive, b"\x17\x03\x03\x41\x01"), errors.RecordOverflow)


def test_alerts_in_the_clear_until_the_first_protected_record():
    server, _, _ = server_before_finished()
    with pytest.raises(errors.AlertReceived):
        server.receive(b"\x15\x03\x03\x00\x02\x02\x2f")
    server, _, writer = server_before_finished()
    server.receive(writer.write(ContentType.ALERT, b"\x01\x5a"))  # user_canceled
    assert isinstance(fault_of(server.receive, b"\x15\x03\x03\x00\x02\x02\x2f"), errors.UnexpectedRecord)


def test_warnings_are_counted():
    server, _, writer = server_before_finished()
    for _ in range(4):
        server.receive(writer.write(ContentType.ALERT, b"\x01\x5a"))
    assert isinstance(fault_of(server.receive, writer.write(ContentType.ALERT, b"\x01\x5a")), errors.TooManyRecords)


def test_close_notify_in_the_handshake():
    server, _, writer = server_before_finished()
    with pytest.raises(errors.CloseNotifyReceived):
        server.receive(writer.write(ContentType.ALERT, b"\x01\x00"))
    # RFC 8446 §6.1: close_notify before our write side is closed. The Finished is sent, so it is under the next keys.
    assert alert_of(server) == b"\x01\x00"
    server = make_server(server_config())
    with pytest.raises(errors.CloseNotifyReceived):
        server.receive(plain_record(b"\x01\x00", ContentType.ALERT))
    assert server.data_to_send() == plain_record(b"\x01\x00", ContentType.ALERT)


def alert_of(server):
    """The alert that is sent behind the server's flight."""
    reader = ApplicationReader()
    reader.set_key(server._suite, server._result.tx.key, server._result.tx.iv)
    reader.feed(server.data_to_send())
    content_type, content = reader.open_one()
    assert content_type == ContentType.ALERT
    return content


FINISHED_IN_TWO = (b"\x14\x00\x00", b"\x20" + bytes(32))


def test_alert_between_the_fragments_of_a_message():
    server, _, writer = server_before_finished()
    server.receive(writer.write(ContentType.HANDSHAKE, FINISHED_IN_TWO[0]))
    fault = fault_of(server.receive, writer.write(ContentType.ALERT, b"\x01\x5a"))
    assert fault.alert == Alert.UNEXPECTED_MESSAGE
    # A peer that gives up may do so anywhere.
    for alert, error in ((b"\x02\x50", errors.AlertReceived), (b"\x01\x00", errors.CloseNotifyReceived)):
        server, _, writer = server_before_finished()
        server.receive(writer.write(ContentType.HANDSHAKE, FINISHED_IN_TWO[0]))
        with pytest.raises(error):
            server.receive(writer.write(ContentType.ALERT, alert))


def test_fragments_in_a_protected_and_a_plain_record():
    server, _, writer = server_before_finished()
    server.receive(writer.write(ContentType.HANDSHAKE, FINISHED_IN_TWO[0]))
    assert fault_of(server.receive, plain_record(FINISHED_IN_TWO[1])).alert == Alert.UNEXPECTED_MESSAGE


def test_change_cipher_spec_between_the_fragments_of_a_message_is_dropped():
    """RFC 8446 §5: it is dropped at any time before Finished; it is nobody's message."""
    server, client, writer = server_before_finished()
    finished = tls_pair_finished(client, server)
    for part in (finished[:3], finished[3:20]):
        server.receive(writer.write(ContentType.HANDSHAKE, part) + b"\x14\x03\x03\x00\x01\x01")
    server.receive(writer.write(ContentType.HANDSHAKE, finished[20:]))
    assert server.complete


def test_finished_in_the_clear():
    server, _, _ = server_before_finished()
    fault = fault_of(server.receive, plain_record(b"\x14\x00\x00\x20" + bytes(32)))
    assert isinstance(fault, errors.UnexpectedRecord)


def test_bad_finished():
    server, _, writer = server_before_finished()
    fault = fault_of(server.receive, writer.write(ContentType.HANDSHAKE, b"\x14\x00\x00\x20" + bytes(32)))
    assert isinstance(fault, errors.BadFinished)
    server, _, writer = server_before_finished()
    fault = fault_of(server.receive, writer.write(ContentType.HANDSHAKE, b"\x14\x00\x00\x1f" + bytes(31)))
    assert fault.alert == Alert.DECODE_ERROR


def test_waiting_for_a_signature_is_bounded():
    message, _ = client_hello()
    server = start(message)
    assert server.sign_request is not None
    with pytest.raises(errors.TooManyRecords):
        for _ in range(40):
            server.receive(bytes(16384))


# --- early data, refused


def early_hello(**options):
    def change(hello):
        extensions = {**hello.extensions, Extension.EARLY_DATA: b"", Extension.PRE_SHARED_KEY: PSK}
        return hello._replace(extensions=extensions)

    message, client = client_hello(**options)
    message = serialize_client_hello(change(parse_client_hello(message)))
    client._hello = message
    client._extensions = parse_client_hello(message).extensions
    return message, client


@pytest.mark.parametrize("count", [0, 1, 5])
def test_early_data_is_skipped(count):
    message, client = early_hello()
    server = start(message)
    early = plain_record(bytes(1000), ContentType.APPLICATION_DATA) * count
    server.receive(early[:700])
    sign_if_asked(server, server_identity())
    server.receive(early[700:])
    client.receive(server.data_to_send())
    server.receive(client.data_to_send())
    assert server.complete


def test_early_data_is_skipped_up_to_a_bound():
    message, _ = early_hello()
    server = start(message)
    sign_if_asked(server, server_identity())
    record = plain_record(bytes(4096 + 17), ContentType.APPLICATION_DATA)
    server.receive(record * 4)
    assert isinstance(fault_of(server.receive, record), errors.BadRecordMac)


def test_early_data_before_a_second_hello_is_skipped():
    message, client = early_hello(groups=(NamedGroup.X25519, NamedGroup.SECP256R1))
    server = start(message, server_config(groups=(NamedGroup.SECP256R1,)))
    record = plain_record(bytes(1000), ContentType.APPLICATION_DATA)
    server.receive(record)
    client.receive(server.data_to_send())
    server.receive(record + client.data_to_send())
    sign_if_asked(server, server_identity())
    client.receive(server.data_to_send())
    server.receive(client.data_to_send())
    assert server.complete


def test_no_skipping_without_the_extension():
    server, _, _ = server_before_finished()
    assert isinstance(
        fault_of(server.receive, plain_record(bytes(1000), ContentType.APPLICATION_DATA)), errors.BadRecordMac
    )


def test_no_skipping_behind_a_record_that_decrypts():
    message, _ = early_hello()
    server = start(message)
    sign_if_asked(server, server_identity())
    writer = writer_with(server._suite, server._client_secret)
    server.receive(plain_record(bytes(100), ContentType.APPLICATION_DATA))
    server.receive(writer.write(ContentType.ALERT, b"\x01\x5a"))
    fault = fault_of(server.receive, plain_record(bytes(100), ContentType.APPLICATION_DATA))
    assert isinstance(fault, errors.BadRecordMac)
