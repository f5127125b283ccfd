"""Exceptions of libtls: an errno and, where TLS is the reason, the fact.

All are `OSError`. Where Python has an exception for the errno (`ConnectionResetError`, `TimeoutError`, ...) they are
that, too, so that code written for sockets catches them.
"""

import errno
import os

from kdaemon_pyx import client_abi as abi
from kdaemon_pyx.client_ring import Operation

_ALERTS = {
    0: "close_notify",
    10: "unexpected_message",
    20: "bad_record_mac",
    22: "record_overflow",
    40: "handshake_failure",
    42: "bad_certificate",
    43: "unsupported_certificate",
    44: "certificate_revoked",
    45: "certificate_expired",
    46: "certificate_unknown",
    47: "illegal_parameter",
    48: "unknown_ca",
    49: "access_denied",
    50: "decode_error",
    51: "decrypt_error",
    70: "protocol_version",
    71: "insufficient_security",
    80: "internal_error",
    86: "inappropriate_fallback",
    90: "user_canceled",
    109: "missing_extension",
    110: "unsupported_extension",
    112: "unrecognized_name",
    113: "bad_certificate_status_response",
    115: "unknown_psk_identity",
    116: "certificate_required",
    120: "no_application_protocol",
}


class TlsError(OSError):
    """An operation failed. `errno` says how; `alert` is the TLS alert that goes with it, or None."""

    alert: int | None = None


class DaemonError(TlsError):
    """No daemon, or not one that this program can talk to."""


class DaemonNotRunning(DaemonError, ConnectionRefusedError):
    """Nobody listens on the daemon's socket."""


class DaemonGone(DaemonError, ConnectionResetError):
    """The daemon ended; every operation in flight has ended with it. `tls_destroy()`, then `tls_init()` again."""


class WrongVersion(DaemonError):
    """The daemon's client ring has another version."""


class NotAllowed(DaemonError, PermissionError):
    """This user may not attach, or the daemon is not configured for this role."""


class RingFull(TlsError, BlockingIOError):
    """As many operations as the ring has slots are in flight: wait for one."""


class ArenaFull(TlsError):
    """The data of the operations fills the arena: wait for writes, release reads."""


class HandshakeError(TlsError):
    """The TLS handshake failed."""


class AlertReceived(HandshakeError):
    """The peer ended the connection with an alert."""


class CertificateError(HandshakeError):
    """The peer's certificate was not accepted."""


class CertificateExpired(CertificateError):
    """It is not valid at this time."""


class CertificateNameMismatch(CertificateError):
    """It is for other names."""


class CertificateUntrusted(CertificateError):
    """No trusted authority signed it."""


class CertificateSelfSigned(CertificateUntrusted):
    """It signed itself and is not among the trusted ones."""


class CertificateBad(CertificateError):
    """It is malformed, revoked, or cannot be used for this."""


class NameNotResolved(TlsError):
    """The host has no address."""


class Truncated(TlsError, ConnectionResetError):
    """The peer's data ended without close_notify: something may be missing."""


class Cancelled(TlsError):
    """The operation was cancelled."""


class DeadlinePassed(TlsError, TimeoutError):
    """The operation's own deadline passed."""


class ConnectionRefused(TlsError, ConnectionRefusedError):
    """The host refused the connection."""


class ConnectionReset(TlsError, ConnectionResetError):
    """The connection was reset."""


class BrokenConnection(TlsError, BrokenPipeError):
    """This direction is closed."""


class ConnectionClosed(TlsError):
    """The connection or listener was closed here, or is none of this program's."""


_BY_DETAIL: dict[int, tuple[type[TlsError], str]] = {
    abi.DETAIL_TRUNCATED: (Truncated, "the peer ended the connection without close_notify"),
    abi.DETAIL_CERTIFICATE_UNTRUSTED: (CertificateUntrusted, "the certificate was not issued by a trusted authority"),
    abi.DETAIL_CERTIFICATE_EXPIRED: (CertificateExpired, "the certificate is not valid at this time"),
    abi.DETAIL_CERTIFICATE_NAME: (CertificateNameMismatch, "the certificate is for other names"),
    abi.DETAIL_CERTIFICATE_SELF_SIGNED: (CertificateSelfSigned, "the certificate is self-signed and not trusted"),
    abi.DETAIL_CERTIFICATE_BAD: (CertificateBad, "the certificate cannot be used"),
    abi.DETAIL_NAME_RESOLUTION: (NameNotResolved, "the name of the host does not resolve"),
}

_BY_ERRNO: dict[int, tuple[type[TlsError], str]] = {
    errno.ECANCELED: (Cancelled, "the operation was cancelled"),
    errno.ETIMEDOUT: (DeadlinePassed, "the operation's deadline passed"),
    errno.ECONNREFUSED: (ConnectionRefused, "the host refused the connection"),
    errno.ECONNRESET: (ConnectionReset, "the connection was reset"),
    errno.EPIPE: (BrokenConnection, "the connection is closed for writing"),
    errno.EBADF: (ConnectionClosed, "the connection or listener is closed"),
    errno.EACCES: (NotAllowed, "the daemon does not allow this"),
    errno.EPROTO: (HandshakeError, "the peer broke the TLS protocol"),
    errno.EMFILE: (TlsError, "the daemon's limit of connections for this program is reached"),
    errno.ESHUTDOWN: (TlsError, "the daemon is being stopped"),
}


# What an errno means for one operation alone.
_BY_OPERATION: dict[tuple[int, int], str] = {
    (abi.ADOPT, errno.ENOTSOCK): "the descriptor is no socket",
    (abi.ADOPT, errno.EPROTONOSUPPORT): "the socket is not a TCP socket",
    (abi.ADOPT, errno.ENOTCONN): "the socket is not connected",
    (abi.ADOPT, errno.EEXIST): "the socket has TLS or another upper layer protocol on it already",
    (abi.ADOPT, errno.EMFILE): "the daemon has no room for another connection or descriptor",
    (abi.EXPORT, errno.EOPNOTSUPP): "its records are made in user space; only kernel TLS can be exported",
    (abi.EXPORT, errno.EBUSY): "operations are in flight, or received data is unread: read it, then export",
    (abi.EXPORT, errno.EINVAL): "the connection has no TLS",
    (abi.EXPORT, errno.EPIPE): "one direction of the connection has ended already",
    (abi.START_TLS, errno.EBUSY): "other operations of the connection are in flight: wait for them or cancel them",
    (abi.START_TLS, errno.EINVAL): "the connection has TLS already, or a name, certificate or protocol is malformed",
    (abi.START_TLS, errno.EPIPE): "one direction of the connection has ended already",
    (abi.START_TLS, errno.ENOENT): "no certificate of this name is configured in the daemon",
    (abi.OPEN, errno.ENOENT): "no certificate of this name is configured in the daemon",
}


def alert_received(alert: int) -> AlertReceived:
    """The exception for a peer's alert."""
    error = AlertReceived(errno.EPROTO, f"the peer sent the alert {_ALERTS.get(alert, alert)}")
    error.alert = alert
    return error


def error_of(operation: Operation) -> TlsError:
    """The exception for an operation that is done with a negative result."""
    return error_from(operation.result, operation.detail, operation.opcode)


def error_from(result: int, detail: int, opcode: int) -> TlsError:
    """The exception for a completion: a negative errno and the fact behind it."""
    number = -result
    kind, alert = detail & 0xFFFF0000, detail & 0xFFFF
    what = abi.OPCODE_NAMES[opcode]
    error: TlsError
    if kind in (abi.DETAIL_ALERT_SENT, abi.DETAIL_ALERT_RECEIVED):
        received = kind == abi.DETAIL_ALERT_RECEIVED
        name = _ALERTS.get(alert, str(alert))
        text = f"{what}: the peer sent the alert {name}" if received else f"{what}: failed with the alert {name}"
        error = (AlertReceived if received else HandshakeError)(number, text)
        error.alert = alert
        return error
    class_, text = _BY_DETAIL.get(kind) or _BY_ERRNO.get(number) or (TlsError, os.strerror(number))
    return class_(number, f"{what}: {_BY_OPERATION.get((opcode, number), text)}")
