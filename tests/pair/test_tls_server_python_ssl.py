"""The server engine against Python's ssl (OpenSSL) through memory BIOs."""

import ssl

import pytest
import tls_pair
from tls_pair import KEY_KINDS, feed_bytes, feed_whole, make_server, server_config, server_identity, sign_if_asked

from kdaemon.tls.constants import NamedGroup
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
