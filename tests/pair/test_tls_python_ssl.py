"""Both roles against Python's ssl (OpenSSL) through memory BIOs."""

import ssl

import pytest
import tls_pair
from cryptography.hazmat.primitives import serialization
from tls_pair import KEY_KINDS, feed_bytes, feed_whole, make_server, server_config, server_identity, sign_if_asked

from kdaemon.tls.configuration import ClientAuthentication
from kdaemon.tls.constants import AlertDescription, ContentType, NamedGroup
from kdaemon.tls.errors import AlertReceived, CertificateNameMismatch, NoCommonVersion
from kdaemon.tls.key_schedule import SUITES


def connect(config, kind, context, *, session=None, feed=feed_whole):
    """Runs a handshake to its end; (client object, server handshake, client's input BIO, output BIO)."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname="localhost", session=session)
    server = make_server(config)
    for _ in range(4):
        try:
            client.do_handshake()
        except ssl.SSLWantReadError:
            pass
        data = outgoing.read()
        if data:
            feed(server, data)
        sign_if_asked(server, server_identity(kind))
        incoming.write(server.data_to_send())
    with pytest.raises(ssl.SSLWantReadError):
        client.read(1)  # takes in the tickets
    return client, server, incoming, outgoing


def client_context():
    context = ssl.create_default_context(cadata=tls_pair.authority().issuer_pem)
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


def exchange_data(client, server, incoming, outgoing):
    """One record each way with the established keys."""
    established = server.established
    aead = SUITES[established.cipher_suite].aead
    client.write(b"ping")
    record = outgoing.read()
    sequence = established.rx.sequence
    nonce = (int.from_bytes(established.rx.iv, "big") ^ sequence).to_bytes(12, "big")
    assert aead(established.rx.key).decrypt(nonce, record[5:], record[:5]) == b"ping\x17"
    nonce = (int.from_bytes(established.tx.iv, "big") ^ established.tx.sequence).to_bytes(12, "big")
    header = b"\x17\x03\x03" + (5 + 16).to_bytes(2, "big")
    incoming.write(header + aead(established.tx.key).encrypt(nonce, b"pong\x17", header))
    assert client.read(10) == b"pong"


@pytest.mark.parametrize("feed", [feed_whole, feed_bytes])
@pytest.mark.parametrize("kind", KEY_KINDS)
def test_full_then_resumed(kind, feed):
    config = server_config(kind, alpn=(b"http/1.1",), ticket_keys=tls_pair.ticket_keys())
    context = client_context()
    client, server, *bios = connect(config, kind, context, feed=feed)
    assert client.version() == "TLSv1.3"
    assert client.selected_alpn_protocol() == "http/1.1"
    assert server.established.alpn == b"http/1.1"
    assert server.established.server_name == "localhost"
    assert not server.established.resumed
    exchange_data(client, server, *bios)

    resumed, server, *bios = connect(config, kind, context, session=client.session, feed=feed)
    assert resumed.session_reused
    assert server.established.resumed
    exchange_data(resumed, server, *bios)


@pytest.mark.parametrize("suite", SUITES.values(), ids=lambda suite: suite.name)
def test_every_suite(suite):
    config = server_config(cipher_suites=(suite.code,))
    client, server, *bios = connect(config, "p256", client_context())
    assert client.cipher()[0] == suite.name
    assert server.established.cipher_suite == suite.code
    exchange_data(client, server, *bios)


@pytest.mark.parametrize(
    ("curve", "group"), [("prime256v1", NamedGroup.SECP256R1), ("secp384r1", NamedGroup.SECP384R1)]
)
def test_other_groups(curve, group):
    context = client_context()
    context.set_ecdh_curve(curve)
    client, server, *bios = connect(server_config(), "p256", context)
    assert server.established.group == group
    exchange_data(client, server, *bios)


def test_hello_retry_request():
    config = server_config(groups=(NamedGroup.SECP384R1,))
    client, server, *bios = connect(config, "p256", client_context())
    assert server.established.retried
    assert server.established.group == NamedGroup.SECP384R1
    exchange_data(client, server, *bios)


# --- our client


def server_context(kind, tmp_path, **options):
    identity = server_identity(kind)
    file = tmp_path / "server.pem"
    file.write_bytes(
        identity.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        + identity.certificate.public_bytes(serialization.Encoding.PEM)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    for name, value in options.items():
        setattr(context, name, value)
    return context


def accept(context, client, *, client_identity=None, feed=feed_whole):
    """Runs our client against a server object; (server object, its input BIO, output BIO)."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = context.wrap_bio(incoming, outgoing, server_side=True)
    for _ in range(4):
        incoming.write(client.data_to_send())
        try:
            server.do_handshake()
        except ssl.SSLWantReadError:
            pass
        data = outgoing.read()
        if data:
            feed(client, data)
        if client_identity is not None:
            sign_if_asked(client, client_identity)
    return server, incoming, outgoing


def exchange_from_client(client, server, incoming, outgoing):
    established = client.established
    tickets = tls_pair.receive_tickets(client)
    tx = tls_pair.Direction(established.cipher_suite, established.tx)
    incoming.write(tx.writer.write(ContentType.APPLICATION_DATA, b"ping"))
    assert server.read(10) == b"ping"
    server.write(b"pong")
    rx = tls_pair.Direction(established.cipher_suite, established.rx)
    rx.reader.sequence = len(tickets)
    rx.reader.feed(outgoing.read())
    assert rx.reader.open_one() == (ContentType.APPLICATION_DATA, b"pong")
    return tickets


@pytest.mark.parametrize("feed", [feed_whole, feed_bytes])
@pytest.mark.parametrize("kind", KEY_KINDS)
def test_client_full_then_resumed(kind, feed, tmp_path):
    context = server_context(kind, tmp_path)
    context.set_alpn_protocols(["http/1.1"])
    config = tls_pair.client_config(alpn=(b"h2", b"http/1.1"))
    client = tls_pair.make_client(config)
    bios = accept(context, client, feed=feed)
    assert client.established.alpn == b"http/1.1"
    assert client.established.group == NamedGroup.X25519  # OpenSSL 3.0 has no hybrid
    tickets = exchange_from_client(client, *bios)
    assert len(tickets) == 2

    client = tls_pair.make_client(config, session=tickets[0])
    server, *bios = accept(context, client, feed=feed)
    assert server.session_reused
    assert client.established.resumed
    exchange_from_client(client, server, *bios)


@pytest.mark.parametrize("suite", SUITES)
def test_client_suites(suite, tmp_path):
    client = tls_pair.make_client(tls_pair.client_config(cipher_suites=(suite,)))
    bios = accept(server_context("p256", tmp_path), client)
    assert client.established.cipher_suite == suite
    exchange_from_client(client, *bios)


def test_client_hello_retry_request(tmp_path):
    context = server_context("p256", tmp_path)
    context.set_ecdh_curve("secp384r1")
    client = tls_pair.make_client(tls_pair.client_config())
    bios = accept(context, client)
    assert client.established.retried
    assert client.established.group == NamedGroup.SECP384R1
    exchange_from_client(client, *bios)


@pytest.mark.parametrize("kind", KEY_KINDS)
def test_client_certificate(kind, tmp_path):
    context = server_context("p256", tmp_path)
    context.load_verify_locations(cadata=tls_pair.authority().issuer_pem)
    context.verify_mode = ssl.CERT_REQUIRED
    identity = tls_pair.issue("client", tls_pair.make_key(kind), tls_pair.authority())
    client = tls_pair.make_client(tls_pair.client_config(credential=lambda request: identity.credential()))
    server, *bios = accept(context, client, client_identity=identity)
    assert server.getpeercert()["subject"] == ((("commonName", "client"),),)
    exchange_from_client(client, server, *bios)


def test_client_refuses_another_name(tmp_path):
    client = tls_pair.make_client(tls_pair.client_config(), "example.com")
    with pytest.raises(CertificateNameMismatch):
        accept(server_context("p256", tmp_path), client)


def test_server_of_tls_1_2(tmp_path):
    context = server_context("p256", tmp_path, maximum_version=ssl.TLSVersion.TLSv1_2)
    client = tls_pair.make_client(tls_pair.client_config())
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = context.wrap_bio(incoming, outgoing, server_side=True)
    incoming.write(client.data_to_send())
    with pytest.raises(ssl.SSLError):
        server.do_handshake()
    with pytest.raises(AlertReceived) as info:
        client.receive(outgoing.read())
    assert info.value.description == AlertDescription.PROTOCOL_VERSION


def test_client_of_tls_1_2():
    context = client_context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(NoCommonVersion):
        connect(server_config(), "p256", context)


@pytest.mark.parametrize("kind", KEY_KINDS)
def test_server_asks_for_a_certificate(kind, tmp_path):
    identity = tls_pair.issue("client", tls_pair.make_key(kind), tls_pair.authority())
    file = tmp_path / "client.pem"
    file.write_bytes(
        identity.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        + identity.certificate.public_bytes(serialization.Encoding.PEM)
    )
    context = client_context()
    context.load_cert_chain(file)
    config = server_config(client_auth=ClientAuthentication(tls_pair.trust().verify_client))
    client, server, *bios = connect(config, "p256", context)
    assert server.established.peer_chain_der[0] == identity.der
    exchange_data(client, server, *bios)
