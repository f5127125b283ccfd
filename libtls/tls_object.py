"""What `ssl.SSLObject` tells of an established connection, for programs that ask in its words."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from libtls.connection import Info

if TYPE_CHECKING:
    from ssl import _PeerCertRetDictType

# RFC 8446 section B.4: name, bits of the key.
_CIPHER_SUITES = {
    0x1301: ("TLS_AES_128_GCM_SHA256", 128),
    0x1302: ("TLS_AES_256_GCM_SHA384", 256),
    0x1303: ("TLS_CHACHA20_POLY1305_SHA256", 256),
}


class TlsObject:
    """The answers of `ssl.SSLObject`, of an Info. It moves no bytes."""

    def __init__(self, info: Info) -> None:
        self._info = info
        self.server_hostname = info.server_name or None
        self.session_reused = info.resumed

    def version(self) -> str | None:
        return self._info.version or None

    def cipher(self) -> tuple[str, str, int] | None:
        """Name, version of the protocol, bits."""
        suite = _CIPHER_SUITES.get(self._info.cipher_suite)
        return suite and (suite[0], self._info.version, suite[1])

    def compression(self) -> str | None:
        return None

    def selected_alpn_protocol(self) -> str | None:
        return self._info.alpn

    def getpeercert(self, binary_form: bool = False) -> Any:
        """The peer's certificate as DER, or as the dictionary that `ssl` makes of it; None: it presented none."""
        if binary_form:
            return self._info.peer_certificate or None
        return _decoded(self._info.peer_certificate) if self._info.peer_certificate else None


def _decoded(der: bytes) -> _PeerCertRetDictType:
    """`ssl` has the function, but takes a file."""
    import _ssl  # noqa: PLC0415 - a program without OpenSSL needs none otherwise
    import ssl  # noqa: PLC0415

    fd = os.memfd_create("certificate")
    try:
        os.write(fd, ssl.DER_cert_to_PEM_cert(der).encode())
        decoded: _PeerCertRetDictType = _ssl._test_decode_cert(f"/proc/self/fd/{fd}")  # type: ignore[attr-defined]
        return decoded
    finally:
        os.close(fd)
