"""Stateless session tickets: everything the server needs to resume, AEAD-sealed (RFC 8446 §4.6.1, in the manner of RFC
5077 §4).

    ticket = key name (16 bytes) || nonce (12) || AES-256-GCM(contents, associated data = key name)

All workers share the keys; the first of :class:`TicketKeys` seals, all open. Keys rotate by replacing the whole object.
"""

import struct
from collections.abc import Iterable
from typing import Final, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_NAME_SIZE: Final = 16
KEY_SIZE: Final = 32
TICKET_NONCE_SIZE: Final = 12
_FORMAT_VERSION: Final = 2
_FIXED = struct.Struct(">BHQQIIBBHB")
#: A ticket with a larger client certificate in it would not be worth its bytes in every ClientHello.
CLIENT_CERTIFICATE_SIZE_MAX: Final = 4096


class TicketContents(NamedTuple):
    """What a ticket remembers.

    ``issued_at_ms`` is wall-clock time; so is ``session_ends_at_ms``, which tickets of resumed connections inherit: no
    chain of resumptions outlives what the first handshake proved. ``psk`` is the resumption PSK itself;
    ``client_context`` is ``ClientAuthentication.context``, empty without a client certificate.
    """

    cipher_suite: int
    issued_at_ms: int
    session_ends_at_ms: int
    lifetime_s: int
    age_add: int
    psk: bytes
    server_name: str
    client_certificate_der: bytes
    client_context: bytes = b""

    def __repr__(self) -> str:
        return f"TicketContents(cipher_suite={self.cipher_suite:#06x}, server_name={self.server_name!r})"


class TicketKey:
    """One sealing key: ``name`` (16 bytes, public) and ``secret`` (32 bytes, kept inside the cipher object only)."""

    __slots__ = ("_aead", "name")

    def __init__(self, name: bytes, secret: bytes) -> None:
        if len(name) != KEY_NAME_SIZE or len(secret) != KEY_SIZE:
            raise ValueError(f"a ticket key needs a name of {KEY_NAME_SIZE} and a secret of {KEY_SIZE} bytes")
        self.name = name
        self._aead = AESGCM(secret)

    def seal(self, plaintext: bytes, nonce: bytes) -> bytes:
        """The whole ticket."""
        return self.name + nonce + self._aead.encrypt(nonce, plaintext, self.name)

    def open(self, ticket: bytes) -> bytes | None:
        """The contents, or None if this key did not seal them."""
        start = KEY_NAME_SIZE + TICKET_NONCE_SIZE
        try:
            return self._aead.decrypt(ticket[KEY_NAME_SIZE:start], ticket[start:], self.name)
        except InvalidTag:
            return None


class TicketKeys:
    """The current key and those still accepted. Immutable; thread-safe."""

    __slots__ = ("_by_name", "_current")

    def __init__(self, keys: Iterable[TicketKey]) -> None:
        keys = tuple(keys)
        if not keys:
            raise ValueError("no ticket key")
        self._current = keys[0]
        self._by_name = {key.name: key for key in keys}

    def seal(self, contents: TicketContents, nonce: bytes) -> bytes:
        """A ticket for ``contents``; ``nonce`` is 12 random bytes, never used twice."""
        server_name = contents.server_name.encode("ascii")
        plaintext = (
            _FIXED.pack(
                _FORMAT_VERSION,
                contents.cipher_suite,
                contents.issued_at_ms,
                contents.session_ends_at_ms,
                contents.lifetime_s,
                contents.age_add,
                len(contents.psk),
                len(server_name),
                len(contents.client_certificate_der),
                len(contents.client_context),
            )
            + contents.psk
            + server_name
            + contents.client_certificate_der
            + contents.client_context
        )
        return self._current.seal(plaintext, nonce)

    def open(self, ticket: bytes) -> TicketContents | None:
        """The contents of one of our tickets; None for anything else. Expiry is the caller's to judge."""
        key = self._by_name.get(ticket[:KEY_NAME_SIZE])
        if key is None or len(ticket) < KEY_NAME_SIZE + TICKET_NONCE_SIZE + _FIXED.size:
            return None
        plaintext = key.open(ticket)
        if plaintext is None or plaintext[0] != _FORMAT_VERSION:
            return None
        _, suite, issued_at_ms, ends_at_ms, lifetime_s, age_add, psk_size, name_size, certificate_size, _ = (
            _FIXED.unpack_from(plaintext)
        )
        psk_end = _FIXED.size + psk_size
        name_end = psk_end + name_size
        certificate_end = name_end + certificate_size
        return TicketContents(
            suite,
            issued_at_ms,
            ends_at_ms,
            lifetime_s,
            age_add,
            plaintext[_FIXED.size : psk_end],
            plaintext[psk_end:name_end].decode("ascii"),
            plaintext[name_end:certificate_end],
            plaintext[certificate_end:],
        )
