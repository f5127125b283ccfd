"""Which certificate a worker presents: by server name, then by what the client can verify. Public parts only."""

from base64 import b64decode
from collections.abc import Sequence
from typing import Any

from kdaemon.credentials import decode_chain
from kdaemon.tls.configuration import Credential


class CredentialStore:
    """The credentials of one configuration, indexed by name. Immutable; a reload makes another."""

    def __init__(self, descriptions: Sequence[dict[str, Any]]) -> None:
        self._all: list[Credential] = []
        self._by_name: dict[str, list[Credential]] = {}
        for description in descriptions:
            credential = Credential(
                key_id=description["key_id"],
                chain_der=decode_chain(description),
                schemes=tuple(description["schemes"]),
                ocsp=b64decode(description["ocsp"]) or None,
            )
            self._all.append(credential)
            for name in description["names"]:
                self._by_name.setdefault(name, []).append(credential)

    def knows(self, name: str) -> bool:
        """Whether a credential has exactly this name."""
        return name.lower() in self._by_name

    def select(self, server_name: str | None, signature_algorithms: Sequence[int]) -> Credential | None:
        """The first credential for the exact name, then for its wildcard, then of all, that has a scheme in common.

        Unknown names get the first credential, as with other servers: the client is the one to judge a name (RFC 6066,
        section 3 leaves both ways open). None when no key can make a signature that the client verifies.
        """
        name = (server_name or "").lower()
        wildcard = "*." + name.partition(".")[2]
        for candidates in (self._by_name.get(name, ()), self._by_name.get(wildcard, ()), self._all):
            for credential in candidates:
                if any(scheme in signature_algorithms for scheme in credential.schemes):
                    return credential
        return None
