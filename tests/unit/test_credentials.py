"""Certificates and keys: what is accepted, what is refused and how, and the self-signed one that is kept."""

import datetime
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec
from cryptography.x509 import ocsp
from support.certificates import KEY_KINDS, Issued, make_key, write_key

from kdaemon import credentials
from kdaemon.config import Certificate
from kdaemon.credential_store import CredentialStore
from kdaemon.credentials import CredentialError
from kdaemon.tls.signing import PeerSchemes

MakeIssued = Callable[..., Issued]


def pair(issued: Issued) -> Certificate:
    return Certificate(chain=str(issued.certificate), key=str(issued.key))


@pytest.mark.parametrize("kind", KEY_KINDS)
def test_every_kind_of_key_loads_and_can_sign(make_issued: MakeIssued, kind: str) -> None:
    loaded = credentials.load(pair(make_issued(kind, intermediates=1)))
    assert loaded.schemes
    assert len(loaded.chain_der) == 2
    assert loaded.names == ("localhost", "127.0.0.1", "::1")
    assert loaded.warnings == ()


def test_no_repr_or_description_shows_the_key(make_issued: MakeIssued) -> None:
    issued = make_issued()
    loaded = credentials.load(pair(issued))
    secret = loaded.private_key.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    assert "private_key" not in repr(loaded)
    assert secret not in repr(loaded.describe()).encode()
    assert set(loaded.describe()) == {
        "key_id", "chain", "schemes", "signed_with", "names", "ocsp", "sha256", "warnings",
    }  # fmt: skip


def test_a_key_of_another_certificate_is_refused(make_issued: MakeIssued) -> None:
    one, other = make_issued(), make_issued()
    with pytest.raises(CredentialError, match="does not belong to the certificate") as caught:
        credentials.load(Certificate(chain=str(one.certificate), key=str(other.key)))
    assert str(other.key) in str(caught.value)
    assert str(one.certificate) in str(caught.value)


def test_an_expired_certificate_is_a_warning(make_issued: MakeIssued) -> None:
    (warning,) = credentials.load(pair(make_issued(expired=True))).warnings
    assert "expired on" in warning


def test_a_certificate_without_names_is_a_warning(make_issued: MakeIssued, tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1))
        .sign(key, algorithm=credentials.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    chain = tmp_path / "chain.pem"
    chain.write_bytes(certificate)
    loaded = credentials.load(Certificate(chain=str(chain), key=str(write_key(tmp_path / "k.pem", key))))
    assert "no subjectAltName" in loaded.warnings[0]


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_what_is_no_certificate_or_key(make_issued: MakeIssued, tmp_path: Path, content: bytes) -> None:
    issued = make_issued()
    broken = tmp_path / "broken.pem"
    broken.write_bytes(content)
    with pytest.raises(CredentialError, match="no certificate chain in PEM"):
        credentials.load(Certificate(chain=str(broken), key=str(issued.key)))
    with pytest.raises(CredentialError, match="no private key in PEM"):
        credentials.load(Certificate(chain=str(issued.certificate), key=str(broken)))


def test_an_encrypted_key_and_a_key_that_cannot_sign_are_named(make_issued: MakeIssued, tmp_path: Path) -> None:
    issued = make_issued()
    path = tmp_path / "key.pem"
    path.write_bytes(
        make_key("ecdsa-p256").private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(CredentialError, match="encrypted"):
        credentials.load(Certificate(chain=str(issued.certificate), key=str(path)))
    path.write_bytes(
        dsa.generate_private_key(1024).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    with pytest.raises(CredentialError, match=r"cannot sign in TLS 1\.3"):
        credentials.load(Certificate(chain=str(issued.certificate), key=str(path)))


def test_the_self_signed_certificate_is_kept_and_private(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "kdaemon"
    first = credentials.load_self_signed(folder)
    assert credentials.load_self_signed(folder).chain_der == first.chain_der
    assert first.names == ("localhost", "127.0.0.1", "::1")
    assert (folder / "localhost.pem").stat().st_mode & 0o777 == 0o600
    public = (folder / "localhost.crt").read_bytes()
    assert b"PRIVATE" not in public
    assert x509.load_pem_x509_certificate(public).public_bytes(serialization.Encoding.DER) == first.chain_der[0]


def test_the_self_signed_certificate_is_renewed_before_it_expires_and_when_damaged(tmp_path: Path) -> None:
    first = credentials.load_self_signed(tmp_path)
    almost = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=credentials.SELF_SIGNED_DAYS - 29)
    second = credentials.load_self_signed(tmp_path, now=almost)
    assert second.key_id != first.key_id
    (tmp_path / "localhost.pem").write_bytes(b"damaged")
    assert credentials.load_self_signed(tmp_path).key_id != second.key_id


def test_a_state_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CredentialError, match="cannot be kept"):
        credentials.load_self_signed(tmp_path / "file" / "kdaemon")


def staple(issued: Issued, status: ocsp.OCSPCertStatus, next_update_h: int) -> bytes:
    now = datetime.datetime.now(datetime.UTC)
    revoked = now - datetime.timedelta(days=1) if status is ocsp.OCSPCertStatus.REVOKED else None
    key = serialization.load_pem_private_key(issued.key.read_bytes(), None)  # anybody: the daemon does not judge
    builder = ocsp.OCSPResponseBuilder().add_response(
        cert=issued.x509,
        issuer=issued.x509,
        algorithm=hashes.SHA256(),
        cert_status=status,
        this_update=now - datetime.timedelta(hours=2),
        next_update=now + datetime.timedelta(hours=next_update_h),
        revocation_time=revoked,
        revocation_reason=None,
    )
    builder = builder.responder_id(ocsp.OCSPResponderEncoding.NAME, issued.x509)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def test_what_a_staple_says_is_read(make_issued: MakeIssued, tmp_path: Path) -> None:
    issued, other, path = make_issued(), make_issued(), tmp_path / "staple.der"
    certificate = Certificate(chain=str(issued.certificate), key=str(issued.key), ocsp=str(path))

    def warnings(response: bytes) -> tuple[str, ...]:
        path.write_bytes(response)
        loaded = credentials.load(certificate)
        assert loaded.ocsp == response
        return loaded.warnings

    good = ocsp.OCSPCertStatus.GOOD
    assert warnings(staple(issued, good, 1)) == ()
    for response, problem in (
        (staple(issued, good, -1), "expired on"),
        (staple(issued, ocsp.OCSPCertStatus.REVOKED, 1), "the certificate is revoked"),
        (staple(other, good, 1), "is for another certificate"),
        (bytes.fromhex("30030a0103"), "is an error: try_later"),
    ):
        (warning,) = warnings(response)
        assert warning.startswith(f"{path}: the OCSP response ")
        assert problem in warning
    path.write_bytes(b"-----BEGIN")
    with pytest.raises(CredentialError, match=r"staple\.der: no OCSP response in DER"):
        credentials.load(certificate)


def test_selection_by_name_then_by_scheme(make_issued: MakeIssued) -> None:
    def describe(kind: str, *names: str, **how: object) -> dict[str, object]:
        return credentials.load(pair(make_issued(kind, names=names, **how))).describe()

    default, exact, wildcard, rsa = (
        describe("ecdsa-p256", "default.test"),
        describe("ecdsa-p256", "www.example.org"),
        describe("ecdsa-p256", "*.example.org"),
        describe("rsa", "www.example.org"),
    )
    below_pss = describe("ecdsa-p256", "pss.test", intermediates=1, pss=True)
    below_ecdsa = describe("ecdsa-p256", "pss.test")
    store = CredentialStore([default, exact, wildcard, rsa, below_pss, below_ecdsa])
    ecdsa, pss = (0x0403,), (0x0804,)

    def chosen(name: str | None, schemes: tuple[int, ...], in_chains: tuple[int, ...] = ecdsa) -> object:
        credential = store.select(name, PeerSchemes(schemes, in_chains))
        return credential and credential.key_id

    assert chosen("www.example.org", ecdsa + pss) == exact["key_id"]
    assert chosen("WWW.Example.ORG", ecdsa) == exact["key_id"]
    assert chosen("www.example.org", pss) == rsa["key_id"]
    assert chosen("other.example.org", ecdsa) == wildcard["key_id"]
    assert chosen("a.b.example.org", ecdsa) == default["key_id"]
    assert chosen(None, ecdsa) == default["key_id"]
    assert chosen(None, pss) == rsa["key_id"]
    assert chosen("www.example.org", (0x0807,)) is None
    # The chains' own signatures, where that leaves a choice.
    assert chosen("pss.test", ecdsa, ecdsa + pss) == below_pss["key_id"]
    assert chosen("pss.test", ecdsa, ecdsa) == below_ecdsa["key_id"]
    assert chosen("pss.test", ecdsa, (0x0807,)) == below_pss["key_id"]
