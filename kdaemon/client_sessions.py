"""What a worker remembers of the servers that its libtls programs were connected to: sessions to resume, and the group
that a server asked for.

It holds for one scope only: everything that decided the handshake which it comes from. A chain of resumptions ends
after seven days, and with the certificate by which the server was believed at its beginning.
"""

from collections.abc import Sequence
from typing import NamedTuple

from kdaemon.tls.certificates import load_certificate
from kdaemon.tls.constants import TICKET_LIFETIME_MAX_S
from kdaemon.tls.handshake import Established
from kdaemon.tls.session import SessionCache, SessionTicket


class Scope(NamedTuple):
    """Who asked for a connection, to whom, and on what terms."""

    user: int  # the program's, by the kernel's word
    server_name: str
    host: str  # with `port`: where to; empty and 0 where the program had a connection already
    port: int
    alpn: tuple[bytes, ...]
    trusted: bytes | None  # SHA-256 of the trust anchors given; empty: the system's; None: nothing is verified
    presented: bytes  # CredentialStore.presented


class Session(NamedTuple):
    """A ticket, and what the server showed of itself in the handshake at the beginning. The repr shows no secret."""

    ticket: SessionTicket
    certificate: bytes  # DER
    ends_at_s: float  # wall-clock time

    def usable(self, now_s: float) -> bool:
        """Whether both ticket and chain of resumptions are within their lifetimes."""
        return now_s < self.ends_at_s and self.ticket.usable(now_s)


class _Server(NamedTuple):
    """The other end of an established connection, for tickets that it may send."""

    scope: Scope | None
    certificate: bytes
    ends_at_s: float


class ClientSessions:
    """The memory of one worker, and its established connections in the client role. The control thread's.

    A scope None stands for nobody: nothing is remembered of it.
    """

    def __init__(self) -> None:
        self._cache: SessionCache[Scope, Session] = SessionCache(0)
        self._servers: dict[int, _Server] = {}  # by engine connection

    def configure(self, servers_max: int) -> None:
        """Of how many scopes something is remembered, the most recent ones; another number forgets them all."""
        if servers_max != self._cache.servers_max:
            self._cache = SessionCache(servers_max)

    def take(self, scope: Scope | None, now_s: float) -> Session | None:
        """A session to offer, once (RFC 8446, appendix C.4)."""
        return self._cache.take(scope, now_s) if scope else None

    def group(self, scope: Scope | None) -> int | None:
        """What the server asked for instead of our first choice."""
        return self._cache.group(scope) if scope else None

    def established(
        self, connection: int, established: Established, scope: Scope | None, session: Session | None, now_s: float
    ) -> None:
        """A handshake is complete in which `session` was offered.

        `established` gets the server's certificate, which a server that resumes does not show again.
        """
        if established.resumed:
            assert session is not None
            certificate, ends_at_s = session.certificate, session.ends_at_s
            established.peer_chain_der = (certificate,)
        else:
            certificate, ends_at_s = established.peer_chain_der[0], now_s + TICKET_LIFETIME_MAX_S
            if scope and scope.trusted is not None:
                expires_at_s = load_certificate(certificate).not_valid_after_utc.timestamp()
                ends_at_s = min(ends_at_s, expires_at_s)
        if scope and established.retried:
            self._cache.put_group(scope, established.group)
        self._servers[connection] = _Server(scope, certificate, ends_at_s)

    def is_client(self, connection: int) -> bool:
        """Whether we are the client there."""
        return connection in self._servers

    def received(self, connection: int, tickets: Sequence[SessionTicket]) -> None:
        """Tickets from the server of a connection."""
        scope, certificate, ends_at_s = self._servers[connection]
        if scope:
            for ticket in tickets:
                self._cache.put(scope, Session(ticket, certificate, ends_at_s))

    def closed(self, connection: int) -> None:
        """It is no connection of ours any more; what came from it stays."""
        self._servers.pop(connection, None)
