"""Certificates and keys: what is accepted, what is refused and how, and the self-signed one that is kept."""

import datetime
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec
from support.certificates import KEY_KINDS, Issued, make_key, write_key

from kdaemon import credentials
from kdaemon.config import Certificate
from kdaemon.credential_store import CredentialStore
from kdaemon.credentials import CredentialError

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
    assert set(loaded.describe()) == {"key_id", "chain", "schemes", "names", "ocsp", "sha256", "warnings"}


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


def test_selection_by_name_then_by_scheme(make_issued: MakeIssued) -> None:
    def describe(kind: str, *names: str) -> dict[str, object]:
        return credentials.load(pair(make_issued(kind, names=names))).describe()

    default, exact, wildcard, rsa = (
        describe("ecdsa-p256", "default.test"),
        describe("ecdsa-p256", "www.example.org"),
        describe("ecdsa-p256", "*.example.org"),
        describe("rsa", "www.example.org"),
    )
    store = CredentialStore([default, exact, wildcard, rsa])
    ecdsa, pss = (0x0403,), (0x0804,)

    def chosen(name: str | None, schemes: tuple[int, ...]) -> object:
        credential = store.select(name, schemes)
        return credential and credential.key_id

    assert chosen("www.example.org", ecdsa + pss) == exact["key_id"]
    assert chosen("WWW.Example.ORG", ecdsa) == exact["key_id"]
    assert chosen("www.example.org", pss) == rsa["key_id"]
    assert chosen("other.example.org", ecdsa) == wildcard["key_id"]
    assert chosen("a.b.example.org", ecdsa) == default["key_id"]
    assert chosen(None, ecdsa) == default["key_id"]
    assert chosen(None, pss) == rsa["key_id"]
    assert chosen("www.example.org", (0x0807,)) is None
