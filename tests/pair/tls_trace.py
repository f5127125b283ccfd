"""Handshakes with OpenSSL that can be repeated byte for byte: ``python tests/pair/tls_trace.py FILE`` captures them.

All of our randomness comes from a seed, time is part of the trace, and signatures are Ed25519, which has no randomness.
The secrets in a trace are OpenSSL's own words, from its key log.
"""

import hashlib
import json
import ssl
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

import tls_pair
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from kdaemon.tls import signing
from kdaemon.tls.client import ClientHandshake
from kdaemon.tls.configuration import ClientConfig, Credential, ServerConfig
from kdaemon.tls.constants import NamedGroup, SignatureScheme
from kdaemon.tls.key_exchange import EllipticCurveKeyShare, X25519KeyShare
from kdaemon.tls.server import ServerHandshake
from kdaemon.tls.session import SessionTicket

CURVES = {NamedGroup.SECP256R1: ec.SECP256R1(), NamedGroup.SECP384R1: ec.SECP384R1()}
OPENSSL_GROUPS = {
    NamedGroup.X25519: "X25519",
    NamedGroup.SECP256R1: "prime256v1",
    NamedGroup.SECP384R1: "secp384r1",
}


class Seeded:
    """Randomness and key shares from a seed."""

    def __init__(self, seed: str) -> None:
        self._seed = seed
        self._count = 0

    def random(self, size: int) -> bytes:
        self._count += 1
        return hashlib.shake_256(f"{self._seed} {self._count}".encode()).digest(size)

    def key_share(self, group: int):
        if group == NamedGroup.X25519:
            return X25519KeyShare(X25519PrivateKey.from_private_bytes(self.random(32)))
        value = int.from_bytes(self.random(48), "big") % 2**250 + 1
        return EllipticCurveKeyShare(group, ec.derive_private_key(value, CURVES[group]))


def make_client(trace: dict, key_log) -> ClientHandshake:
    """Our client of a trace; its ClientHello is ready."""
    seeded = Seeded(trace["name"])
    config = ClientConfig(
        verify=None,
        cipher_suites=(trace["suite"],),
        groups=tuple(trace["groups"]),
        key_share_groups=(trace["groups"][0],),
        alpn=(b"http/1.1",),
        record_size_limit=None,  # as when the traces were captured
        key_log=key_log,
        generate_key_share=seeded.key_share,
    )
    session = None
    if "session" in trace:
        stored = trace["session"]
        session = SessionTicket(
            stored["suite"],
            bytes.fromhex(stored["psk"]),
            bytes.fromhex(stored["ticket"]),
            stored["age_add"],
            stored["lifetime_s"],
            stored["received_at_s"],
        )
    return ClientHandshake(config, "localhost", random=seeded.random, now_s=trace["now_s"], session=session)


def make_server(trace: dict, key_log) -> ServerHandshake:
    """Our server of a trace."""
    seeded = Seeded(trace["name"])
    credential = Credential("key", [bytes.fromhex(trace["certificate"])], (SignatureScheme.ED25519,))
    config = ServerConfig(
        credentials=lambda name, algorithms: credential,
        cipher_suites=(trace["suite"],),
        groups=tuple(trace["groups"]),
        alpn=(b"http/1.1",),
        record_size_limit=None,  # as when the traces were captured
        key_log=key_log,
        generate_key_share=seeded.key_share,
    )
    return ServerHandshake(config, random=seeded.random, now_s=trace["now_s"])


def sign(trace: dict, handshake) -> None:
    """Answers a sign request with the trace's key."""
    request = handshake.sign_request
    if request is not None:
        key = ed25519.Ed25519PrivateKey.from_private_bytes(bytes.fromhex(trace["key"]))
        handshake.signature_ready(signing.sign(key, request.scheme, request.role, request.transcript_hash))


def _capture(trace: dict, handshake, end, incoming, outgoing) -> None:
    """Lets the two talk and writes down every flight as (who, hex)."""
    trace["flights"] = []
    for _ in range(6):
        data = handshake.data_to_send()
        if data:
            trace["flights"].append(["ours", data.hex()])
            incoming.write(data)
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            pass
        data = outgoing.read()
        if data:
            trace["flights"].append(["openssl", data.hex()])
            handshake.receive(data)
            sign(trace, handshake)
    assert handshake.complete


def capture() -> list[dict]:
    """All traces, fresh."""
    identity = tls_pair.issue("localhost", tls_pair.make_key("ed25519"), names=("localhost",))
    private = identity.key.private_bytes_raw().hex()
    now_s = float(int(time.time()))
    traces = []
    cases = [
        (suite, groups, openssl_group)
        for suite in (0x1301, 0x1302, 0x1303)
        for groups, openssl_group in (
            ([NamedGroup.X25519], NamedGroup.X25519),
            ([NamedGroup.SECP256R1], NamedGroup.SECP256R1),
            ([NamedGroup.X25519, NamedGroup.SECP384R1], NamedGroup.SECP384R1),
        )
    ]
    with tempfile.TemporaryDirectory() as folder:
        pem = Path(folder) / "identity.pem"
        pem.write_bytes(
            identity.key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            + identity.certificate.public_bytes(serialization.Encoding.PEM)
        )
        for suite, groups, openssl_group in cases:
            for role in ("client", "server"):
                trace = {"role": role, "suite": suite, "groups": groups, "now_s": now_s, "openssl": ssl.OPENSSL_VERSION}
                trace |= {"certificate": identity.der.hex(), "key": private}
                traces += _capture_case(trace, openssl_group, pem)
    return traces


def _capture_case(trace, openssl_group, pem) -> list[dict]:
    role, now_s = trace["role"], trace["now_s"]
    name = f"{role} {trace['suite']:#06x} {OPENSSL_GROUPS[openssl_group]}"
    if role == "server" and len(trace["groups"]) > 1:
        return []  # Python's ssl cannot be told which share to send first
    trace = {"name": name, **trace}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if role == "client" else ssl.PROTOCOL_TLS_CLIENT)
    if role == "client":
        context.load_cert_chain(pem)
    else:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    context.set_ecdh_curve(OPENSSL_GROUPS[openssl_group])
    context.set_alpn_protocols(["http/1.1"])
    result = [_run(trace, context, pem)]
    if role == "client":
        handshake = result[0].pop("handshake")
        (ticket, *_) = tls_pair.receive_tickets(handshake, now_s=now_s)
        session = {
            "suite": ticket.cipher_suite,
            "psk": ticket.psk.hex(),
            "ticket": ticket.ticket.hex(),
            "age_add": ticket.age_add,
            "lifetime_s": ticket.lifetime_s,
            "received_at_s": now_s,
        }
        resumed = {**trace, "name": f"{name} resumed", "session": session}
        result.append(_run(resumed, context, pem))
        assert resumed["handshake"].established.resumed
    for entry in result:
        entry.pop("handshake", None)
    return result


def _run(trace, context, pem) -> dict:
    key_log = pem.with_name("keylog")
    key_log.write_text("")
    context.keylog_filename = str(key_log)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    server_side = trace["role"] == "client"
    end = context.wrap_bio(
        incoming, outgoing, server_side=server_side, server_hostname=None if server_side else "localhost"
    )
    handshake = make_client(trace, None) if server_side else make_server(trace, None)
    _capture(trace, handshake, end, incoming, outgoing)
    trace["key_log"] = sorted(line for line in key_log.read_text().splitlines() if not line.startswith("#"))
    trace["handshake"] = handshake
    return trace


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(capture(), indent=1) + "\n")
