"""Which certificate a worker presents: by server name, then by what the client can verify. Public parts only."""

from base64 import b64decode
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any, NamedTuple

from kdaemon.credentials import decode_chain
from kdaemon.tls.configuration import Credential, CredentialRequest
from kdaemon.tls.signing import PeerSchemes


class _Candidate(NamedTuple):
    credential: Credential
    signed_with: list[list[int]]  # tls.certificates.schemes_in_chain

    def fits(self, schemes: Sequence[int]) -> bool:
        """Whether its key can make a signature that a peer with these schemes verifies."""
        return any(scheme in schemes for scheme in self.credential.schemes)

    def chain_fits(self, schemes: Sequence[int]) -> bool:
        """Whether a peer with these schemes says that it verifies every signature in the chain."""
        return all(any(scheme in schemes for scheme in each) for each in self.signed_with)


class CredentialStore:
    """The credentials of one configuration, indexed by name. Immutable; a reload makes another."""

    def __init__(self, descriptions: Sequence[dict[str, Any]]) -> None:
        self._all: list[_Candidate] = []
        self._by_name: dict[str, list[_Candidate]] = {}
        for description in descriptions:
            credential = Credential(
                key_id=description["key_id"],
                chain_der=decode_chain(description),
                schemes=tuple(description["schemes"]),
                ocsp=b64decode(description["ocsp"]) or None,
            )
            candidate = _Candidate(credential, description["signed_with"])
            self._all.append(candidate)
            for name in description["names"]:
                self._by_name.setdefault(name, []).append(candidate)

    def knows(self, name: str) -> bool:
        """Whether a credential has exactly this name."""
        return name.lower() in self._by_name

    def for_client(self, name: str) -> Callable[[CredentialRequest], Credential | None] | None:
        """For ClientConfig: of those with exactly this name the first that the server can verify. None: no name."""
        named = self._by_name.get(name.lower(), ())

        def choose(asked: CredentialRequest) -> Credential | None:
            return next((each.credential for each in named if each.fits(asked.signature_algorithms)), None)

        return choose if name else None

    def presented(self, name: str) -> bytes:
        """SHA-256 of all that `for_client(name)` may present; empty: no name."""
        chains = (candidate.credential.chain_der for candidate in self._by_name.get(name.lower(), ()))
        return sha256(b"".join(der for chain in chains for der in chain)).digest() if name else b""

    def select(self, server_name: str | None, schemes: PeerSchemes) -> Credential | None:
        """Of those for the exact name, then for its wildcard, then of all, the first whose key has a scheme in common.

        Where there are several, one whose chain the client can verify goes first; else it gets a chain all the same
        (RFC 8446, section 4.4.2.2). Unknown names get the first credential, as with other servers: the client is the
        one to judge a name (RFC 6066, section 3 leaves both ways open). None when no key can make a signature that the
        client verifies.
        """
        name = (server_name or "").lower()
        wildcard = "*." + name.partition(".")[2]
        for candidates in (self._by_name.get(name, ()), self._by_name.get(wildcard, ()), self._all):
            usable: Credential | None = None
            for candidate in candidates:
                if candidate.fits(schemes.handshake):
                    if candidate.chain_fits(schemes.certificates):
                        return candidate.credential
                    usable = usable or candidate.credential
            if usable is not None:
                return usable
        return None
