"""Path validation: each thing that can be wrong with a certificate is a fault of its own."""

import sys
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pair"))
import tls_pair
from tls_pair import issue, make_key

from kdaemon.tls import errors
from kdaemon.tls.certificates import TrustStore


def verify(*chain, name="localhost", store=None, now_s=None):
    (store or tls_pair.trust()).verify_server(
        [identity.der for identity in chain], name, time.time() if now_s is None else now_s
    )


def leaf(issuer=None, **options):
    options.setdefault("names", ("localhost", "127.0.0.1", "*.example.org"))
    return issue("localhost", make_key("p256"), issuer or tls_pair.authority(), **options)


def test_good():
    verify(leaf())
    verify(leaf(usage=ExtendedKeyUsageOID.SERVER_AUTH))
    intermediate = issue("intermediate", make_key("p256"), tls_pair.authority(), is_ca=True)
    verify(leaf(intermediate), intermediate)
    for name in ("LOCALHOST", "localhost.", "127.0.0.1", "www.example.org"):
        verify(leaf(), name=name)


@pytest.mark.parametrize("name", ["example.com", "127.0.0.2", "::1", "example.org", "a.b.example.org", "localhost.x"])
def test_other_names(name):
    with pytest.raises(errors.CertificateNameMismatch):
        verify(leaf(), name=name)


def test_no_alternative_name():
    with pytest.raises(errors.CertificateNameMismatch):
        verify(leaf(names=()))


def test_dates():
    with pytest.raises(errors.CertificateExpired, match="expired on"):
        verify(leaf(valid_days=(-20, -10)))
    with pytest.raises(errors.CertificateExpired, match="not valid before"):
        verify(leaf(valid_days=(10, 20)))
    verify(leaf(valid_days=(1, 2)), now_s=time.time() + 86_400 * 1.5)


def test_expired_intermediate():
    intermediate = issue("old", make_key("p256"), tls_pair.authority(), is_ca=True, valid_days=(-20, -10))
    with pytest.raises(errors.CertificateExpired):
        verify(leaf(intermediate), intermediate)


def test_unknown_authority():
    other = issue("other CA", make_key("p256"), is_ca=True)
    with pytest.raises(errors.UnknownCertificateAuthority):
        verify(leaf(other))
    with pytest.raises(errors.UnknownCertificateAuthority):
        verify(leaf(other), other)
    intermediate = issue("intermediate", make_key("p256"), tls_pair.authority(), is_ca=True)
    with pytest.raises(errors.UnknownCertificateAuthority):
        verify(leaf(intermediate))


def test_same_name_other_key():
    impostor = issue("kdaemon test CA", make_key("p256"), is_ca=True)
    with pytest.raises(errors.UnknownCertificateAuthority):
        verify(leaf(impostor))


def test_issuer_is_no_authority():
    impostor = leaf()
    with pytest.raises(errors.BadCertificate):
        verify(leaf(impostor), impostor)


def test_for_another_use():
    with pytest.raises(errors.UnsupportedCertificate):
        verify(leaf(usage=ExtendedKeyUsageOID.CLIENT_AUTH))


@pytest.mark.parametrize(
    ("usage", "fault"),
    [
        (x509.KeyUsage(True, False, True, False, False, False, False, False, False), None),
        (x509.KeyUsage(False, False, True, False, False, False, False, False, False), errors.UnsupportedCertificate),
        (x509.KeyUsage(False, False, False, False, True, False, False, False, False), errors.UnsupportedCertificate),
        (x509.KeyUsage(True, False, False, False, False, True, False, False, False), errors.BadCertificate),
    ],
    ids=["signature and encipherment", "encipherment", "agreement", "signature and certificates"],
)
def test_key_usage(usage, fault):
    """RFC 8446 §4.4.2.2: the digitalSignature bit, if there is a Key Usage at all."""
    identity = leaf(key_usage=usage)
    if fault is None:
        verify(identity)
        tls_pair.trust().verify_client([identity.der], time.time())
        return
    with pytest.raises(fault):
        verify(identity)
    with pytest.raises(fault):
        tls_pair.trust().verify_client([identity.der], time.time())
    if fault is errors.UnsupportedCertificate:  # one that is trusted as it is may say what it wants
        verify(identity, store=TrustStore([identity.certificate]))


def test_rsa_key_too_short():
    key = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    with pytest.raises(errors.InsufficientSecurity):
        verify(issue("localhost", key, tls_pair.authority(), names=("localhost",)))


SHA256_WITH_RSA, SHA1_WITH_RSA, MD5_WITH_RSA = (
    bytes.fromhex("06092a864886f70d0101") + last for last in (b"\x0b", b"\x05", b"\x04")
)


@pytest.mark.parametrize("algorithm", [SHA1_WITH_RSA, MD5_WITH_RSA], ids=["SHA-1", "MD5"])
def test_weak_signature(algorithm):
    """RFC 8446 §4.4.2.4: bad_certificate. Self-signatures are nobody's business."""
    authority = issue("RSA CA", make_key("rsa"), is_ca=True)
    der = leaf(authority).der.replace(SHA256_WITH_RSA, algorithm)
    with pytest.raises(errors.BadCertificate, match="too weak"):
        TrustStore([authority.certificate]).verify_server([der], "localhost", time.time())


def test_name_constraints():
    def chain(permitted, name):
        constraints = x509.NameConstraints([x509.DNSName(permitted)], None)
        ca = issue("constrained", make_key("p256"), tls_pair.authority(), is_ca=True, constraints=constraints)
        return leaf(ca, names=(name,)), ca

    verify(*chain("example.org", "www.example.org"), name="www.example.org")
    with pytest.raises(errors.BadCertificate):
        verify(*chain("example.org", "localhost"))


def test_unrecognised_extensions():
    certificate = leaf().certificate
    for critical, fault in ((False, None), (True, errors.UnsupportedCertificate)):
        builder = x509.CertificateBuilder(
            issuer_name=certificate.issuer,
            subject_name=certificate.subject,
            public_key=certificate.public_key(),
            serial_number=certificate.serial_number,
            not_valid_before=certificate.not_valid_before_utc,
            not_valid_after=certificate.not_valid_after_utc,
            extensions=list(certificate.extensions),
        ).add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.55555.1"), b"\x05\x00"), critical)
        der = builder.sign(tls_pair.authority().key, hashes.SHA256()).public_bytes(Encoding.DER)
        if fault is None:
            tls_pair.trust().verify_server([der], "localhost", time.time())
        else:
            with pytest.raises(fault):
                tls_pair.trust().verify_server([der], "localhost", time.time())


def test_garbage():
    with pytest.raises(errors.BadCertificate):
        tls_pair.trust().verify_server([b"garbage"], "localhost", time.time())
    der = leaf().der
    with pytest.raises(errors.BadCertificate):
        tls_pair.trust().verify_server([der[:-1]], "localhost", time.time())


def test_self_signed():
    own = issue("localhost", make_key("p256"), names=("localhost",))
    with pytest.raises(errors.UnknownCertificateAuthority):
        verify(own)
    with pytest.raises(errors.UnknownCertificateAuthority):  # as `openssl req -x509` makes them
        verify(issue("localhost", make_key("p256"), names=("localhost",), is_ca=True))
    store = TrustStore([own.certificate])
    verify(own, store=store)
    with pytest.raises(errors.CertificateNameMismatch):
        verify(own, store=store, name="example.com")
    with pytest.raises(errors.CertificateExpired):
        verify(own, store=store, now_s=time.time() + 86_400 * 60)


def test_clients():
    person = issue("somebody", make_key("ed25519"), tls_pair.authority(), usage=ExtendedKeyUsageOID.CLIENT_AUTH)
    tls_pair.trust().verify_client([person.der], time.time())
    with pytest.raises(errors.UnsupportedCertificate):
        tls_pair.trust().verify_client([leaf(usage=ExtendedKeyUsageOID.SERVER_AUTH).der], time.time())
    with pytest.raises(errors.CertificateExpired):
        tls_pair.trust().verify_client([leaf(valid_days=(-20, -10)).der], time.time())
    with pytest.raises(errors.UnknownCertificateAuthority):
        tls_pair.trust().verify_client([issue("x", make_key("p256")).der], time.time())


def test_stores():
    with pytest.raises(ValueError, match="no trusted"):
        TrustStore([])
    store = TrustStore.from_pem(tls_pair.authority().issuer_pem.encode())
    verify(leaf(), store=store)
