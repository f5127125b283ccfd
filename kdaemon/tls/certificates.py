"""Certificates of peers: parsing, proof of possession, path validation by ``cryptography`` (RFC 5280).

Whatever is wrong with a chain comes out as a fact of its own (expired, unknown authority, other name, ...).
"""

import datetime
import ipaddress
import ssl
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import PublicKeyAlgorithmOID, SignatureAlgorithmOID
from cryptography.x509.verification import (
    Criticality,
    ExtensionPolicy,
    PolicyBuilder,
    Store,
    Subject,
    VerificationError,
)

from kdaemon.tls.constants import SignatureScheme as Scheme
from kdaemon.tls.errors import (
    BadCertificate,
    CertificateExpired,
    CertificateNameMismatch,
    CertificateUnknown,
    InsufficientSecurity,
    TlsFault,
    UnknownCertificateAuthority,
    UnsupportedCertificate,
)
from kdaemon.tls.signing import Role, verify

CHAIN_DEPTH_MAX = 8
RSA_BITS_MIN = 2048

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@contextmanager
def _parsing() -> Iterator[None]:
    """Whatever the library trips over in a hostile certificate, in some fields only when they are looked at, is bad."""
    try:
        yield
    except (TlsFault, VerificationError):
        raise
    except Exception:  # noqa: BLE001 - ValueError, TypeError, InvalidVersion, DuplicateExtension ...: no list is complete
        raise BadCertificate("a certificate cannot be parsed") from None


def load_certificate(der: bytes) -> x509.Certificate:
    """Parses one certificate. Raises BadCertificate."""
    with _parsing():
        return x509.load_der_x509_certificate(der)


def certificate_public_key(certificate: x509.Certificate) -> PublicKeyTypes:
    """The key in a certificate. Raises UnsupportedCertificate or BadCertificate."""
    with _parsing():
        try:
            return certificate.public_key()
        except UnsupportedAlgorithm:
            raise UnsupportedCertificate("a certificate has a key of a kind that is not supported") from None


def is_pss_only(certificate: x509.Certificate) -> bool:
    """Whether the key has the OID id-RSASSA-PSS, which decides between the rsae and pss schemes (RFC 8446 §4.2.3)."""
    with _parsing():
        return certificate.public_key_algorithm_oid == PublicKeyAlgorithmOID.RSASSA_PSS


def verify_with_certificate(
    certificate: x509.Certificate, scheme: int, role: Role, transcript_hash: bytes, signature: bytes
) -> None:
    """Checks a CertificateVerify. Raises IllegalParameter, BadSignature, UnsupportedCertificate."""
    key = certificate_public_key(certificate)
    verify(key, scheme, role, transcript_hash, signature, pss_only=is_pss_only(certificate))


def parse_address(name: str) -> _Address | None:
    """``name`` as an IP address, or None if it is a host name."""
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


_SCHEMES_OF_SIGNATURE: Final[dict[x509.ObjectIdentifier, tuple[int, ...]]] = {
    SignatureAlgorithmOID.ECDSA_WITH_SHA256: (Scheme.ECDSA_SECP256R1_SHA256,),
    SignatureAlgorithmOID.ECDSA_WITH_SHA384: (Scheme.ECDSA_SECP384R1_SHA384,),
    SignatureAlgorithmOID.ED25519: (Scheme.ED25519,),
    SignatureAlgorithmOID.RSA_WITH_SHA256: (Scheme.RSA_PKCS1_SHA256,),
    SignatureAlgorithmOID.RSA_WITH_SHA384: (Scheme.RSA_PKCS1_SHA384,),
    SignatureAlgorithmOID.RSA_WITH_SHA512: (Scheme.RSA_PKCS1_SHA512,),
}
_SCHEMES_OF_PSS_HASH: Final[dict[str, tuple[int, ...]]] = {
    "sha256": (Scheme.RSA_PSS_RSAE_SHA256, Scheme.RSA_PSS_PSS_SHA256),
    "sha384": (Scheme.RSA_PSS_RSAE_SHA384, Scheme.RSA_PSS_PSS_SHA384),
    "sha512": (Scheme.RSA_PSS_RSAE_SHA512, Scheme.RSA_PSS_PSS_SHA512),
}


def schemes_in_chain(chain: Iterable[x509.Certificate]) -> tuple[tuple[int, ...], ...]:
    """For each signature that a verifier of the chain checks, the schemes of which it has to know one (RFC 8446
    §4.4.2.2); none where the signature is of a kind that has no scheme here. Raises BadCertificate.

    What signs itself is trusted or not as it is: its signature does not count.
    """
    with _parsing():
        return tuple(_schemes_of_signature(each) for each in chain if each.issuer != each.subject)


def _schemes_of_signature(certificate: x509.Certificate) -> tuple[int, ...]:
    if certificate.signature_algorithm_oid != SignatureAlgorithmOID.RSASSA_PSS:
        return _SCHEMES_OF_SIGNATURE.get(certificate.signature_algorithm_oid, ())
    algorithm = certificate.signature_hash_algorithm
    return _SCHEMES_OF_PSS_HASH.get(algorithm.name if algorithm else "", ())


class TrustStore:
    """Trusted certificates. Immutable; thread-safe; one for all connections with the same policy.

    A certificate that is itself in the store is trusted as it is, whatever its extensions say: that is how self-signed
    server certificates are pinned. Its name and dates still count.
    """

    def __init__(self, certificates: Iterable[x509.Certificate]) -> None:
        certificates = list(certificates)
        if not certificates:
            raise ValueError("no trusted certificate")
        self._store = Store(certificates)
        self._der = frozenset(certificate.public_bytes(Encoding.DER) for certificate in certificates)

    @classmethod
    def from_pem(cls, pem: bytes) -> "TrustStore":
        """From a bundle of PEM certificates. Raises ValueError."""
        return cls(x509.load_pem_x509_certificates(pem))

    @classmethod
    def system(cls) -> "TrustStore":
        """The system's bundle, where OpenSSL looks for it. Raises OSError or ValueError."""
        paths = ssl.get_default_verify_paths()
        candidates = (paths.cafile, paths.openssl_cafile, "/etc/ssl/certs/ca-certificates.crt")
        for candidate in candidates:
            if candidate is not None and Path(candidate).is_file():
                return cls.from_pem(Path(candidate).read_bytes())
        raise FileNotFoundError("no system certificate store: install ca-certificates, or name a CA file")

    def verify_server(self, chain_der: Sequence[bytes], server_name: str, now_s: float) -> None:
        """Validates a server's chain for a host name or address. Raises the TlsFault that names what is wrong."""
        with _parsing():
            self._verify_server(chain_der, server_name, now_s)

    def _verify_server(self, chain_der: Sequence[bytes], server_name: str, now_s: float) -> None:
        leaf, intermediates = _load_chain(chain_der)
        address = parse_address(server_name)
        now = datetime.datetime.fromtimestamp(now_s, datetime.UTC)
        if chain_der[0] in self._der:
            _check_dates(leaf, now)
            _check_name(leaf, server_name, address)
            return
        subject: Subject = x509.DNSName(to_ascii(server_name)) if address is None else x509.IPAddress(address)
        builder = PolicyBuilder().store(self._store).time(now).max_chain_depth(CHAIN_DEPTH_MAX)
        try:
            builder.build_server_verifier(subject).verify(leaf, intermediates)
        except VerificationError as error:
            _check_dates(leaf, now)
            _check_name(leaf, server_name, address)
            raise _fault_of(error, leaf) from None
        _check_key(leaf)

    def verify_client(self, chain_der: Sequence[bytes], now_s: float) -> None:
        """Validates a client's chain; who the client is remains for the caller to judge. Raises like verify_server."""
        with _parsing():
            self._verify_client(chain_der, now_s)

    def _verify_client(self, chain_der: Sequence[bytes], now_s: float) -> None:
        leaf, intermediates = _load_chain(chain_der)
        now = datetime.datetime.fromtimestamp(now_s, datetime.UTC)
        if chain_der[0] in self._der:
            _check_dates(leaf, now)
            return
        # Client certificates often name a person or a service in the subject only.
        ee_policy = ExtensionPolicy.webpki_defaults_ee().may_be_present(
            x509.SubjectAlternativeName, Criticality.AGNOSTIC, None
        )
        builder = (
            PolicyBuilder()
            .store(self._store)
            .time(now)
            .max_chain_depth(CHAIN_DEPTH_MAX)
            .extension_policies(ca_policy=ExtensionPolicy.webpki_defaults_ca(), ee_policy=ee_policy)
        )
        try:
            builder.build_client_verifier().verify(leaf, intermediates)
        except VerificationError as error:
            _check_dates(leaf, now)
            raise _fault_of(error, leaf) from None
        _check_key(leaf)


def _load_chain(chain_der: Sequence[bytes]) -> tuple[x509.Certificate, list[x509.Certificate]]:
    leaf, *intermediates = [load_certificate(der) for der in chain_der]
    return leaf, intermediates


def _check_dates(certificate: x509.Certificate, now: datetime.datetime) -> None:
    not_before, not_after = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > not_after:
        raise CertificateExpired(f"the certificate expired on {not_after:%Y-%m-%d}")
    if now < not_before:
        raise CertificateExpired(f"the certificate is not valid before {not_before:%Y-%m-%d}")


def _check_key(certificate: x509.Certificate) -> None:
    """What path validation leaves to TLS: the key must be for signing (RFC 8446 §4.4.2.2), and long enough."""
    try:
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        pass
    else:
        if not usage.digital_signature:
            raise UnsupportedCertificate("the certificate's key usage does not allow digital signatures")
    key = certificate_public_key(certificate)
    if isinstance(key, rsa.RSAPublicKey) and key.key_size < RSA_BITS_MIN:
        raise InsufficientSecurity(f"the certificate's RSA key has {key.key_size} bits")


def _check_name(certificate: x509.Certificate, server_name: str, address: _Address | None) -> None:
    """Subject alternative names only (RFC 9525 §6.3): the common name has not counted for years."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise CertificateNameMismatch("the certificate has no subject alternative name") from None
    if address is not None:
        matches = address in names.get_values_for_type(x509.IPAddress)
    else:
        wanted = to_ascii(server_name)
        matches = any(_matches(pattern.lower(), wanted) for pattern in names.get_values_for_type(x509.DNSName))
    if not matches:
        raise CertificateNameMismatch(f"the certificate is not for {server_name}")


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("*."):
        label, dot, rest = name.partition(".")
        return bool(label and dot and "." in rest) and rest == pattern[2:]
    return pattern == name


def to_ascii(server_name: str) -> str:
    """The name in A-labels, lower case, without a final dot."""
    name = server_name.rstrip(".").lower()
    if name.isascii():
        return name
    try:
        return name.encode("idna").decode("ascii")
    except UnicodeError:
        raise CertificateNameMismatch("the server name is no host name") from None


def _is_self_signed(certificate: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(certificate)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _fault_of(error: VerificationError, leaf: x509.Certificate) -> TlsFault:
    """The fact behind the library's text, where it says more than "no"."""
    text = str(error)
    if _is_self_signed(leaf):  # whatever else there is against it: most such certificates say that they are authorities
        return UnknownCertificateAuthority("the certificate is its own authority, which is not trusted")
    if "not valid at validation time" in text:
        return CertificateExpired("a certificate of the chain is outside its period of validity")
    if "Forbidden signature algorithm" in text:  # MD5, SHA-1 (RFC 8446 §4.4.2.4)
        return BadCertificate("a certificate of the chain is signed with an algorithm that is too weak")
    if "no interior errors" in text or "signature does not match" in text or "chain construction" in text:
        return UnknownCertificateAuthority("no path from the certificate to a trusted authority")
    if "EKU" in text or "Forbidden" in text or "unaccounted-for critical" in text:
        return UnsupportedCertificate("a certificate of the chain is of a kind, or for a use, that is not accepted")
    if "modulus" in text:
        return InsufficientSecurity("a certificate of the chain has a key that is too short")
    if "validation failed" in text:
        return BadCertificate("a certificate of the chain breaks the rules of its profile")
    return CertificateUnknown("the certificate chain is not acceptable")
