"""What can go wrong, by fact, and the one place that chooses the alert for each.

Raise the fact (``BadFinished``, ``NoCommonCipherSuite``, ...); :func:`alert_for` says what the peer is told. An alert
that the *peer* sent is an :class:`AlertReceived`, never a :class:`TlsFault`: one is our judgement, the other is news.
No text here ever contains key material or peer data beyond code points and lengths.
"""

from typing import Final

from kdaemon.tls.constants import ALERT_NAMES
from kdaemon.tls.constants import AlertDescription as Alert


class TlsError(Exception):
    """The connection is over, for a reason of TLS's own."""


class AlertReceived(TlsError):
    """The peer ended the connection with an alert (RFC 8446 §6)."""

    def __init__(self, description: int) -> None:
        super().__init__(f"the peer sent the alert {ALERT_NAMES.get(description, str(description))}")
        self.description = description


class CloseNotifyReceived(AlertReceived):
    """The peer closed its direction before the handshake was complete."""

    def __init__(self) -> None:
        super().__init__(Alert.CLOSE_NOTIFY)


class TlsFault(TlsError):
    """A fact found on this side that ends the connection. Subclasses name the fact."""

    @property
    def alert(self) -> int:
        """The alert description sent to the peer."""
        return alert_for(self)

    @property
    def name(self) -> str:
        """The fact's name, for counters and logs."""
        return type(self).__name__


# Records
class PlainHttpReceived(TlsFault):
    """The first bytes are an HTTP request in the clear. No alert is sent: the peer would not understand one."""


class UnexpectedRecord(TlsFault):
    """A record of a type, or in a form, that may not come now."""


class EmptyRecord(TlsFault):
    """A handshake or alert record without content (RFC 8446 §5.1, §5.4)."""


class RecordOverflow(TlsFault):
    """A record longer than the protocol, or the negotiated record_size_limit, allows."""


class BadRecordMac(TlsFault):
    """A record that does not decrypt."""


class TooManyRecords(TlsFault):
    """A flood: empty records, change_cipher_spec, warnings, skipped early data, or bytes nobody asked for."""


# Messages
class MalformedMessage(TlsFault):
    """Bytes that do not follow the syntax of the message."""


class UnexpectedMessage(TlsFault):
    """A well-formed message that may not come in this state."""


class ExcessHandshakeData(TlsFault):
    """A message that precedes a change of keys does not end its record (RFC 8446 §5.1)."""


class MessageTooLong(TlsFault):
    """A handshake message over its bound; refused at its header."""


class IllegalParameter(TlsFault):
    """A field with a value that is forbidden or inconsistent with others."""


class DuplicateExtension(TlsFault):
    """An extension twice in one block (RFC 8446 §4.2)."""


class MissingExtension(TlsFault):
    """An extension that is mandatory here is absent (RFC 8446 §9.2)."""


class UnsolicitedExtension(TlsFault):
    """An answer to something that was not asked (RFC 8446 §4.2)."""


# Negotiation
class NoCommonVersion(TlsFault):
    """The peer does not speak TLS 1.3."""


class InappropriateFallback(TlsFault):
    """TLS_FALLBACK_SCSV with a version below ours (RFC 7507)."""


class NoCommonCipherSuite(TlsFault):
    """No cipher suite in common."""


class NoCommonGroup(TlsFault):
    """No key exchange group in common."""


class NoCommonSignatureScheme(TlsFault):
    """No signature scheme that the peer verifies fits our key."""


class NoCredential(TlsFault):
    """No certificate is configured for what the peer asked."""


class NoCommonApplicationProtocol(TlsFault):
    """ALPN protocols were offered, and none is ours (RFC 7301 §3.2)."""


class UnrecognizedName(TlsFault):
    """This host name is not served here (RFC 6066 §3)."""


class UnknownPskIdentity(TlsFault):
    """Only pre-shared keys are accepted, and none of those offered is known."""


class BadKeyShare(TlsFault):
    """A key share that is no point of its group, or leads to an all-zero secret (RFC 8446 §7.4)."""


class InsufficientSecurity(TlsFault):
    """What the peer offers is weaker than the configuration demands."""


# Proofs
class BadFinished(TlsFault):
    """verify_data of a Finished does not match."""


class BadBinder(TlsFault):
    """A PSK binder does not match (RFC 8446 §4.2.11.2)."""


class BadSignature(TlsFault):
    """A CertificateVerify signature does not verify."""


# Certificates
class BadCertificate(TlsFault):
    """A certificate that cannot be parsed, or a chain whose signatures or constraints do not hold."""


class CertificateNameMismatch(TlsFault):
    """The certificate is for another name or address."""


class UnsupportedCertificate(TlsFault):
    """A certificate of a kind or for a use that is not accepted."""


class CertificateExpired(TlsFault):
    """A certificate outside its period of validity."""


class CertificateRevoked(TlsFault):
    """A certificate that its issuer has revoked."""


class CertificateUnknown(TlsFault):
    """A certificate that is not acceptable for a reason of its own."""


class UnknownCertificateAuthority(TlsFault):
    """No trusted path to the certificate."""


class CertificateRequired(TlsFault):
    """The client sent no certificate and has to."""


class BadCertificateStatus(TlsFault):
    """A stapled OCSP response that is unusable."""


class AccessDenied(TlsFault):
    """A valid certificate or PSK whose owner may not come in."""


# Our own side
class HandshakeCanceled(TlsFault):
    """This side gives up the handshake for a reason outside the protocol."""


class RefusedByPolicy(TlsFault):
    """Refused without telling why."""


class InternalError(TlsFault):
    """A failure of our own (no signature, resources, a bug)."""


_ALERTS: Final[dict[type[TlsFault], int]] = {
    UnexpectedRecord: Alert.UNEXPECTED_MESSAGE,
    EmptyRecord: Alert.UNEXPECTED_MESSAGE,
    RecordOverflow: Alert.RECORD_OVERFLOW,
    BadRecordMac: Alert.BAD_RECORD_MAC,
    TooManyRecords: Alert.UNEXPECTED_MESSAGE,
    MalformedMessage: Alert.DECODE_ERROR,
    UnexpectedMessage: Alert.UNEXPECTED_MESSAGE,
    ExcessHandshakeData: Alert.UNEXPECTED_MESSAGE,
    MessageTooLong: Alert.DECODE_ERROR,
    IllegalParameter: Alert.ILLEGAL_PARAMETER,
    DuplicateExtension: Alert.ILLEGAL_PARAMETER,
    MissingExtension: Alert.MISSING_EXTENSION,
    UnsolicitedExtension: Alert.UNSUPPORTED_EXTENSION,
    NoCommonVersion: Alert.PROTOCOL_VERSION,
    InappropriateFallback: Alert.INAPPROPRIATE_FALLBACK,
    NoCommonCipherSuite: Alert.HANDSHAKE_FAILURE,
    NoCommonGroup: Alert.HANDSHAKE_FAILURE,
    NoCommonSignatureScheme: Alert.HANDSHAKE_FAILURE,
    NoCredential: Alert.HANDSHAKE_FAILURE,
    NoCommonApplicationProtocol: Alert.NO_APPLICATION_PROTOCOL,
    UnrecognizedName: Alert.UNRECOGNIZED_NAME,
    UnknownPskIdentity: Alert.UNKNOWN_PSK_IDENTITY,
    BadKeyShare: Alert.ILLEGAL_PARAMETER,
    InsufficientSecurity: Alert.INSUFFICIENT_SECURITY,
    BadFinished: Alert.DECRYPT_ERROR,
    BadBinder: Alert.DECRYPT_ERROR,
    BadSignature: Alert.DECRYPT_ERROR,
    BadCertificate: Alert.BAD_CERTIFICATE,
    CertificateNameMismatch: Alert.BAD_CERTIFICATE,
    UnsupportedCertificate: Alert.UNSUPPORTED_CERTIFICATE,
    CertificateExpired: Alert.CERTIFICATE_EXPIRED,
    CertificateRevoked: Alert.CERTIFICATE_REVOKED,
    CertificateUnknown: Alert.CERTIFICATE_UNKNOWN,
    UnknownCertificateAuthority: Alert.UNKNOWN_CA,
    CertificateRequired: Alert.CERTIFICATE_REQUIRED,
    BadCertificateStatus: Alert.BAD_CERTIFICATE_STATUS_RESPONSE,
    AccessDenied: Alert.ACCESS_DENIED,
    HandshakeCanceled: Alert.USER_CANCELED,
    RefusedByPolicy: Alert.GENERAL_ERROR,
    InternalError: Alert.INTERNAL_ERROR,
}


def alert_for(fault: TlsFault) -> int:
    """The alert description (RFC 8446 §6) that tells the peer about ``fault``."""
    return _ALERTS.get(type(fault), Alert.INTERNAL_ERROR)
