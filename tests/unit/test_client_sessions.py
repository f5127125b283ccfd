"""What is remembered of servers for libtls programs: for whom, how long, how much."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from support.certificates import Issued

from kdaemon.client_sessions import ClientSessions, Scope, Session
from kdaemon.tls.handshake import Established
from kdaemon.tls.key_schedule import SUITES
from kdaemon.tls.session import SessionTicket

NOW_S = 2e9
DAY_S = 86_400
SCOPE = Scope(1000, "server.test", "server.test", 443, (b"h2",), b"", b"")
SECRET = b"secret!!" * 4


def ticket(now_s: float, lifetime_s: int = DAY_S) -> SessionTicket:
    return SessionTicket(0x1301, SECRET, b"ticket", 0, lifetime_s, now_s)


@pytest.fixture
def sessions() -> ClientSessions:
    sessions = ClientSessions()
    sessions.configure(2)
    return sessions


def connect(
    sessions: ClientSessions, certificate: bytes, scope: Scope | None, now_s: float, *, retried: bool = False
) -> Established:
    """One connection, which resumes if it can, gets a ticket and ends."""
    session = sessions.take(scope, now_s)
    established = Established(SUITES[0x1301])
    established.resumed, established.retried, established.group = session is not None, retried, 24
    established.peer_chain_der = () if session else (certificate,)
    sessions.established(7, established, scope, session, now_s)
    assert sessions.is_client(7)
    assert established.peer_chain_der == (certificate,)
    sessions.received(7, [ticket(now_s)])
    sessions.closed(7)
    assert not sessions.is_client(7)
    return established


def resumed_for_days(sessions: ClientSessions, certificate: bytes, scope: Scope, now_s: float) -> int:
    """By a connection every half a day, each of which gets a ticket."""
    for half_days in range(30):
        if half_days and not connect(sessions, certificate, scope, now_s + half_days * DAY_S / 2).resumed:
            return half_days // 2
        if not half_days:
            assert not connect(sessions, certificate, scope, now_s).resumed
    raise AssertionError("no end of it")


def test_a_chain_of_resumptions_ends(sessions: ClientSessions, make_issued: Callable[..., Issued]) -> None:
    """After seven days, and with the certificate where that was verified."""
    leaf = make_issued().x509
    der, ends_at_s = leaf.public_bytes(Encoding.DER), leaf.not_valid_after_utc.timestamp()
    assert resumed_for_days(sessions, der, SCOPE, ends_at_s - 10 * DAY_S) == 7
    sessions = ClientSessions()
    sessions.configure(2)
    assert resumed_for_days(sessions, der, SCOPE, ends_at_s - 3 * DAY_S) == 3
    assert resumed_for_days(sessions, der, SCOPE._replace(trusted=None), ends_at_s - 3 * DAY_S) == 7


def test_it_is_bounded(sessions: ClientSessions, make_issued: Callable[..., Issued]) -> None:
    leaf = make_issued().x509
    der, now_s = leaf.public_bytes(Encoding.DER), leaf.not_valid_before_utc.timestamp()
    scopes = [SCOPE._replace(user=user) for user in range(3)]
    for scope in scopes:
        connect(sessions, der, scope, now_s, retried=True)
    assert [sessions.group(scope) for scope in scopes] == [None, 24, 24]
    assert [sessions.take(scope, now_s) is None for scope in scopes] == [True, False, False]
    sessions.configure(0)
    connect(sessions, der, SCOPE, now_s, retried=True)
    assert (sessions.take(SCOPE, now_s), sessions.group(SCOPE)) == (None, None)


def test_nobody_in_particular_is_not_remembered(sessions: ClientSessions, make_issued: Callable[..., Issued]) -> None:
    leaf = make_issued().x509
    for _ in range(2):
        established = connect(sessions, leaf.public_bytes(Encoding.DER), None, NOW_S, retried=True)
        assert not established.resumed
    assert sessions.group(None) is None


def test_secrets_are_not_shown() -> None:
    shown = repr(Session(ticket(NOW_S), b"", NOW_S))
    assert "secret" not in shown
    assert "b'ticket'" not in shown
