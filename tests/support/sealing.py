"""Application records that no well-behaved TLS library would send, under the keys of a real connection.

The secret comes from OpenSSL's key log of the connection; the records are sealed with `cryptography`: nothing of
what is tested is used to test it.
"""

from __future__ import annotations

import struct
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

_SUITES = {
    "TLS_AES_128_GCM_SHA256": (AESGCM, 16, hashes.SHA256()),
    "TLS_AES_256_GCM_SHA384": (AESGCM, 32, hashes.SHA384()),
    "TLS_CHACHA20_POLY1305_SHA256": (ChaCha20Poly1305, 32, hashes.SHA256()),
}


def _expand_label(secret: bytes, label: str, length: int, algorithm: hashes.HashAlgorithm) -> bytes:
    """HKDF-Expand-Label with an empty context (RFC 8446 section 7.1)."""
    name = b"tls13 " + label.encode()
    info = struct.pack(">HB", length, len(name)) + name + b"\0"
    return HKDFExpand(algorithm, length, info).derive(secret)


class Sealer:
    """Seals records of the client's direction; `sequence` counts those sent under the present key."""

    def __init__(self, suite: str, key_log: Path, sequence: int = 0) -> None:
        lines = [
            line.split() for line in key_log.read_text().splitlines() if line.startswith("CLIENT_TRAFFIC_SECRET_0 ")
        ]
        self._aead, self._key_length, self._algorithm = _SUITES[suite]
        self._install(bytes.fromhex(lines[-1][2]))
        self.sequence = sequence

    def _install(self, secret: bytes) -> None:
        self._secret = secret
        self._key = self._aead(_expand_label(secret, "key", self._key_length, self._algorithm))
        self._iv = _expand_label(secret, "iv", 12, self._algorithm)
        self.sequence = 0

    def update_key(self) -> None:
        """Goes on with the next generation of keys, as after a sent KeyUpdate (RFC 8446 section 7.2)."""
        self._install(_expand_label(self._secret, "traffic upd", self._algorithm.digest_size, self._algorithm))

    def seal(self, content_type: int | None, content: bytes, padding: int = 0) -> bytes:
        """One record; content_type None leaves only padding inside, which RFC 8446 section 5.4 forbids."""
        inner = content + (b"" if content_type is None else bytes([content_type])) + b"\0" * padding
        header = struct.pack(">BHH", 23, 0x0303, len(inner) + 16)
        nonce = bytes(a ^ b for a, b in zip(self._iv, self.sequence.to_bytes(12, "big"), strict=True))
        self.sequence += 1
        return header + self._key.encrypt(nonce, inner, header)
