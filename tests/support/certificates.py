"""Certificates of every kind the daemon accepts or must refuse, made afresh with `cryptography`."""

from __future__ import annotations

import datetime
import ipaddress
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey

NAMES = ("localhost", "127.0.0.1", "::1")

_MAKE_KEY: dict[str, Callable[[], PrivateKey]] = {
    "ecdsa-p256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "ecdsa-p384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
    "rsa": lambda: rsa.generate_private_key(public_exponent=65537, key_size=2048),
}
KEY_KINDS = tuple(_MAKE_KEY)


@dataclass(frozen=True)
class Issued:
    """A certificate with its key, in files: what `--cert` and `--key` take and what a client trusts."""

    certificate: Path  # PEM: leaf first, then intermediates
    key: Path  # PEM, PKCS #8, mode 0600
    ca: Path  # PEM: the root that verifies it
    x509: x509.Certificate

    @property
    def arguments(self) -> list[str]:
        return ["--cert", str(self.certificate), "--key", str(self.key)]


def make_key(kind: str) -> PrivateKey:
    return _MAKE_KEY[kind]()


def _alternative_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _certificate(
    subject: str,
    key: PrivateKey,
    issuer: str,
    issuer_key: PrivateKey,
    *,
    names: Sequence[str] = (),
    authority: bool = False,
    from_days: int = -1,
    to_days: int = 30,
    pss: bool = False,
    purposes: Sequence[x509.ObjectIdentifier] = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH),
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=from_days))
        .not_valid_after(now + datetime.timedelta(days=to_days))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        .add_extension(
            x509.KeyUsage(
                digital_signature=True,
                key_cert_sign=authority,
                crl_sign=authority,
                content_commitment=False,
                key_encipherment=isinstance(key, rsa.RSAPrivateKey),  # NSS's tools ask for it
                data_encipherment=False,
                key_agreement=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
    )
    if names:
        builder = builder.add_extension(
            x509.SubjectAlternativeName([_alternative_name(name) for name in names]), critical=False
        )
    if not authority:
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    algorithm = None if isinstance(issuer_key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    rsa_padding = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.DIGEST_LENGTH) if pss else None
    return builder.sign(issuer_key, algorithm, rsa_padding=rsa_padding)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def write_key(path: Path, key: PrivateKey) -> Path:
    path.touch(mode=0o600)
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return path


def issue(
    directory: Path,
    kind: str = "ecdsa-p256",
    *,
    names: Sequence[str] = NAMES,
    intermediates: int = 0,
    expired: bool = False,
    pss: bool = False,
    client_only: bool = False,
) -> Issued:
    """Makes a root, `intermediates` intermediate authorities and a server certificate with a key of `kind` for `names`.

    `pss`: the root's key is RSA and it signs with RSASSA-PSS. `expired`: the leaf's validity ended yesterday.
    `client_only`: the leaf may be used by clients only.
    The files go to `directory`, which is made if need be.
    """
    directory.mkdir(parents=True, exist_ok=True)
    issuer_name, issuer_key = "kdaemon test root", make_key("rsa" if pss else "ecdsa-p256")
    root = _certificate(issuer_name, issuer_key, issuer_name, issuer_key, authority=True, pss=pss)
    chain: list[x509.Certificate] = []
    for number in range(intermediates):
        name, key = f"kdaemon test intermediate {number}", make_key("ecdsa-p256")
        chain.insert(0, _certificate(name, key, issuer_name, issuer_key, authority=True, pss=pss))
        issuer_name, issuer_key, pss = name, key, False
    key = make_key(kind)
    validity = {"from_days": -10, "to_days": -1} if expired else {}
    use = {"purposes": (ExtendedKeyUsageOID.CLIENT_AUTH,)} if client_only else {}
    leaf = _certificate(names[0], key, issuer_name, issuer_key, names=names, pss=pss, **validity, **use)
    certificate, ca = directory / "cert.pem", directory / "ca.pem"
    certificate.write_bytes(b"".join(map(_pem, [leaf, *chain])))
    ca.write_bytes(_pem(root))
    return Issued(certificate, write_key(directory / "key.pem", key), ca, leaf)


def issue_rsa_pss(directory: Path, *names: str) -> Issued:
    """A self-signed certificate for `names`, or localhost and its addresses, with a key that says id-RSASSA-PSS.

    Such a key signs with rsa_pss_pss_* (RFC 8446 section 4.2.3).

    Made by openssl: `cryptography` signs with such keys but makes none.
    """
    directory.mkdir(parents=True, exist_ok=True)
    certificate, key = directory / "cert.pem", directory / "key.pem"
    alternatives = ",".join(f"DNS:{name}" for name in names) or "DNS:localhost,IP:127.0.0.1,IP:::1"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa-pss", "-pkeyopt", "rsa_keygen_bits:2048", "-nodes", "-days", "30",
         "-subj", "/CN=localhost", "-addext", f"subjectAltName={alternatives}",
         "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    return Issued(certificate, key, certificate, x509.load_pem_x509_certificate(certificate.read_bytes()))
