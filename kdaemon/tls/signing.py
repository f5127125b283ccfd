"""CertificateVerify (RFC 8446 §4.4.3): what is signed, with which scheme, by whom.

:func:`sign` is all that a key holder does for a handshake: it builds the signed content itself from the role and the
transcript hash, so whoever may ask for signatures still cannot have anything else signed.
"""

from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Final, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes

from kdaemon.tls.constants import SIGNATURE_SCHEME_NAMES
from kdaemon.tls.constants import SignatureScheme as Scheme
from kdaemon.tls.errors import BadSignature, IllegalParameter


class Role(Enum):
    """Which end of the connection."""

    CLIENT = "client"
    SERVER = "server"


_SERVER_PREFIX: Final = b" " * 64 + b"TLS 1.3, server CertificateVerify\x00"
_CLIENT_PREFIX: Final = b" " * 64 + b"TLS 1.3, client CertificateVerify\x00"

_HASHES: Final[dict[int, hashes.HashAlgorithm]] = {
    Scheme.ECDSA_SECP256R1_SHA256: hashes.SHA256(),
    Scheme.ECDSA_SECP384R1_SHA384: hashes.SHA384(),
    Scheme.RSA_PSS_RSAE_SHA256: hashes.SHA256(),
    Scheme.RSA_PSS_RSAE_SHA384: hashes.SHA384(),
    Scheme.RSA_PSS_RSAE_SHA512: hashes.SHA512(),
    Scheme.RSA_PSS_PSS_SHA256: hashes.SHA256(),
    Scheme.RSA_PSS_PSS_SHA384: hashes.SHA384(),
    Scheme.RSA_PSS_PSS_SHA512: hashes.SHA512(),
}
_CURVE_OF_SCHEME: Final = {Scheme.ECDSA_SECP256R1_SHA256: "secp256r1", Scheme.ECDSA_SECP384R1_SHA384: "secp384r1"}
_PSS: Final = {
    scheme: padding.PSS(padding.MGF1(algorithm), algorithm.digest_size)
    for scheme, algorithm in _HASHES.items()
    if scheme not in _CURVE_OF_SCHEME
}
_ECDSA: Final = {scheme: ec.ECDSA(_HASHES[scheme]) for scheme in _CURVE_OF_SCHEME}
_RSAE: Final = (Scheme.RSA_PSS_RSAE_SHA256, Scheme.RSA_PSS_RSAE_SHA384, Scheme.RSA_PSS_RSAE_SHA512)
_RSA_PSS: Final = (Scheme.RSA_PSS_PSS_SHA256, Scheme.RSA_PSS_PSS_SHA384, Scheme.RSA_PSS_PSS_SHA512)

#: What a CertificateVerify of a peer may be made with, in order of preference.
HANDSHAKE_SCHEMES: Final = (
    Scheme.ECDSA_SECP256R1_SHA256,
    Scheme.ED25519,
    Scheme.ECDSA_SECP384R1_SHA384,
    *_RSAE,
    *_RSA_PSS,
)
#: What signatures inside a certificate chain may be made with: PKCS#1 is still allowed there (RFC 8446 §4.2.3).
CERTIFICATE_SCHEMES: Final = (
    *HANDSHAKE_SCHEMES,
    Scheme.RSA_PKCS1_SHA256,
    Scheme.RSA_PKCS1_SHA384,
    Scheme.RSA_PKCS1_SHA512,
)


class PeerSchemes(NamedTuple):
    """What a peer verifies: ``handshake`` in a CertificateVerify (signature_algorithms), ``certificates`` inside chains
    (signature_algorithms_cert, or the same where that is absent: RFC 8446 §4.2.3).
    """

    handshake: tuple[int, ...]
    certificates: tuple[int, ...]


class SignRequest(NamedTuple):
    """What has to be signed, and with which key; answered by ``signature_ready``."""

    key_id: str
    scheme: int
    role: Role
    transcript_hash: bytes


def certificate_verify_content(role: Role, transcript_hash: bytes) -> bytes:
    """The bytes under the signature."""
    return (_SERVER_PREFIX if role is Role.SERVER else _CLIENT_PREFIX) + transcript_hash


def schemes_of_key(key: PrivateKeyTypes | PublicKeyTypes, *, pss_only: bool = False) -> tuple[int, ...]:
    """Schemes a key can sign with, best first; empty if none. ``pss_only``: the certificate's key has the OID id-
    RSASSA-PSS.
    """
    if isinstance(key, (ec.EllipticCurvePrivateKey, ec.EllipticCurvePublicKey)):
        return tuple(scheme for scheme, curve in _CURVE_OF_SCHEME.items() if curve == key.curve.name)
    if isinstance(key, (ed25519.Ed25519PrivateKey, ed25519.Ed25519PublicKey)):
        return (Scheme.ED25519,)
    if isinstance(key, (rsa.RSAPrivateKey, rsa.RSAPublicKey)):
        schemes = _RSA_PSS if pss_only else _RSAE
        # The encoded message must have room for the hash, an equally long salt and two bytes (RFC 8017 §9.1.1).
        size = (key.key_size + 6) // 8
        return tuple(scheme for scheme in schemes if size >= 2 * _HASHES[scheme].digest_size + 2)
    return ()


def choose_scheme(ours: Iterable[int], peers: Sequence[int]) -> int | None:
    """The first of our schemes that the peer verifies."""
    for scheme in ours:
        if scheme in peers:
            return scheme
    return None


def sign(private_key: PrivateKeyTypes, scheme: int, role: Role, transcript_hash: bytes) -> bytes:
    """Signs a CertificateVerify.

    ``transcript_hash`` is 32 or 48 bytes. Raises ValueError if key and scheme do not fit.
    """
    if len(transcript_hash) not in (32, 48):
        raise ValueError(f"a transcript hash has 32 or 48 bytes, not {len(transcript_hash)}")
    content = certificate_verify_content(role, transcript_hash)
    if isinstance(private_key, ec.EllipticCurvePrivateKey) and _CURVE_OF_SCHEME.get(scheme) == private_key.curve.name:
        return private_key.sign(content, _ECDSA[scheme])
    if isinstance(private_key, rsa.RSAPrivateKey) and scheme in _PSS:
        return private_key.sign(content, _PSS[scheme], _HASHES[scheme])
    if isinstance(private_key, ed25519.Ed25519PrivateKey) and scheme == Scheme.ED25519:
        return private_key.sign(content)
    raise ValueError(f"the key cannot sign with scheme {SIGNATURE_SCHEME_NAMES.get(scheme, hex(scheme))}")


def verify(
    public_key: PublicKeyTypes,
    scheme: int,
    role: Role,
    transcript_hash: bytes,
    signature: bytes,
    *,
    pss_only: bool = False,
) -> None:
    """Checks a peer's CertificateVerify; ``role`` is the peer's.

    Raises IllegalParameter if the scheme does not belong to the key (RFC 8446 §4.4.3), BadSignature if it does not
    verify.
    """
    if scheme not in schemes_of_key(public_key, pss_only=pss_only):
        raise IllegalParameter(f"CertificateVerify uses scheme {scheme:#06x}, which does not fit the certificate's key")
    content = certificate_verify_content(role, transcript_hash)
    try:
        if isinstance(public_key, ec.EllipticCurvePublicKey):
            public_key.verify(signature, content, _ECDSA[scheme])
        elif isinstance(public_key, rsa.RSAPublicKey):
            public_key.verify(signature, content, _PSS[scheme], _HASHES[scheme])
        elif isinstance(public_key, ed25519.Ed25519PublicKey):
            public_key.verify(signature, content)
    except InvalidSignature:
        raise BadSignature("the CertificateVerify signature does not verify") from None
