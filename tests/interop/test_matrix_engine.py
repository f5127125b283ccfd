"""Client certificates, resumption and KeyUpdate between our engine and the peers of the matrix, in both directions.

The daemon has no setting for client certificates, and `kdaemon connect` makes one connection: so here the engine stands
alone. Suites, groups and the servers' certificates are test_matrix.py's.
"""

import hashlib
import socket
import sys
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID
from support import peer_commands, peer_programs

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pair"))
import tls_pair
from tls_pair import issue, make_client, make_key, server_config, server_identity
from tls_socket import DEADLINE_S, Connection, complete, our_server

from kdaemon.tls.configuration import ClientAuthentication
from kdaemon.tls.constants import ContentType
from kdaemon.tls.signing import Role

pytestmark = pytest.mark.slow

SUITES = ["TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"]
GROUPS = ["x25519", "secp256r1", "secp384r1"]
KINDS = ("p256", "p384", "ed25519", "rsa")
CLIENTS = {
    "s_client": KINDS,
    "gnutls-cli": KINDS,
    "tstclnt": ("p256", "p384", "rsa"),  # NSS has no Ed25519
    "ssl": KINDS,
    "tlslite": KINDS,
    "node": KINDS,
    "go": KINDS,
    "java": KINDS,
    "deno": KINDS,
}
# (peer, whether it asks for client certificates): Deno's listenTls cannot
SERVERS = {
    "s_server": True,
    "gnutls-serv": True,
    "selfserv": True,
    "ssl": True,
    "tlslite": True,
    "node": True,
    "go": True,
}
SERVERS |= {"java": True, "deno": False}


def write(folder, name, identity):
    """(certificate, key) files of an identity."""
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    certificate.write_bytes(identity.certificate.public_bytes(serialization.Encoding.PEM))
    key.write_bytes(
        identity.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return str(certificate), str(key)


@pytest.fixture
def ca(tmp_path):
    path = tmp_path / "ca.pem"
    path.write_text(tls_pair.authority().issuer_pem)
    return str(path)


def client_identity(kind):
    return issue("client", make_key(kind), tls_pair.authority(), usage=ExtendedKeyUsageOID.CLIENT_AUTH)


def base_job(**more):
    job = {"name": "localhost", "suites": SUITES, "groups": GROUPS, "path": "/", "resume": False, "update": False}
    return {**job, "certificate": "", "key": "", "client_ca": "", "rsa": False, **more}


@pytest.mark.parametrize("peer", CLIENTS)
def test_client_certificates_of_peers(peer, ca, tmp_path):
    identities = [client_identity(kind) for kind in CLIENTS[peer]]
    config = server_config(client_auth=ClientAuthentication(tls_pair.trust().verify_client))
    with our_server(config, len(identities)) as (port, results):
        jobs = []
        for number, identity in enumerate(identities):
            certificate, key = write(tmp_path, f"client-{number}", identity)
            jobs.append(base_job(port=port, ca=ca, certificate=certificate, key=key))
        if peer in peer_commands.CLIENTS:
            answers = []
            for number, job in enumerate(jobs):
                if peer == "tstclnt":
                    job["database"] = peer_commands.NssDatabase(tmp_path / f"nss-{number}")
                    job["database"].trust(tls_pair.authority().issuer_pem.encode())
                    job["database"].identity("client", job["certificate"], job["key"])
                answers.append(peer_commands.CLIENTS[peer](job))
        else:
            answers = peer_programs.run_clients(peer, jobs, ",".join(GROUPS))
    for answer in answers:
        assert not answer["error"]
        assert answer["sha256"] == hashlib.sha256(b"pong\n").hexdigest()
    # OpenSSL's send the authority's along.
    assert [established.peer_chain_der[0] for established, _ in results] == [identity.der for identity in identities]


def talk(port, *, session=None, identity=None, echo):
    """One connection of ours: a KeyUpdate, data, the answer; gives what was established and what came."""
    config = tls_pair.client_config(credential=None if identity is None else lambda request: identity.credential())
    data = b"GET / HTTP/1.0\r\n\r\n" if not echo else bytes(20_000)
    with socket.create_connection(("127.0.0.1", port), DEADLINE_S) as sock:
        client = make_client(config, session=session)
        complete(client, sock, identity)
        connection = Connection(client, sock, Role.CLIENT)
        connection.update_keys()
        for start in range(0, len(data), 16384):
            connection.send(data[start : start + 16384])
        answer = b""
        while len(answer) < len(data) if echo else not connection.closed:
            piece = connection.read()
            assert piece or connection.closed, "truncated"
            answer += piece
        connection.send(b"\x01\x00", ContentType.ALERT)
        while echo and connection.read():
            pass
    assert answer == data if echo else answer.startswith(b"HTTP/1.0 200"), answer[:100]
    assert connection.closed
    assert connection.key_updates == 1
    return client.established, connection


def check_server(port, *, client_certificate, echo):
    identity = client_identity("p256") if client_certificate else None
    established, connection = talk(port, identity=identity, echo=echo)
    assert not established.resumed
    if client_certificate:
        return
    ticket = connection.tickets[-1]
    assert ticket.usable(time.time())
    established, _ = talk(port, session=ticket, echo=echo)
    assert established.resumed


@pytest.mark.parametrize("peer", SERVERS)
def test_our_client_and_servers(peer, ca, tmp_path):
    """With a client certificate; and twice without, the second time resumed. A KeyUpdate each time."""
    certificate, key = write(tmp_path, "server", server_identity())
    jobs = [base_job(certificate=certificate, key=key)]
    if SERVERS[peer]:
        jobs.append(base_job(certificate=certificate, key=key, client_ca=ca))
    if peer in peer_commands.SERVERS:
        for job in jobs:
            with peer_commands.SERVERS[peer](job) as port:
                check_server(port, client_certificate=bool(job["client_ca"]), echo=False)
        return
    with peer_programs.servers(peer, jobs, ",".join(GROUPS)) as ports:
        for port, job in zip(ports, jobs, strict=True):
            check_server(port, client_certificate=bool(job["client_ca"]), echo=True)
