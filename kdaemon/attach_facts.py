"""What a program is told of a handshake: INFO of one that succeeded, errno and detail of one that failed."""

import errno
from collections.abc import Sequence

from cryptography import x509
from kdaemon_pyx import client_abi as abi

from kdaemon.tls import errors
from kdaemon.tls.errors import AlertReceived, TlsError, TlsFault
from kdaemon.tls.handshake import Established

TLS_1_3 = 0x0304

_CERTIFICATE_FACTS = {
    errors.CertificateExpired: abi.DETAIL_CERTIFICATE_EXPIRED,
    errors.CertificateNameMismatch: abi.DETAIL_CERTIFICATE_NAME,
    errors.UnknownCertificateAuthority: abi.DETAIL_CERTIFICATE_UNTRUSTED,
    errors.BadCertificate: abi.DETAIL_CERTIFICATE_BAD,
    errors.UnsupportedCertificate: abi.DETAIL_CERTIFICATE_BAD,
    errors.CertificateRevoked: abi.DETAIL_CERTIFICATE_BAD,
    errors.CertificateUnknown: abi.DETAIL_CERTIFICATE_BAD,
}


def describe(established: Established, reason: str) -> bytes:
    """What INFO answers; the engine adds addresses and record layer, and where `reason` is empty why it is that one."""
    chain = established.peer_chain_der
    return abi.pack_info(
        tls_version=TLS_1_3,
        cipher_suite=established.cipher_suite,
        named_group=established.group,
        record_layer=0,
        resumed=established.resumed,
        port=0,
        alpn=established.alpn or b"",
        reason=reason,
        server_name=established.server_name or "",
        certificate=chain[0] if chain else b"",
    )


def fact(error: TlsError | None, chain: Sequence[bytes]) -> tuple[int, int]:
    """(errno, detail) of a failed handshake: a different one for each thing that can be wrong with a certificate."""
    if error is None:
        return errno.ECONNABORTED, abi.DETAIL_TRUNCATED
    if isinstance(error, AlertReceived):
        return errno.EPROTO, abi.DETAIL_ALERT_RECEIVED | int(error.description)
    untrusted = isinstance(error, errors.UnknownCertificateAuthority | errors.BadCertificate)
    if untrusted and len(chain) == 1 and _self_signed(chain[0]):
        return errno.EKEYREJECTED, abi.DETAIL_CERTIFICATE_SELF_SIGNED
    for kind, detail in _CERTIFICATE_FACTS.items():
        if isinstance(error, kind):
            return errno.EKEYREJECTED, detail
    if isinstance(error, TlsFault):
        return errno.EPROTO, abi.DETAIL_ALERT_SENT | int(error.alert)
    return errno.EPROTO, 0


def _self_signed(der: bytes) -> bool:
    try:
        certificate = x509.load_der_x509_certificate(der)
        return certificate.issuer == certificate.subject
    except ValueError:
        return False
