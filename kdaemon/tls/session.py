"""What a client remembers of servers (RFC 8446 §4.6.1): tickets to resume with, and the group a server preferred."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

from kdaemon.tls.constants import TICKET_LIFETIME_MAX_S
from kdaemon.tls.key_schedule import SUITES, ticket_psk
from kdaemon.tls.messages import NewSessionTicket

TICKETS_PER_SERVER_MAX: Final = 4
TICKET_SIZE_MAX: Final = 16_384  # a larger one would not fit in a ClientHello with everything else, or not be worth it


class SessionTicket(NamedTuple):
    """A ticket as the client keeps it. ``received_at_s``: wall-clock seconds. The repr shows no secret."""

    cipher_suite: int
    psk: bytes
    ticket: bytes
    age_add: int
    lifetime_s: int
    received_at_s: float

    def __repr__(self) -> str:
        return f"SessionTicket(cipher_suite={self.cipher_suite:#06x}, lifetime_s={self.lifetime_s})"

    def usable(self, now_s: float) -> bool:
        """Whether the ticket is still within its lifetime."""
        return 0 <= now_s - self.received_at_s < self.lifetime_s

    def obfuscated_age(self, now_s: float) -> int:
        """obfuscated_ticket_age (RFC 8446 §4.2.11.1)."""
        return (int((now_s - self.received_at_s) * 1000) + self.age_add) & 0xFFFFFFFF


def session_ticket(
    message: NewSessionTicket, cipher_suite: int, resumption_secret: bytes, now_s: float
) -> SessionTicket | None:
    """Makes the client's form of a NewSessionTicket; None if its lifetime or size forbids keeping it."""
    lifetime_s = min(message.lifetime_s, TICKET_LIFETIME_MAX_S)
    if not lifetime_s or len(message.ticket) > TICKET_SIZE_MAX:
        return None
    psk = ticket_psk(SUITES[cipher_suite].hash, resumption_secret, message.nonce)
    return SessionTicket(cipher_suite, psk, message.ticket, message.age_add, lifetime_s, now_s)


class Usable(Protocol):
    """What a cache keeps: a SessionTicket, or more than that."""

    def usable(self, now_s: float) -> bool:
        """Whether it is still within its lifetime."""


Server = TypeVar("Server", bound=Hashable)
Session = TypeVar("Session", bound=Usable)


class SessionCache(Generic[Server, Session]):
    """Sessions and preferred groups by server, the least recently used forgotten first. Not thread-safe.

    The key is whatever tells servers apart for the caller: host, port, and everything that may not be mixed
    (verification policy, client certificate). ``servers_max`` 0: nothing is kept.
    """

    def __init__(self, servers_max: int = 1024) -> None:
        self.servers_max = servers_max
        self._sessions: OrderedDict[Server, list[Session]] = OrderedDict()
        self._groups: OrderedDict[Server, int] = OrderedDict()

    def put(self, server: Server, session: Session) -> None:
        """Remembers a session."""
        sessions = self._sessions.setdefault(server, [])
        sessions.append(session)
        del sessions[:-TICKETS_PER_SERVER_MAX]
        self._sessions.move_to_end(server)
        while len(self._sessions) > self.servers_max:
            self._sessions.popitem(last=False)

    def take(self, server: Server, now_s: float) -> Session | None:
        """The newest usable session, which is forgotten: tickets are for one use (RFC 8446 §C.4)."""
        sessions = self._sessions.get(server, [])
        while sessions:
            session = sessions.pop()
            if session.usable(now_s):
                return session
        self._sessions.pop(server, None)
        return None

    def put_group(self, server: Server, group: int) -> None:
        """Remembers the group a server asked for or used."""
        self._groups[server] = group
        self._groups.move_to_end(server)
        while len(self._groups) > self.servers_max:
            self._groups.popitem(last=False)

    def group(self, server: Server) -> int | None:
        """The group to send a share of first."""
        return self._groups.get(server)
