"""Key exchange (RFC 8446 §4.2.8): X25519, secp256r1, secp384r1 and the hybrid X25519MLKEM768.

A hybrid share is the ML-KEM part followed by the X25519 part, and so is its secret (draft-ietf-tls-ecdhe-mlkem §3).
Each client share is for one exchange. Everything wrong with a peer's share is a :class:`BadKeyShare`.
"""

from collections.abc import Callable
from typing import Final, Protocol

from cryptography.hazmat.primitives.asymmetric import ec, mlkem
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from kdaemon.tls.constants import GROUP_NAMES, NamedGroup
from kdaemon.tls.errors import BadKeyShare

_X25519_SIZE: Final = 32
_MLKEM768_PUBLIC_KEY_SIZE: Final = 1184
_MLKEM768_CIPHERTEXT_SIZE: Final = 1088
_CURVES: Final[dict[int, ec.EllipticCurve]] = {
    NamedGroup.SECP256R1: ec.SECP256R1(),
    NamedGroup.SECP384R1: ec.SECP384R1(),
}
_POINT_SIZES: Final = {NamedGroup.SECP256R1: 65, NamedGroup.SECP384R1: 97}
_ECDH: Final = ec.ECDH()

SUPPORTED_GROUPS: Final = (
    NamedGroup.X25519MLKEM768,
    NamedGroup.X25519,
    NamedGroup.SECP256R1,
    NamedGroup.SECP384R1,
)


class KeyShare(Protocol):
    """The private half of a share; ``exchange`` may be called once."""

    group: int
    public: bytes

    def exchange(self, peer: bytes) -> bytes:
        """The shared secret with the peer's share. Raises BadKeyShare."""


class X25519KeyShare:
    """X25519 (RFC 7748); an all-zero result is refused (RFC 8446 §7.4.2)."""

    __slots__ = ("_private", "group", "public")

    def __init__(self, private: X25519PrivateKey | None = None) -> None:
        self._private = private or X25519PrivateKey.generate()
        self.group: int = NamedGroup.X25519
        self.public = self._private.public_key().public_bytes_raw()

    def exchange(self, peer: bytes) -> bytes:
        """The shared secret, 32 bytes."""
        if len(peer) != _X25519_SIZE:
            raise BadKeyShare(f"an X25519 share has {len(peer)} bytes")
        try:
            return self._private.exchange(X25519PublicKey.from_public_bytes(peer))
        except ValueError:
            raise BadKeyShare("an X25519 share leads to the all-zero secret") from None


class EllipticCurveKeyShare:
    """secp256r1 or secp384r1, uncompressed points only (RFC 8446 §4.2.8.2)."""

    __slots__ = ("_private", "group", "public")

    def __init__(self, group: int, private: ec.EllipticCurvePrivateKey | None = None) -> None:
        self._private = private or ec.generate_private_key(_CURVES[group])
        self.group = group
        self.public = self._private.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)

    def exchange(self, peer: bytes) -> bytes:
        """The x coordinate of the shared point."""
        if len(peer) != _POINT_SIZES[self.group] or peer[0] != 4:
            raise BadKeyShare(f"a {GROUP_NAMES[self.group]} share is no uncompressed point")
        try:
            public = ec.EllipticCurvePublicKey.from_encoded_point(_CURVES[self.group], peer)
            return self._private.exchange(_ECDH, public)
        except ValueError:
            raise BadKeyShare(f"a {GROUP_NAMES[self.group]} share is not on its curve") from None


class HybridKeyShare:
    """A client's X25519MLKEM768 share.

    ``classical`` is the X25519 half, which may be offered beside it as a share of its own.
    """

    __slots__ = ("_decapsulation", "classical", "group", "public")

    def __init__(
        self, decapsulation: mlkem.MLKEM768PrivateKey | None = None, classical: X25519KeyShare | None = None
    ) -> None:
        self._decapsulation = decapsulation or mlkem.MLKEM768PrivateKey.generate()
        self.classical = classical or X25519KeyShare()
        self.group: int = NamedGroup.X25519MLKEM768
        self.public = self._decapsulation.public_key().public_bytes_raw() + self.classical.public

    def exchange(self, peer: bytes) -> bytes:
        """The two secrets, 64 bytes."""
        if len(peer) != _MLKEM768_CIPHERTEXT_SIZE + _X25519_SIZE:
            raise BadKeyShare(f"an X25519MLKEM768 share has {len(peer)} bytes")
        secret = self._decapsulation.decapsulate(peer[:_MLKEM768_CIPHERTEXT_SIZE])
        return secret + self.classical.exchange(peer[_MLKEM768_CIPHERTEXT_SIZE:])


KeyShareFactory = Callable[[int], KeyShare]


def generate_key_share(group: int) -> KeyShare:
    """A fresh share of a group in SUPPORTED_GROUPS."""
    if group == NamedGroup.X25519:
        return X25519KeyShare()
    if group == NamedGroup.X25519MLKEM768:
        return HybridKeyShare()
    return EllipticCurveKeyShare(group)


def answer_key_share(group: int, client_share: bytes, generate: KeyShareFactory) -> tuple[bytes, bytes]:
    """The server's side: (its share, shared secret) for a client's share."""
    if group == NamedGroup.X25519MLKEM768:
        if len(client_share) != _MLKEM768_PUBLIC_KEY_SIZE + _X25519_SIZE:
            raise BadKeyShare(f"an X25519MLKEM768 share has {len(client_share)} bytes")
        try:
            encapsulation = mlkem.MLKEM768PublicKey.from_public_bytes(client_share[:_MLKEM768_PUBLIC_KEY_SIZE])
        except ValueError:
            # FIPS 203 §7.2: a key that is not in canonical form fails the modulus check.
            raise BadKeyShare("an X25519MLKEM768 share has no valid ML-KEM key") from None
        classical = generate(NamedGroup.X25519)
        classical_secret = classical.exchange(client_share[_MLKEM768_PUBLIC_KEY_SIZE:])
        secret, ciphertext = encapsulation.encapsulate()
        return ciphertext + classical.public, secret + classical_secret
    share = generate(group)
    return share.public, share.exchange(client_share)
