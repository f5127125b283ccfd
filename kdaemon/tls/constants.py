"""Code points of TLS 1.3 (RFC 8446 and its revision RFC 9846, with the IANA registries) that the engine knows."""

from typing import Final

VERSION_SSL_3_0: Final = 0x0300
VERSION_TLS_1_0: Final = 0x0301
VERSION_TLS_1_2: Final = 0x0303
VERSION_TLS_1_3: Final = 0x0304


class ContentType:
    """Record content types (RFC 8446 §5.1)."""

    CHANGE_CIPHER_SPEC: Final = 20
    ALERT: Final = 21
    HANDSHAKE: Final = 22
    APPLICATION_DATA: Final = 23


class HandshakeType:
    """Handshake message types (RFC 8446 §4)."""

    HELLO_REQUEST: Final = 0
    CLIENT_HELLO: Final = 1
    SERVER_HELLO: Final = 2
    NEW_SESSION_TICKET: Final = 4
    END_OF_EARLY_DATA: Final = 5
    ENCRYPTED_EXTENSIONS: Final = 8
    CERTIFICATE: Final = 11
    CERTIFICATE_REQUEST: Final = 13
    CERTIFICATE_VERIFY: Final = 15
    FINISHED: Final = 20
    KEY_UPDATE: Final = 24
    MESSAGE_HASH: Final = 254


class ExtensionType:
    """Extensions the engine recognises (RFC 8446 §4.2, RFC 8449); all others are unknown to it."""

    SERVER_NAME: Final = 0
    STATUS_REQUEST: Final = 5
    SUPPORTED_GROUPS: Final = 10
    SIGNATURE_ALGORITHMS: Final = 13
    APPLICATION_LAYER_PROTOCOL_NEGOTIATION: Final = 16
    RECORD_SIZE_LIMIT: Final = 28
    PRE_SHARED_KEY: Final = 41
    EARLY_DATA: Final = 42
    SUPPORTED_VERSIONS: Final = 43
    COOKIE: Final = 44
    PSK_KEY_EXCHANGE_MODES: Final = 45
    CERTIFICATE_AUTHORITIES: Final = 47
    OID_FILTERS: Final = 48
    SIGNATURE_ALGORITHMS_CERT: Final = 50
    KEY_SHARE: Final = 51


class AlertDescription:
    """Alerts (RFC 8446 §6, general_error from RFC 9846 §6)."""

    CLOSE_NOTIFY: Final = 0
    UNEXPECTED_MESSAGE: Final = 10
    BAD_RECORD_MAC: Final = 20
    RECORD_OVERFLOW: Final = 22
    HANDSHAKE_FAILURE: Final = 40
    BAD_CERTIFICATE: Final = 42
    UNSUPPORTED_CERTIFICATE: Final = 43
    CERTIFICATE_REVOKED: Final = 44
    CERTIFICATE_EXPIRED: Final = 45
    CERTIFICATE_UNKNOWN: Final = 46
    ILLEGAL_PARAMETER: Final = 47
    UNKNOWN_CA: Final = 48
    ACCESS_DENIED: Final = 49
    DECODE_ERROR: Final = 50
    DECRYPT_ERROR: Final = 51
    PROTOCOL_VERSION: Final = 70
    INSUFFICIENT_SECURITY: Final = 71
    INTERNAL_ERROR: Final = 80
    INAPPROPRIATE_FALLBACK: Final = 86
    USER_CANCELED: Final = 90
    MISSING_EXTENSION: Final = 109
    UNSUPPORTED_EXTENSION: Final = 110
    UNRECOGNIZED_NAME: Final = 112
    BAD_CERTIFICATE_STATUS_RESPONSE: Final = 113
    UNKNOWN_PSK_IDENTITY: Final = 115
    CERTIFICATE_REQUIRED: Final = 116
    GENERAL_ERROR: Final = 117
    NO_APPLICATION_PROTOCOL: Final = 120


class CipherSuite:
    """Cipher suites of TLS 1.3 (RFC 8446 §B.4), and the two signalling values a server looks at."""

    TLS_AES_128_GCM_SHA256: Final = 0x1301
    TLS_AES_256_GCM_SHA384: Final = 0x1302
    TLS_CHACHA20_POLY1305_SHA256: Final = 0x1303
    TLS_FALLBACK_SCSV: Final = 0x5600


class NamedGroup:
    """Groups of key exchange (RFC 8446 §4.2.7, draft-ietf-tls-ecdhe-mlkem)."""

    SECP256R1: Final = 0x0017
    SECP384R1: Final = 0x0018
    X25519: Final = 0x001D
    X25519MLKEM768: Final = 0x11EC


class SignatureScheme:
    """Signature schemes (RFC 8446 §4.2.3). The PKCS#1 ones are for certificate chains only."""

    RSA_PKCS1_SHA256: Final = 0x0401
    RSA_PKCS1_SHA384: Final = 0x0501
    RSA_PKCS1_SHA512: Final = 0x0601
    ECDSA_SECP256R1_SHA256: Final = 0x0403
    ECDSA_SECP384R1_SHA384: Final = 0x0503
    RSA_PSS_RSAE_SHA256: Final = 0x0804
    RSA_PSS_RSAE_SHA384: Final = 0x0805
    RSA_PSS_RSAE_SHA512: Final = 0x0806
    ED25519: Final = 0x0807
    RSA_PSS_PSS_SHA256: Final = 0x0809
    RSA_PSS_PSS_SHA384: Final = 0x080A
    RSA_PSS_PSS_SHA512: Final = 0x080B


class PskKeyExchangeMode:
    """RFC 8446 §4.2.9. The engine uses PSK with (EC)DHE only."""

    PSK_KE: Final = 0
    PSK_DHE_KE: Final = 1


NAME_TYPE_HOST_NAME: Final = 0  # RFC 6066 §3
STATUS_TYPE_OCSP: Final = 1  # RFC 6066 §8

RECORD_HEADER_SIZE: Final = 5
HANDSHAKE_HEADER_SIZE: Final = 4
PLAINTEXT_SIZE_MAX: Final = 1 << 14  # RFC 8446 §5.1
CIPHERTEXT_SIZE_MAX: Final = (1 << 14) + 256  # RFC 8446 §5.2
AEAD_TAG_SIZE: Final = 16
RANDOM_SIZE: Final = 32
SESSION_ID_SIZE_MAX: Final = 32
RECORD_SIZE_LIMIT_MIN: Final = 64  # RFC 8449 §4
RECORD_SIZE_LIMIT_MAX: Final = PLAINTEXT_SIZE_MAX + 1  # with the byte of the content type
TICKET_LIFETIME_MAX_S: Final = 604_800  # RFC 8446 §4.6.1: seven days

# The largest ClientHello that can be well-formed: version, random, session id, every cipher suite, every compression
# method, a full block of extensions. Other messages carry certificates or tickets and get bounds of our own.
CLIENT_HELLO_SIZE_MAX: Final = 2 + 32 + 33 + 2 + 65_534 + 256 + 2 + 65_535
SERVER_HELLO_SIZE_MAX: Final = 2 + 32 + 33 + 2 + 1 + 2 + 65_535
ENCRYPTED_EXTENSIONS_SIZE_MAX: Final = 2 + 65_535
CERTIFICATE_REQUEST_SIZE_MAX: Final = 256 + 2 + 65_535
CERTIFICATE_SIZE_MAX: Final = 100_000
CERTIFICATE_VERIFY_SIZE_MAX: Final = 4 + 2_048
FINISHED_SIZE_MAX: Final = 48
NEW_SESSION_TICKET_SIZE_MAX: Final = 4 + 4 + 256 + 2 + 65_535 + 2 + 65_534
KEY_UPDATE_SIZE: Final = 1

CERTIFICATE_COUNT_MAX: Final = 16
COOKIE_SIZE_MAX: Final = 32_768  # it has to fit in the second ClientHello with everything else
PSK_IDENTITIES_TRIED_MAX: Final = 8

# SHA-256 of "HelloRetryRequest": the random that marks a ServerHello as one (RFC 8446 §4.1.3).
HELLO_RETRY_REQUEST_RANDOM: Final = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")
# Last eight bytes of ServerHello.random from a server that could do better (RFC 8446 §4.1.3).
DOWNGRADE_SENTINELS: Final = (b"DOWNGRD\x01", b"DOWNGRD\x00")


def _names_of(namespace: type) -> dict[int, str]:
    return {code: name.lower() for name, code in vars(namespace).items() if isinstance(code, int)}


ALERT_NAMES: Final = _names_of(AlertDescription)
HANDSHAKE_NAMES: Final = _names_of(HandshakeType)
EXTENSION_NAMES: Final = _names_of(ExtensionType)
CIPHER_SUITE_NAMES: Final = {code: name.upper() for code, name in _names_of(CipherSuite).items()}
GROUP_NAMES: Final = {
    NamedGroup.SECP256R1: "secp256r1",
    NamedGroup.SECP384R1: "secp384r1",
    NamedGroup.X25519: "x25519",
    NamedGroup.X25519MLKEM768: "X25519MLKEM768",
}
SIGNATURE_SCHEME_NAMES: Final = _names_of(SignatureScheme)
