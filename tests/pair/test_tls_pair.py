"""Our client against our server: full, retried, resumed, pre-shared, with client certificates, in every split."""

import gc
import time
from dataclasses import replace

import pytest
import tls_pair
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from tls_pair import (
    KEY_KINDS,
    assert_agree,
    client_config,
    feed_bytes,
    feed_randomly,
    feed_whole,
    issue,
    make_client,
    make_key,
    make_server,
    receive_tickets,
    run,
    server_config,
    server_identity,
)

from kdaemon.tls import client_hello, errors
from kdaemon.tls import server as server_module
from kdaemon.tls.configuration import ClientAuthentication, ExternalPsk
from kdaemon.tls.constants import CipherSuite, NamedGroup
from kdaemon.tls.key_exchange import SUPPORTED_GROUPS
from kdaemon.tls.key_schedule import SHA256, SHA384, SUITES

FEEDS = [feed_whole, feed_bytes, feed_randomly]


@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("kind", KEY_KINDS)
def test_full(kind, feed):
    client = make_client(client_config(alpn=(b"h2", b"http/1.1")))
    server = make_server(server_config(kind, alpn=(b"http/1.1",)))
    run(client, server, identity=server_identity(kind), feed=feed)
    assert_agree(client, server)
    assert client.established.group == NamedGroup.X25519MLKEM768
    assert client.established.alpn == b"http/1.1"
    assert client.established.peer_chain_der == (server_identity(kind).der,)
    assert not client.established.leftover and not server.established.leftover


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("group", SUPPORTED_GROUPS)
def test_suites_and_groups(suite, group):
    client = make_client(client_config(groups=(group,), key_share_groups=(group,), cipher_suites=(suite,)))
    server = make_server(server_config())
    run(client, server)
    assert_agree(client, server)
    assert (client.established.cipher_suite, client.established.group) == (suite, group)
    assert not client.established.retried


@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("group", SUPPORTED_GROUPS)
def test_hello_retry_request(group, feed):
    other = NamedGroup.SECP384R1 if group != NamedGroup.SECP384R1 else NamedGroup.SECP256R1
    client = make_client(client_config(key_share_groups=(other,)))
    server = make_server(server_config(groups=(group,)))
    run(client, server, feed=feed)
    assert_agree(client, server)
    assert client.established.retried
    assert client.established.group == group


def test_server_without_hybrid_uses_the_classical_half():
    client = make_client(client_config())
    server = make_server(server_config(groups=(NamedGroup.SECP256R1, NamedGroup.X25519)))
    run(client, server)
    assert_agree(client, server)
    assert client.established.group == NamedGroup.X25519
    assert not client.established.retried


def test_known_preference_avoids_the_retry():
    client = make_client(client_config(), group=NamedGroup.SECP256R1)
    server = make_server(server_config(groups=(NamedGroup.SECP256R1,)))
    run(client, server)
    assert not client.established.retried


@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("suite", SUITES)
def test_resumption(suite, feed):
    keys = tls_pair.ticket_keys()
    settings = {"ticket_keys": keys, "ticket_count": 2}
    client = make_client(client_config(cipher_suites=(suite,)))
    run(client, server := make_server(server_config(**settings)), feed=feed)
    assert server.established.tx.sequence == 1
    tickets = receive_tickets(client)
    assert len(tickets) == 2
    assert tickets[0].psk != tickets[1].psk
    for ticket in tickets:
        client = make_client(client_config(cipher_suites=(suite,)), session=ticket)
        server = make_server(server_config(**settings))
        run(client, server, feed=feed)
        assert_agree(client, server)
        assert server.established.resumed
        assert receive_tickets(client)


def test_resumption_after_retry():
    keys = tls_pair.ticket_keys()
    client = make_client(client_config())
    run(client, make_server(server_config(ticket_keys=keys)))
    (ticket,) = receive_tickets(client)
    client = make_client(client_config(), session=ticket)
    server = make_server(server_config(ticket_keys=keys, groups=(NamedGroup.SECP384R1,)))
    run(client, server)
    assert_agree(client, server)
    assert server.established.resumed
    assert server.established.retried


def test_ticket_of_another_hash_chooses_its_suite():
    keys = tls_pair.ticket_keys()
    suites = (CipherSuite.TLS_AES_256_GCM_SHA384,)
    client = make_client(client_config(cipher_suites=suites))
    run(client, make_server(server_config(ticket_keys=keys)))
    (ticket,) = receive_tickets(client)
    client = make_client(client_config(), session=ticket)
    run(client, server := make_server(server_config(ticket_keys=keys)))
    assert server.established.resumed
    assert server.established.cipher_suite == CipherSuite.TLS_AES_256_GCM_SHA384


def _resume(ticket, *, server_now_s=None, client_options=None, **server_options):
    client = make_client(client_config(**client_options or {}), session=ticket)
    run(client, server := make_server(server_config(**server_options), now_s=server_now_s))
    assert_agree(client, server)
    return server.established.resumed


def test_tickets_that_do_not_resume():
    keys = tls_pair.ticket_keys()
    client = make_client(client_config())
    run(client, make_server(server_config(ticket_keys=keys)))
    (ticket,) = receive_tickets(client)
    now_s = time.time()
    assert _resume(ticket, ticket_keys=keys)
    assert not _resume(ticket, ticket_keys=tls_pair.ticket_keys())
    assert not _resume(ticket)
    assert not _resume(ticket, ticket_keys=keys, server_now_s=now_s + 90_000)  # expired at the server
    assert not _resume(ticket, ticket_keys=keys, server_now_s=now_s + 120)  # the ages disagree
    assert not _resume(ticket._replace(age_add=ticket.age_add ^ 0x40000000), ticket_keys=keys)
    assert not _resume(ticket._replace(ticket=ticket.ticket[:-1] + bytes((ticket.ticket[-1] ^ 1,))), ticket_keys=keys)
    assert not _resume(ticket._replace(ticket=ticket.ticket[:17]), ticket_keys=keys)


def test_ticket_belongs_to_its_name():
    keys = tls_pair.ticket_keys()
    client = make_client(client_config())
    run(client, make_server(server_config(ticket_keys=keys)))
    (ticket,) = receive_tickets(client)
    client = make_client(client_config(), "127.0.0.1", session=ticket)
    run(client, server := make_server(server_config(ticket_keys=keys)))
    assert not server.established.resumed


def test_bad_binder():
    keys = tls_pair.ticket_keys()
    client = make_client(client_config())
    run(client, make_server(server_config(ticket_keys=keys)))
    (ticket,) = receive_tickets(client)
    client = make_client(client_config(), session=ticket._replace(psk=bytes(32)))
    server = make_server(server_config(ticket_keys=keys))
    with pytest.raises(errors.BadBinder):
        server.receive(client.data_to_send())
    with pytest.raises(errors.AlertReceived) as info:
        client.receive(server.data_to_send())
    assert info.value.description == 51


@pytest.mark.parametrize("hash_", [SHA256, SHA384])
def test_external_psk(hash_):
    psk = ExternalPsk(b"nvme-host", b"k" * hash_.size, hash_)
    config = server_config(external_psk={psk.identity: psk}.get, psk_required=True)
    client = make_client(client_config(), session=psk)
    run(client, server := make_server(config))
    assert_agree(client, server)
    assert server.established.external_psk_identity == b"nvme-host"
    assert client.established.external_psk_identity == b"nvme-host"
    assert SUITES[client.established.cipher_suite].hash is hash_
    assert not client.established.resumed

    with pytest.raises(errors.UnknownPskIdentity):
        run(make_client(client_config()), make_server(config))


@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("kind", KEY_KINDS)
def test_client_certificate(kind, feed):
    identity = issue("client", make_key(kind), tls_pair.authority(), usage=ExtendedKeyUsageOID.CLIENT_AUTH)
    asked = []

    def choose(request):
        asked.append(request)
        return identity.credential()

    keys = tls_pair.ticket_keys()
    auth = ClientAuthentication(tls_pair.trust().verify_client, authorities=(b"0\x00",))
    config = server_config(client_auth=auth, ticket_keys=keys)
    client = make_client(client_config(credential=choose))
    run(client, server := make_server(config), client_identity=identity, feed=feed)
    assert_agree(client, server)
    assert server.established.peer_chain_der == (identity.der,)
    assert asked[0].authorities == (b"0\x00",)

    (ticket,) = receive_tickets(client)
    client = make_client(client_config(credential=choose), session=ticket)
    run(client, server := make_server(config), client_identity=identity, feed=feed)
    assert server.established.resumed
    assert server.established.peer_chain_der == (identity.der,)


def test_client_without_certificate():
    optional = server_config(client_auth=ClientAuthentication(tls_pair.trust().verify_client, required=False))
    client = make_client(client_config())
    run(client, server := make_server(optional))
    assert_agree(client, server)
    assert server.established.peer_chain_der == ()

    required = server_config(client_auth=ClientAuthentication(tls_pair.trust().verify_client))
    with pytest.raises(errors.CertificateRequired):
        run(make_client(client_config()), make_server(required))


def test_record_size_limit():
    client = make_client(client_config(record_size_limit=200))
    server = make_server(server_config(record_size_limit=500))
    run(client, server)
    assert_agree(client, server)
    assert client.established.record_size_max == 500
    assert server.established.record_size_max == 200


def test_record_size_limit_is_negotiated_unless_one_end_is_without():
    for client_limit, server_limit, negotiated in ((16385, 16385, True), (None, 16385, False), (16385, None, False)):
        client = make_client(client_config(record_size_limit=client_limit))
        server = make_server(server_config(record_size_limit=server_limit))
        hello = client.data_to_send()
        server.receive(hello)
        assert (b"\x00\x1c\x00\x02\x40\x01" in hello) == (client_limit is not None)
        assert (b"\x00\x1c\x00\x02\x40\x01" in server._flight) == negotiated
    assert client_config().record_size_limit == server_config().record_size_limit == 16385


@pytest.mark.parametrize("liar", ["client", "server"])
def test_more_than_the_limit_is_a_record_overflow(monkeypatch, liar):
    """One end takes 77 bytes and tells the other 16385."""
    module = client_hello if liar == "client" else server_module
    monkeypatch.setattr(module, "serialize_record_size_limit", lambda _: b"\x40\x01")
    identity = tls_pair.issue("client", tls_pair.make_key("p256"), tls_pair.authority())
    verify = ClientAuthentication(tls_pair.trust().verify_client)
    client = make_client(
        client_config(credential=lambda _: identity.credential(), record_size_limit=77 if liar == "client" else 16385)
    )
    server = make_server(server_config(client_auth=verify, record_size_limit=77 if liar == "server" else 16385))
    server_module._encrypted_extensions.cache_clear()
    try:
        with pytest.raises(errors.RecordOverflow):
            run(client, server, client_identity=identity)
    finally:
        server_module._encrypted_extensions.cache_clear()
    assert isinstance((client if liar == "client" else server)._error, errors.RecordOverflow)


def test_ocsp_staple():
    identity = server_identity()
    credential = identity.credential(ocsp=b"a response")
    config = server_config()
    config.credentials = lambda name, algorithms: credential
    client = make_client(client_config())
    run(client, make_server(config))
    assert client.established.ocsp_response == b"a response"
    client = make_client(client_config(request_ocsp=False))
    run(client, make_server(config))
    assert client.established.ocsp_response is None


def test_key_log_agrees():
    lines = {"client": [], "server": []}
    client = make_client(client_config(key_log=lines["client"].append))
    run(client, make_server(server_config(key_log=lines["server"].append)))
    assert sorted(lines["client"]) == sorted(lines["server"])
    assert {line.split()[0] for line in lines["client"]} == {
        "CLIENT_HANDSHAKE_TRAFFIC_SECRET",
        "SERVER_HANDSHAKE_TRAFFIC_SECRET",
        "CLIENT_TRAFFIC_SECRET_0",
        "SERVER_TRAFFIC_SECRET_0",
        "EXPORTER_SECRET",
    }


def test_data_glued_to_finished_is_left_over_at_every_split():
    data = bytes(range(200))
    hybrid_free = client_config(groups=(NamedGroup.X25519,), key_share_groups=(NamedGroup.X25519,))
    size = 6 + 5 + 4 + 32 + 17 + len(data)  # change_cipher_spec, Finished, data
    for split in range(size + 1):
        client = make_client(hybrid_free)
        server = make_server(server_config())
        server.receive(client.data_to_send())
        tls_pair.sign_if_asked(server, server_identity())
        client.receive(server.data_to_send())
        flight = client.data_to_send() + data
        assert len(flight) == size
        server.receive(flight[:split])
        server.receive(flight[split:])
        assert server.established.leftover == data


def test_nothing_is_left_behind():
    """No cycles: everything of a handshake is freed when its owner drops it, without the garbage collector."""
    keys = tls_pair.ticket_keys()
    config, client_options = server_config(ticket_keys=keys), client_config()

    run(make_client(client_options), make_server(config))
    gc.collect()
    gc.disable()
    try:
        client = make_client(client_options)
        server = make_server(config)
        run(client, server)
        del client, server
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_the_client_hello_is_not_kept_while_finished_is_awaited():
    client = make_client(client_config())
    server = make_server(server_config())
    server.receive(client.data_to_send())
    tls_pair.sign_if_asked(server, server_identity())
    assert not hasattr(server, "_offer")
    client.receive(server.data_to_send())
    server.receive(client.data_to_send())
    assert server.complete


def resume(config, ticket, *, now_s):
    """The server of a connection at ``now_s`` that was offered ``ticket``, and the ticket it gave."""
    client = make_client(client_config(verify=None), session=ticket, now_s=now_s)
    run(client, server := make_server(config, now_s=now_s))
    tickets = receive_tickets(client, now_s=now_s)
    return server.established.resumed, tickets[0] if tickets else None


def test_no_chain_of_resumptions_outlives_seven_days():
    day_s = 86_400
    config = server_config(ticket_keys=tls_pair.ticket_keys(), ticket_lifetime_s=3 * day_s)
    now_s = time.time()
    client = make_client(client_config(), now_s=now_s)
    run(client, make_server(config, now_s=now_s))
    (ticket,) = receive_tickets(client, now_s=now_s)
    for days in (2, 4, 6):
        resumed, ticket = resume(config, ticket, now_s=now_s + days * day_s)
        assert resumed
    assert ticket.lifetime_s == day_s
    resumed, _ = resume(config, ticket, now_s=now_s + 6.99 * day_s)
    assert resumed
    ticket = ticket._replace(lifetime_s=7 * day_s)
    resumed, _ = resume(config, ticket, now_s=now_s + 7.01 * day_s)
    assert not resumed


def test_a_session_ends_with_the_clients_certificate():
    identity = issue("client", make_key("p256"), tls_pair.authority(), usage=ExtendedKeyUsageOID.CLIENT_AUTH)
    expires_s = x509.load_der_x509_certificate(identity.der).not_valid_after_utc.timestamp()
    auth = ClientAuthentication(tls_pair.trust().verify_client, context=b"one")
    config = server_config(client_auth=auth, ticket_keys=tls_pair.ticket_keys(), ticket_lifetime_s=86_400)
    now_s = expires_s - 100
    client = make_client(client_config(verify=None, credential=lambda _: identity.credential()), now_s=now_s)
    run(client, make_server(config, now_s=now_s), client_identity=identity)
    (ticket,) = receive_tickets(client, now_s=now_s)
    assert ticket.lifetime_s == 100
    assert resume(config, ticket, now_s=now_s + 99)[0]

    other = server_config(client_auth=replace(auth, context=b"two"), ticket_keys=config.ticket_keys)
    with pytest.raises(errors.CertificateRequired):
        resume(other, ticket, now_s=now_s + 10)
