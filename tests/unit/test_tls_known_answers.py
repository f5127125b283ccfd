"""Traces of RFC 8448's final draft, byte for byte, with the randomness they give injected.

The vectors lie beside the repository (../shared/vectors); where they are absent the tests say so and are skipped.
"""

import json
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from kdaemon.tls import key_schedule
from kdaemon.tls.client import ClientHandshake
from kdaemon.tls.configuration import ClientAuthentication, ClientConfig, Credential, ServerConfig
from kdaemon.tls.constants import HELLO_RETRY_REQUEST_RANDOM, CipherSuite, NamedGroup, SignatureScheme
from kdaemon.tls.extensions import parse_supported_groups
from kdaemon.tls.key_exchange import EllipticCurveKeyShare, X25519KeyShare
from kdaemon.tls.messages import (
    parse_certificate,
    parse_certificate_verify,
    parse_client_hello,
    parse_encrypted_extensions,
    parse_new_session_ticket,
    parse_server_hello,
)
from kdaemon.tls.server import ServerHandshake
from kdaemon.tls.session import session_ticket
from kdaemon.tls.signing import HANDSHAKE_SCHEMES
from kdaemon.tls.tickets import TicketContents

BESIDE = Path(__file__).resolve().parents[2].parent / "shared" / "vectors" / "rfc8448-draft.json"
VECTORS = Path(os.environ.get("KDAEMON_TLS_VECTORS", BESIDE))
SUITE = key_schedule.SUITES[CipherSuite.TLS_AES_128_GCM_SHA256]
HASH = SUITE.hash

pytestmark = pytest.mark.skipif(not VECTORS.exists(), reason="../shared/vectors/rfc8448-draft.json is not here")

SIMPLE, RESUMED, RETRY, CLIENT_AUTH, COMPATIBILITY = (
    "Simple 1-RTT Handshake",
    "Resumed 0-RTT Handshake",
    "HelloRetryRequest",
    "Client Authentication",
    "Compatibility Mode",
)


class Trace:
    """The steps of one section."""

    def __init__(self, section):
        self.steps = [step for step in json.loads(VECTORS.read_text()) if step["section"] == section]

    def all(self, who, start):
        found = [
            {name: bytes.fromhex(value) for name, value in step["fields"].items()}
            for step in self.steps
            if step["who"] == who and step["step"].startswith(start) and step["fields"]
        ]
        assert found, (who, start)
        return found

    def one(self, who, start, index=0):
        return self.all(who, start)[index]

    def message(self, who, name, index=0):
        return self.one(who, f"construct a {name} handshake", index)[name]

    def records(self, who, kind="handshake"):
        return [step["complete record"] for step in self.all(who, f"send {kind} record")]

    def share(self, who, index=0):
        step = self.one(who, "create an ephemeral", index)
        return make_share(step["private key"], step["public key"])


def make_share(private, public):
    if len(public) == 32:
        share = X25519KeyShare(X25519PrivateKey.from_private_bytes(private))
    else:
        key = ec.derive_private_key(int.from_bytes(private, "big"), ec.SECP256R1())
        share = EllipticCurveKeyShare(NamedGroup.SECP256R1, key)
    assert share.public == public
    return share


def all_steps():
    return json.loads(VECTORS.read_text()) if VECTORS.exists() else []


def test_every_derivation():
    """Each HKDF step of every trace with the function that stands for it here."""
    count = 0
    for step in all_steps():
        fields = {name: bytes.fromhex(value) for name, value in step["fields"].items()}
        name = step["step"]
        if "info" in fields and "expanded" in fields:
            label = name.split('"tls13 ')[1].split('"')[0] if '"tls13 ' in name else "finished"
            size = len(fields["expanded"])
            context = fields["hash"]
            expanded = key_schedule.expand_label(HASH, fields["PRK"], label.encode(), context, size)
            assert expanded == fields["expanded"], name
            count += 1
        if "key expanded" in fields:
            key, iv = key_schedule.traffic_key(SUITE, fields["PRK"])
            assert (key, iv) == (fields["key expanded"], fields["iv expanded"]), name
            count += 1
        if name.startswith("extract secret") and "salt" in fields and name.split('"')[1] == "early":
            psk = None if fields["IKM"] == bytes(32) else fields["IKM"]
            stage = key_schedule.EarlyStage(HASH, psk)
            assert (HASH.early_no_psk if psk is None else stage._secret) == fields["secret"]
            count += 1
    assert count > 60


@pytest.mark.parametrize("section", [SIMPLE, RETRY, CLIENT_AUTH, COMPATIBILITY])
def test_stages(section):
    """The stages, from the shared secret to the application secrets."""
    trace = Trace(section)
    extract = trace.one("server", 'extract secret "handshake"')
    stage = key_schedule.EarlyStage(HASH).handshake_stage(extract["IKM"])
    client = trace.one("server", 'derive secret "tls13 c hs traffic"')
    assert stage.client_traffic_secret(client["hash"]) == client["expanded"]
    server = trace.one("server", 'derive secret "tls13 s hs traffic"')
    assert stage.server_traffic_secret(server["hash"]) == server["expanded"]
    master = stage.master_stage()
    for label, derive in (
        ("c ap traffic", master.client_traffic_secret),
        ("s ap traffic", master.server_traffic_secret),
        ("exp master", master.exporter_secret),
    ):
        step = trace.one("server", f'derive secret "tls13 {label}"')
        assert derive(step["hash"]) == step["expanded"]
    step = trace.one("client", 'derive secret "tls13 res master"')
    assert master.resumption_secret(step["hash"]) == step["expanded"]


# --- the server


class TracedServer(ServerHandshake):
    """Takes from the trace what depends on choices that are ours: the CertificateRequest."""

    certificate_request = b""

    def _make_certificate_request(self, client_auth):
        return self.certificate_request


def traced_server(trace, monkeypatch, **options):
    encrypted = parse_encrypted_extensions(trace.message("server", "EncryptedExtensions"))
    hellos = [parse_server_hello(step["ServerHello"]) for step in trace.all("server", "construct a ServerHello")]
    credential = None
    if any("Certificate handshake" in step["step"] for step in trace.steps):
        certificate = parse_certificate(trace.message("server", "Certificate"))
        scheme, _ = parse_certificate_verify(trace.message("server", "CertificateVerify"))
        credential = Credential("key", [entry.certificate_der for entry in certificate.entries], (scheme,))
    config = ServerConfig(
        credentials=lambda name, algorithms: credential,
        groups=(hellos[-1].extensions[51][0] << 8 | hellos[-1].extensions[51][1],),
        cipher_suites=(CipherSuite.TLS_AES_128_GCM_SHA256,),
        record_size_limit=0x4001 if 28 in encrypted else None,
        advertise_groups=parse_supported_groups(encrypted[10]) if 10 in encrypted else (),
        generate_key_share=lambda group: trace.share("server"),
        **options,
    )
    server = TracedServer(config, random=lambda size: hellos[-1].random, now_s=0.0)
    if len(hellos) == 2:  # the trace's HelloRetryRequest has a cookie, which a server that keeps state does not need
        from kdaemon.tls import server as module

        ours = module.serialize_server_hello

        def serialize(random, session_id, suite, extensions):
            if random != HELLO_RETRY_REQUEST_RANDOM:
                return ours(random, session_id, suite, extensions)
            assert extensions == {code: data for code, data in hellos[0].extensions.items() if code in (43, 51)}
            return trace.message("server", "ServerHello", 0)

        monkeypatch.setattr(module, "serialize_server_hello", serialize)
    return server


def finish_server(trace, server):
    _, signature = parse_certificate_verify(trace.message("server", "CertificateVerify"))
    assert server.sign_request.transcript_hash
    server.signature_ready(signature)


def check_application_keys(trace, established):
    write = trace.one("server", "derive write traffic keys for application")
    assert (established.tx.key, established.tx.iv) == (write["key expanded"], write["iv expanded"])
    read = trace.one("client", "derive write traffic keys for application")
    assert (established.rx.key, established.rx.iv) == (read["key expanded"], read["iv expanded"])
    exporter = trace.one("server", 'derive secret "tls13 exp master"')
    assert established.exporter_secret == exporter["expanded"]


@pytest.mark.parametrize("section", [SIMPLE, COMPATIBILITY])
def test_server_full(section, monkeypatch):
    trace = Trace(section)
    server = traced_server(trace, monkeypatch)
    client_hello, client_finished = trace.records("client")
    server.receive(client_hello)
    finish_server(trace, server)
    hello, flight = trace.records("server")[:2]
    change_cipher_spec = b"".join(trace.records("server", "change_cipher_spec")) if section == COMPATIBILITY else b""
    assert server.data_to_send() == hello + change_cipher_spec + flight
    if section == COMPATIBILITY:
        server.receive(b"".join(trace.records("client", "change_cipher_spec")))
    server.receive(client_finished)
    check_application_keys(trace, server.established)


def test_server_retry(monkeypatch):
    trace = Trace(RETRY)
    server = traced_server(trace, monkeypatch)
    first_hello, second_hello, client_finished = trace.records("client")
    retry_request, hello, flight = trace.records("server")
    server.receive(first_hello)
    assert server.data_to_send() == retry_request
    server.receive(second_hello)
    finish_server(trace, server)
    assert server.data_to_send() == hello + flight
    server.receive(client_finished)
    check_application_keys(trace, server.established)


def test_server_client_authentication(monkeypatch):
    trace = Trace(CLIENT_AUTH)
    server = traced_server(trace, monkeypatch, client_auth=lambda name: ClientAuthentication(lambda chain, now_s: None))
    server.certificate_request = trace.message("server", "CertificateRequest")
    client_hello, client_flight = trace.records("client")
    server.receive(client_hello)
    finish_server(trace, server)
    assert server.data_to_send() == b"".join(trace.records("server"))
    server.receive(client_flight)
    check_application_keys(trace, server.established)
    certificate = parse_certificate(trace.message("client", "Certificate"))
    assert server.established.peer_chain_der == tuple(entry.certificate_der for entry in certificate.entries)


class TraceTickets:
    """Opens the trace's ticket, which some other server sealed."""

    def __init__(self, identity, psk, age_add):
        self.identity, self.psk, self.age_add = identity, psk, age_add

    def open(self, identity):
        if identity != self.identity:
            return None
        return TicketContents(SUITE.code, 0, 100_000, 100, self.age_add, self.psk, "server", b"")


def test_server_resumed_up_to_the_server_hello(monkeypatch):
    """Behind ServerHello the ways part: the trace accepts early data, this server refuses it."""
    trace = Trace(RESUMED)
    record = trace.records("client")[0]
    hello = parse_client_hello(record[5:])
    identity = hello.extensions[41][4 : 4 + int.from_bytes(hello.extensions[41][2:4], "big")]
    age = int.from_bytes(hello.extensions[41][4 + len(identity) : 8 + len(identity)], "big")
    psk = trace.one("client", 'extract secret "early"')["IKM"]
    tickets = TraceTickets(identity, psk, age)
    server = traced_server(trace, monkeypatch, ticket_keys=tickets)
    server.receive(record)  # checks the binder
    sent = server.data_to_send()
    server_hello = trace.records("server")[0]
    assert sent[: len(server_hello)] == server_hello
    server.receive(trace.records("client", "application_data")[0])  # the early data is skipped
    assert not server.complete


# --- the client


class TracedClient(ClientHandshake):
    """Sends the trace's ClientHellos, whose order of extensions is another implementation's."""

    trace = None

    def _emit_client_hello(self, cookie):
        index = 1 if self._retry_transcript else 0
        self._hello = self.trace.message("client", "ClientHello", index)
        hello = parse_client_hello(self._hello)
        self._extensions = dict(hello.extensions)
        self._session_id = hello.session_id
        self._out.append(self.trace.records("client")[index])
        self._reader.change_cipher_spec_allowed = True


def traced_client(section, **options):
    trace = Trace(section)
    hello = parse_client_hello(trace.message("client", "ClientHello"))
    shares = {}
    for index, step in enumerate(trace.all("client", "create an ephemeral")):
        share = trace.share("client", index)
        shares[share.group] = share
        assert step["public key"] == share.public
    config = ClientConfig(
        verify=None,
        cipher_suites=tuple(suite for suite in hello.cipher_suites if suite in key_schedule.SUITES),
        groups=(NamedGroup.X25519, NamedGroup.SECP256R1),
        key_share_groups=(NamedGroup.X25519,),
        signature_schemes=HANDSHAKE_SCHEMES,
        record_size_limit=0x4001,
        compatibility_mode=bool(hello.session_id),
        grease=False,
        generate_key_share=shares.__getitem__,
        **options,
    )
    TracedClient.trace = trace
    return trace, TracedClient(config, "server", random=lambda size: hello.random[:size], now_s=0.0)


@pytest.mark.parametrize("section", [SIMPLE, COMPATIBILITY, RETRY])
def test_client(section):
    trace, client = traced_client(section)
    records = trace.records("client")
    assert client.data_to_send() == records[0]
    server_records = trace.records("server")
    change_cipher_spec = b"\x14\x03\x03\x00\x01\x01" if section == COMPATIBILITY else b""
    if section == RETRY:
        client.receive(server_records.pop(0))
        assert client.data_to_send() == records[1]
    client.receive(server_records[0] + change_cipher_spec + server_records[1])
    assert client.data_to_send() == change_cipher_spec + records[-1]
    step = trace.one("client", "derive write traffic keys for application")
    assert (client.established.tx.key, client.established.tx.iv) == (step["key expanded"], step["iv expanded"])
    step = trace.one("client", 'derive secret "tls13 res master"')
    assert client.established.resumption_secret == step["expanded"]
    if section == SIMPLE:
        ticket = parse_new_session_ticket(trace.message("server", "NewSessionTicket"))
        psk = trace.one("server", 'generate resumption secret "tls13 resumption"')["expanded"]
        session = session_ticket(ticket, SUITE.code, client.established.resumption_secret, 0.0)
        assert session.psk == psk


def test_client_authentication():
    trace = Trace(CLIENT_AUTH)
    certificate = parse_certificate(trace.message("client", "Certificate"))
    scheme, signature = parse_certificate_verify(trace.message("client", "CertificateVerify"))
    assert scheme == SignatureScheme.RSA_PSS_RSAE_SHA256
    credential = Credential("key", [entry.certificate_der for entry in certificate.entries], (scheme,))
    trace, client = traced_client(CLIENT_AUTH, credential=lambda request: credential)
    client.data_to_send()
    client.receive(b"".join(trace.records("server")))
    client.signature_ready(signature)
    assert client.data_to_send() == trace.records("client")[-1]
