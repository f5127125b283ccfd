"""Every (state, message) pair of both engines, generated from their transition tables."""

import pytest
import tls_pair
from tls_pair import client_config, issue, make_client, make_key, make_server, server_config, sign_if_asked
from tls_puppet import PLAIN, ServerFlight, client_hello, fault_of, plain_record, writer_with

from kdaemon.tls.client import ClientHandshake, ClientState
from kdaemon.tls.configuration import ClientAuthentication
from kdaemon.tls.constants import ContentType, HandshakeType, NamedGroup
from kdaemon.tls.errors import MessageTooLong, TlsFault, UnexpectedMessage
from kdaemon.tls.messages import Certificate, CertificateEntry, serialize_certificate, serialize_message
from kdaemon.tls.server import ServerHandshake, ServerState

TYPES = [code for code in vars(HandshakeType).values() if isinstance(code, int)] + [7, 99, 255]


def server_in(state):
    """A server in a state, and a function that sends it a handshake message."""
    config = server_config()
    if state in (ServerState.EXPECT_CERTIFICATE, ServerState.EXPECT_CERTIFICATE_VERIFY):
        config = server_config(client_auth=ClientAuthentication(lambda chain, now_s: None))
    if state == ServerState.EXPECT_SECOND_CLIENT_HELLO:
        config = server_config(groups=(NamedGroup.SECP256R1,))
    server = make_server(config)
    if state == ServerState.EXPECT_CLIENT_HELLO:
        return server, lambda message: server.receive(plain_record(message))
    if state == ServerState.EXPECT_SECOND_CLIENT_HELLO:
        message, _ = client_hello(groups=(NamedGroup.X25519, NamedGroup.SECP256R1))
        server.receive(plain_record(message))
        return server, lambda message: server.receive(plain_record(message))
    message, _ = client_hello()
    server.receive(plain_record(message))
    sign_if_asked(server, tls_pair.server_identity())
    writer = writer_with(server._suite, server._client_secret)

    def send(message):
        server.receive(writer.write(ContentType.HANDSHAKE, message))

    if state == ServerState.EXPECT_CERTIFICATE_VERIFY:
        der = issue("client", make_key("p256")).der
        send(serialize_certificate(Certificate(b"", (CertificateEntry(der, {}),))))
    return server, send


def client_in(state):
    """A client in a state, and a function that sends it a handshake message."""
    client = make_client(client_config(**{**PLAIN, "groups": (NamedGroup.X25519, NamedGroup.SECP256R1)}))
    if state == ClientState.EXPECT_SERVER_HELLO:
        return client, lambda message: client.receive(plain_record(message))
    if state == ClientState.EXPECT_SECOND_SERVER_HELLO:
        server = make_server(server_config(groups=(NamedGroup.SECP256R1,)))
        server.receive(client.data_to_send())
        client.receive(server.data_to_send())
        return client, lambda message: client.receive(plain_record(message))
    asks = state == ClientState.EXPECT_CERTIFICATE
    config = server_config(client_auth=ClientAuthentication(lambda chain, now_s: None)) if asks else server_config()
    flight = ServerFlight(client, config)
    client.receive(plain_record(flight.hello))
    for message in flight.messages:
        if client.state == state:
            break
        flight.send(client, message)
    return client, lambda message: flight.send(client, message)


@pytest.mark.parametrize("message_type", TYPES)
@pytest.mark.parametrize("state", list(ServerState)[:-1], ids=lambda state: state.name)
def test_server(state, message_type):
    check(ServerHandshake, server_in, state, message_type)


@pytest.mark.parametrize("message_type", TYPES)
@pytest.mark.parametrize("state", list(ClientState)[:-1], ids=lambda state: state.name)
def test_client(state, message_type):
    check(ClientHandshake, client_in, state, message_type)


def check(engine, engine_in, state, message_type):
    handshake, send = engine_in(state)
    assert handshake.state == state
    expectation = engine.TRANSITIONS[state].get(message_type)
    fault = fault_of(send, serialize_message(message_type, b"\x00" * 3))
    if expectation is None:
        assert isinstance(fault, UnexpectedMessage)
        return
    assert not isinstance(fault, UnexpectedMessage)
    assert handshake.data_to_send()

    # Over its bound a message is refused at its header: the body is never sent here.
    handshake, send = engine_in(state)
    header = bytes((message_type,)) + (expectation.size_max + 1).to_bytes(3, "big")
    assert isinstance(fault_of(send, header), MessageTooLong)
    assert not handshake._fragments


@pytest.mark.parametrize("state", list(ServerState)[:-1], ids=lambda state: state.name)
def test_server_takes_no_application_data(state):
    server, _ = server_in(state)
    record = b"\x17\x03\x03\x00\x20" + bytes(32)
    assert fault_of(server.receive, record).alert in (10, 20)


def test_a_fault_is_final():
    server, send = server_in(ServerState.EXPECT_FINISHED)
    fault = fault_of(send, serialize_message(HandshakeType.KEY_UPDATE, b"\x00"))
    server.data_to_send()
    with pytest.raises(TlsFault) as info:
        server.receive(b"more")
    assert info.value is fault
    assert server.data_to_send() == b""
    assert not server.complete
