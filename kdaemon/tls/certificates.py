"""Certificates of peers: parsing, the proof of possession, and path validation with ``cryptography.x509.verification``
(RFC 5280).
"""

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.x509.oid import PublicKeyAlgorithmOID

from kdaemon.tls.errors import BadCertificate, UnsupportedCertificate
from kdaemon.tls.signing import Role, verify


def load_certificate(der: bytes) -> x509.Certificate:
    """Parses one certificate. Raises BadCertificate."""
    try:
        return x509.load_der_x509_certificate(der)
    except ValueError:
        raise BadCertificate("a certificate cannot be parsed") from None


def certificate_public_key(certificate: x509.Certificate) -> PublicKeyTypes:
    """The key in a certificate. Raises UnsupportedCertificate or BadCertificate."""
    try:
        return certificate.public_key()
    except UnsupportedAlgorithm:
        raise UnsupportedCertificate("a certificate has a key of a kind that is not supported") from None
    except ValueError:
        raise BadCertificate("a certificate has a key that cannot be parsed") from None


def is_pss_only(certificate: x509.Certificate) -> bool:
    """Whether the key has the OID id-RSASSA-PSS, which decides between the rsae and pss schemes (RFC 8446 §4.2.3)."""
    return certificate.public_key_algorithm_oid == PublicKeyAlgorithmOID.RSASSA_PSS


def verify_with_certificate(
    certificate: x509.Certificate, scheme: int, role: Role, transcript_hash: bytes, signature: bytes
) -> None:
    """Checks a CertificateVerify against a certificate.

    Raises IllegalParameter, BadSignature, UnsupportedCertificate.
    """
    verify(
        certificate_public_key(certificate), scheme, role, transcript_hash, signature, pss_only=is_pss_only(certificate)
    )
