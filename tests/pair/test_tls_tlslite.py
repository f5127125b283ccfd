"""Both roles against tlslite-ng, an implementation of TLS that shares no code with OpenSSL."""

import socket
import threading
from contextlib import contextmanager

import pytest
import tls_pair
from cryptography.hazmat.primitives import serialization
from tls_pair import make_client, make_server, server_config, server_identity, sign_if_asked

from kdaemon.tls.constants import ContentType

tlslite = pytest.importorskip("tlslite.api", reason="tlslite-ng is not installed")

DEADLINE_S = 30


def settings(**options):
    result = tlslite.HandshakeSettings()
    result.minVersion = result.maxVersion = (3, 4)
    for name, value in options.items():
        setattr(result, name, value)
    return result


def drive(handshake, ours, identity):
    """Runs our end over a socket until it is complete."""
    while True:
        data = handshake.data_to_send()
        if data:
            ours.sendall(data)
        if handshake.complete:
            return
        handshake.receive(ours.recv(65536))
        sign_if_asked(handshake, identity)


@contextmanager
def peer(work):
    """A thread runs ``work(connection)`` on the other end of a socket pair; yields our end. Its failure is ours."""
    ours, theirs = socket.socketpair()
    ours.settimeout(DEADLINE_S)
    theirs.settimeout(DEADLINE_S)
    failures = []

    def run():
        try:
            work(tlslite.TLSConnection(theirs))
        except Exception as error:
            failures.append(error)
            theirs.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        with ours:
            yield ours
            thread.join(DEADLINE_S)
    finally:
        theirs.close()
    assert not thread.is_alive()
    assert not failures, failures


def talk_as_client_peer(connection):
    assert connection.read(min=4, max=4) == b"ping"
    connection.write(b"pong")


def talk(handshake, ours):
    """Our ping, their pong, with the established keys."""
    established = handshake.established
    tx = tls_pair.Direction(established.cipher_suite, established.tx)
    ours.sendall(tx.writer.write(ContentType.APPLICATION_DATA, b"ping"))
    rx = tls_pair.Direction(established.cipher_suite, established.rx)
    rx.reader.feed(established.leftover)
    while True:
        while len(rx.reader._buffer) < 5 or len(rx.reader._buffer) < 5 + int.from_bytes(rx.reader._buffer[3:5], "big"):
            rx.reader.feed(ours.recv(65536))
        content_type, content = rx.reader.open_one()
        if content_type == ContentType.APPLICATION_DATA:
            assert content == b"pong"
            return


@pytest.mark.parametrize("group", ["x25519", "secp256r1", "secp384r1"])
@pytest.mark.parametrize("cipher", ["aes128gcm", "aes256gcm", "chacha20-poly1305"])
def test_our_server(cipher, group):
    server = make_server(server_config(alpn=(b"http/1.1",), ticket_keys=tls_pair.ticket_keys()))

    def work(connection):
        connection.handshakeClientCert(
            settings=settings(cipherNames=[cipher], eccCurves=[group], keyShares=[group]),
            serverName="localhost",
            alpn=[b"http/1.1"],
        )
        talk_as_client_peer(connection)

    with peer(work) as ours:
        drive(server, ours, server_identity())
        talk(server, ours)
    assert server.established.alpn == b"http/1.1"


def test_our_server_asks_for_a_retry():
    server = make_server(server_config())

    def work(connection):
        options = settings(eccCurves=["x25519", "secp384r1"], keyShares=[])
        connection.handshakeClientCert(settings=options, serverName="localhost")
        talk_as_client_peer(connection)

    with peer(work) as ours:
        drive(server, ours, server_identity())
        talk(server, ours)
    assert server.established.retried


def test_our_server_resumes():
    config = server_config(ticket_keys=tls_pair.ticket_keys())
    sessions = []

    def work(connection):
        session = sessions.pop() if sessions else None
        connection.handshakeClientCert(settings=settings(), serverName="localhost", session=session)
        talk_as_client_peer(connection)
        sessions.append(connection.session)

    for resumed in (False, True):
        server = make_server(config)
        with peer(work) as ours:
            drive(server, ours, server_identity())
            talk(server, ours)
        assert server.established.resumed is resumed


@pytest.mark.parametrize("kind", ["p256", "rsa"])
def test_our_client(kind):
    identity = server_identity(kind)
    pem = identity.certificate.public_bytes(serialization.Encoding.PEM).decode()
    key_pem = identity.key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    chain = tlslite.X509CertChain()
    chain.parsePemList(pem)
    key = tlslite.parsePEMKey(key_pem, private=True)
    client = make_client(tls_pair.client_config(alpn=(b"http/1.1",)))

    def work(connection):
        connection.handshakeServer(certChain=chain, privateKey=key, settings=settings(), alpn=[b"http/1.1"])
        talk_as_client_peer(connection)

    with peer(work) as ours:
        drive(client, ours, identity)
        talk(client, ours)
    assert client.established.alpn == b"http/1.1"
