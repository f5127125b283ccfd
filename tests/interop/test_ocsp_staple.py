"""OCSP stapling end to end: a response from a file, for clients that ask for it, as OpenSSL and GnuTLS read it."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509 import ocsp
from support.certificates import write_key
from support.daemon import Daemon, control, serve
from support.peer_commands import installed, run
from support.waiting import eventually

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pair"))
import tls_pair

REQUEST = b"GET /file HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def response(status: ocsp.OCSPCertStatus = ocsp.OCSPCertStatus.GOOD) -> bytes:
    """What the authority says of the server's certificate."""
    now = datetime.datetime.now(datetime.UTC)
    authority, server = tls_pair.authority(), tls_pair.server_identity()
    builder = ocsp.OCSPResponseBuilder().add_response(
        cert=server.certificate,
        issuer=authority.certificate,
        algorithm=hashes.SHA1(),  # the name of the certificate, not a signature
        cert_status=status,
        this_update=now - datetime.timedelta(hours=1),
        next_update=now + datetime.timedelta(days=1),
        revocation_time=None,
        revocation_reason=None,
    )
    builder = builder.responder_id(ocsp.OCSPResponderEncoding.NAME, authority.certificate)
    return builder.sign(authority.key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, str]]:
    """A daemon that staples, and its authority's file."""
    folder = tmp_path_factory.mktemp("ocsp")
    server = tls_pair.server_identity()
    (folder / "file").write_text("hello")
    (folder / "chain.pem").write_bytes(server.certificate.public_bytes(serialization.Encoding.PEM))
    write_key(folder / "key.pem", server.key)  # type: ignore[arg-type]
    (folder / "staple.der").write_bytes(response())
    (folder / "ca.pem").write_text(tls_pair.authority().issuer_pem)
    (folder / "kdaemon.toml").write_text(
        '[[certificate]]\nchain = "chain.pem"\nkey = "key.pem"\nocsp = "staple.der"\n[[site]]\nroot = "."\n'
    )
    with serve(None, "--workers", "1", "--config", str(folder / "kdaemon.toml")) as running:
        yield running, str(folder / "ca.pem")


def s_client(daemon: tuple[Daemon, str], *more: str) -> bytes:
    return run([
        installed("openssl", "Debian"), "s_client", "-connect", f"127.0.0.1:{daemon[0].port}", "-servername",
        "localhost", "-CAfile", daemon[1], "-verify_return_error", "-ign_eof", *more,
    ], REQUEST)  # fmt: skip


def test_openssl_reads_the_staple_that_it_asked_for(daemon: tuple[Daemon, str]) -> None:
    output = s_client(daemon, "-status")
    assert b"OCSP Response Status: successful" in output
    assert b"Cert Status: good" in output
    assert b"hello" in output


def test_nothing_is_stapled_for_who_does_not_ask(daemon: tuple[Daemon, str]) -> None:
    assert b"OCSP" not in s_client(daemon)


def test_gnutls_verifies_the_staple(daemon: tuple[Daemon, str]) -> None:
    output = run([
        installed("gnutls-cli", "Debian's gnutls-bin"), "--ocsp", "--x509cafile", daemon[1], "--sni-hostname",
        "localhost", "--verify-hostname", "localhost", "--port", str(daemon[0].port), "127.0.0.1",
    ], REQUEST)  # fmt: skip
    assert b"Options: OCSP status request" in output, output
    assert b"hello" in output


def test_a_new_response_is_stapled_after_a_reload(daemon: tuple[Daemon, str]) -> None:
    staple = Path(daemon[1]).with_name("staple.der")
    staple.write_bytes(b"nonsense")
    refused = control(daemon[0], "reload")
    assert (refused.returncode, "staple.der: no OCSP response in DER" in refused.stderr) == (1, True)
    assert b"Cert Status: good" in s_client(daemon, "-status")
    staple.write_bytes(response(ocsp.OCSPCertStatus.UNKNOWN))
    assert control(daemon[0], "reload").returncode == 0
    eventually(lambda: b"Cert Status: unknown" in s_client(daemon, "-status"), "the new response is stapled")
    assert b"says that the certificate is unknown" in daemon[0].stderr
