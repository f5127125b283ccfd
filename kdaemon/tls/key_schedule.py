"""The TLS 1.3 key schedule (RFC 8446 §7), as stages that offer only the derivations that are legal at that point.

``EarlyStage`` -> ``HandshakeStage`` -> ``MasterStage``; each is made from the one before. HKDF is one-shot HMAC over
HkdfLabel bytes that are prepared once per hash: no output is longer than its hash, so Expand is one HMAC (but for
exporters). Secrets are plain ``bytes`` held by their owner; nothing here keeps them, and no repr shows them.
"""

import hashlib
import hmac
from collections.abc import Callable
from typing import Final, Protocol

from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from kdaemon.tls.codec import vector8
from kdaemon.tls.constants import CIPHER_SUITE_NAMES, CipherSuite

IV_SIZE: Final = 12


class Aead(Protocol):
    """What the record layer needs of a cipher."""

    def encrypt(self, nonce: bytes, data: bytes, associated_data: bytes | None) -> bytes: ...
    def decrypt(self, nonce: bytes, data: bytes, associated_data: bytes | None) -> bytes: ...


HmacDigest = Callable[[bytes, bytes, str], bytes]
_hmac_digest: HmacDigest = hmac.digest


def use_hmac(function: HmacDigest) -> None:
    """Derives with ``function`` instead of ``hmac.digest`` from now on, in the whole process.

    (key, message, "sha256" or "sha384") -> digest. A handshake takes two dozen HMACs over some fifty bytes each, for
    which the general call spends most of its time preparing; whoever runs many handshakes has a leaner one.
    """
    global _hmac_digest  # noqa: PLW0603 - one primitive for the process, chosen at its start
    _hmac_digest = function


def _label_prefix(label: bytes, length: int, context_size: int) -> bytes:
    return length.to_bytes(2, "big") + vector8(b"tls13 " + label) + context_size.to_bytes(1, "big")


class HashParameters:
    """A hash with everything about the key schedule that depends on nothing else. Immutable, shared."""

    __slots__ = (
        "client_application",
        "client_handshake",
        "derived",
        "early_derived",
        "early_no_psk",
        "empty_hash",
        "exporter",
        "exporter_master",
        "external_binder",
        "finished",
        "name",
        "resumption",
        "resumption_binder",
        "resumption_master",
        "server_application",
        "server_handshake",
        "size",
        "traffic_update",
        "zeros",
    )

    def __init__(self, name: str) -> None:
        self.name = name
        empty = hashlib.new(name)
        size = empty.digest_size
        self.size = size
        self.zeros = bytes(size)
        self.empty_hash = empty.digest()
        # Prefixes of HkdfLabel; a transcript hash and the counter byte of HKDF-Expand go behind.
        self.client_handshake = _label_prefix(b"c hs traffic", size, size)
        self.server_handshake = _label_prefix(b"s hs traffic", size, size)
        self.client_application = _label_prefix(b"c ap traffic", size, size)
        self.server_application = _label_prefix(b"s ap traffic", size, size)
        self.exporter_master = _label_prefix(b"exp master", size, size)
        self.resumption_master = _label_prefix(b"res master", size, size)
        # Complete HKDF-Expand inputs.
        self.derived = _label_prefix(b"derived", size, size) + self.empty_hash + b"\x01"
        self.external_binder = _label_prefix(b"ext binder", size, size) + self.empty_hash + b"\x01"
        self.resumption_binder = _label_prefix(b"res binder", size, size) + self.empty_hash + b"\x01"
        self.finished = _label_prefix(b"finished", size, 0) + b"\x01"
        self.traffic_update = _label_prefix(b"traffic upd", size, 0) + b"\x01"
        self.early_no_psk = _hmac_digest(self.zeros, self.zeros, name)
        self.early_derived = _hmac_digest(self.early_no_psk, self.derived, name)


class SuiteParameters:
    """A cipher suite: its AEAD and its hash. Immutable, shared."""

    __slots__ = ("aead", "code", "hash", "iv_info", "key_info", "key_size", "name", "record_count_max")

    def __init__(
        self, code: int, aead: Callable[[bytes], Aead], key_size: int, hash_: HashParameters, record_count_max: int
    ) -> None:
        self.code = code
        self.name = CIPHER_SUITE_NAMES[code]
        self.aead = aead
        self.key_size = key_size
        self.hash = hash_
        self.key_info = _label_prefix(b"key", key_size, 0) + b"\x01"
        self.iv_info = _label_prefix(b"iv", IV_SIZE, 0) + b"\x01"
        #: Records one key may protect (RFC 8446 §5.5; 2^62 stands for "the sequence number ends first").
        self.record_count_max = record_count_max


SHA256: Final = HashParameters("sha256")
SHA384: Final = HashParameters("sha384")

SUITES: Final[dict[int, SuiteParameters]] = {
    suite.code: suite
    for suite in (
        SuiteParameters(CipherSuite.TLS_AES_128_GCM_SHA256, AESGCM, 16, SHA256, 23_726_566),
        SuiteParameters(CipherSuite.TLS_AES_256_GCM_SHA384, AESGCM, 32, SHA384, 23_726_566),
        SuiteParameters(CipherSuite.TLS_CHACHA20_POLY1305_SHA256, ChaCha20Poly1305, 32, SHA256, 1 << 62),
    )
}


class EarlyStage:
    """Early Secret, from a PSK or from zeros."""

    __slots__ = ("_hash", "_secret")

    def __init__(self, hash_: HashParameters, psk: bytes | None = None) -> None:
        self._hash = hash_
        self._secret = None if psk is None else _hmac_digest(hash_.zeros, psk, hash_.name)

    def binder_key(self, external: bool) -> bytes:
        """binder_key of the PSK (RFC 8446 §7.1); only a stage made from a PSK has one."""
        if self._secret is None:
            raise ValueError("an early stage without a PSK has no binder key")
        label = self._hash.external_binder if external else self._hash.resumption_binder
        return _hmac_digest(self._secret, label, self._hash.name)

    def handshake_stage(self, shared_secret: bytes) -> "HandshakeStage":
        """Goes on with the (EC)DHE or hybrid secret."""
        hash_ = self._hash
        derived = hash_.early_derived if self._secret is None else _hmac_digest(self._secret, hash_.derived, hash_.name)
        return HandshakeStage(hash_, _hmac_digest(derived, shared_secret, hash_.name))


class HandshakeStage:
    """Handshake Secret; transcript hashes end with ServerHello."""

    __slots__ = ("_hash", "_secret")

    def __init__(self, hash_: HashParameters, secret: bytes) -> None:
        self._hash = hash_
        self._secret = secret

    def client_traffic_secret(self, transcript_hash: bytes) -> bytes:
        """client_handshake_traffic_secret."""
        return _hmac_digest(self._secret, self._hash.client_handshake + transcript_hash + b"\x01", self._hash.name)

    def server_traffic_secret(self, transcript_hash: bytes) -> bytes:
        """server_handshake_traffic_secret."""
        return _hmac_digest(self._secret, self._hash.server_handshake + transcript_hash + b"\x01", self._hash.name)

    def master_stage(self) -> "MasterStage":
        """Goes on to the Master Secret."""
        hash_ = self._hash
        derived = _hmac_digest(self._secret, hash_.derived, hash_.name)
        return MasterStage(hash_, _hmac_digest(derived, hash_.zeros, hash_.name))


class MasterStage:
    """Master Secret; transcript hashes end with the server's Finished, for resumption with the client's."""

    __slots__ = ("_hash", "_secret")

    def __init__(self, hash_: HashParameters, secret: bytes) -> None:
        self._hash = hash_
        self._secret = secret

    def client_traffic_secret(self, transcript_hash: bytes) -> bytes:
        """client_application_traffic_secret_0."""
        return _hmac_digest(self._secret, self._hash.client_application + transcript_hash + b"\x01", self._hash.name)

    def server_traffic_secret(self, transcript_hash: bytes) -> bytes:
        """server_application_traffic_secret_0."""
        return _hmac_digest(self._secret, self._hash.server_application + transcript_hash + b"\x01", self._hash.name)

    def exporter_secret(self, transcript_hash: bytes) -> bytes:
        """exporter_master_secret."""
        return _hmac_digest(self._secret, self._hash.exporter_master + transcript_hash + b"\x01", self._hash.name)

    def resumption_secret(self, transcript_hash: bytes) -> bytes:
        """resumption_master_secret."""
        return _hmac_digest(self._secret, self._hash.resumption_master + transcript_hash + b"\x01", self._hash.name)


def traffic_key(suite: SuiteParameters, secret: bytes) -> tuple[bytes, bytes]:
    """(write_key, write_iv) of a traffic secret (RFC 8446 §7.3)."""
    name = suite.hash.name
    return (
        _hmac_digest(secret, suite.key_info, name)[: suite.key_size],
        _hmac_digest(secret, suite.iv_info, name)[:IV_SIZE],
    )


def finished_verify_data(hash_: HashParameters, base_key: bytes, transcript_hash: bytes) -> bytes:
    """verify_data of a Finished, and of a PSK binder (RFC 8446 §4.4.4)."""
    return _hmac_digest(_hmac_digest(base_key, hash_.finished, hash_.name), transcript_hash, hash_.name)


def next_traffic_secret(hash_: HashParameters, secret: bytes) -> bytes:
    """application_traffic_secret_N+1 after a KeyUpdate (RFC 8446 §7.2)."""
    return _hmac_digest(secret, hash_.traffic_update, hash_.name)


def ticket_psk(hash_: HashParameters, resumption_secret: bytes, ticket_nonce: bytes) -> bytes:
    """The PSK that a NewSessionTicket stands for (RFC 8446 §4.6.1)."""
    return expand_label(hash_, resumption_secret, b"resumption", ticket_nonce, hash_.size)


def expand_label(hash_: HashParameters, secret: bytes, label: bytes, context: bytes, length: int) -> bytes:
    """HKDF-Expand-Label for any label, context (≤ 255 bytes) and length (≤ 255 hashes); RFC 8446 §7.1."""
    if length > 255 * hash_.size:
        raise ValueError(f"HKDF cannot expand to {length} bytes")
    info = _label_prefix(label, length, len(context)) + context
    block, output, counter = b"", b"", 0
    while len(output) < length:
        counter += 1
        block = _hmac_digest(secret, block + info + counter.to_bytes(1, "big"), hash_.name)
        output += block
    return output[:length]


def export_keying_material(
    hash_: HashParameters, exporter_secret: bytes, label: bytes, context: bytes, length: int
) -> bytes:
    """TLS-Exporter (RFC 8446 §7.5); an absent context equals an empty one."""
    derived = expand_label(hash_, exporter_secret, label, hash_.empty_hash, hash_.size)
    return expand_label(hash_, derived, b"exporter", hashlib.new(hash_.name, context).digest(), length)
