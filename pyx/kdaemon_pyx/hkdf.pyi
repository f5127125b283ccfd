"""HMAC for the key schedule of handshakes; see hkdf.pyx."""

def hmac_digest(key: bytes, message: bytes, name: str, /) -> bytes:
    """HMAC of ``message`` under ``key`` (at most one block) with "sha256" or "sha384"."""
