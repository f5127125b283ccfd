"""What comes after the handshake: KeyUpdate, tickets, alerts, and the budget for all of them."""

import pytest

from kdaemon.tls import errors
from kdaemon.tls.constants import CipherSuite, ContentType
from kdaemon.tls.key_schedule import SUITES, ticket_psk, traffic_key
from kdaemon.tls.messages import NewSessionTicket, serialize_key_update, serialize_message, serialize_new_session_ticket
from kdaemon.tls.post_handshake import (
    BUDGET_MESSAGES,
    ConnectionSecrets,
    ControlState,
    handle_control_record,
    next_keys,
    start_key_update,
)
from kdaemon.tls.session import SessionCache
from kdaemon.tls.signing import Role

SECRETS = ConnectionSecrets(CipherSuite.TLS_AES_128_GCM_SHA256, b"t" * 32, b"r" * 32, b"m" * 32)
TICKET = NewSessionTicket(3600, 7, b"\x00", b"ticket", {})


def handle(content, *, role=Role.SERVER, content_type=ContentType.HANDSHAKE, state=None, now_s=1000.0, secrets=SECRETS):
    return handle_control_record(role, content_type, content, secrets, state=state or ControlState(), now_s=now_s)


@pytest.mark.parametrize("role", Role)
def test_key_update(role):
    reaction = handle(serialize_key_update(False), role=role)
    assert reaction.error is None
    assert reaction.rx == next_keys(SECRETS.cipher_suite, SECRETS.rx_secret)
    assert reaction.tx is None and not reaction.messages

    reaction = handle(serialize_key_update(True), role=role)
    assert reaction.rx == next_keys(SECRETS.cipher_suite, SECRETS.rx_secret)
    assert reaction.tx == next_keys(SECRETS.cipher_suite, SECRETS.tx_secret)
    assert reaction.messages == serialize_key_update(False)


@pytest.mark.parametrize("suite", SUITES.values(), ids=lambda suite: suite.name)
def test_key_generations(suite):
    secret = bytes(suite.hash.size)
    first = next_keys(suite.code, secret)
    second = next_keys(suite.code, first.secret)
    assert (first.key, first.iv) == traffic_key(suite, first.secret)
    assert len(second.key) == suite.key_size
    assert len({secret, first.secret, second.secret}) == 3


def test_our_own_key_update():
    reaction = start_key_update(SECRETS, request_update=True)
    assert reaction.messages == serialize_key_update(True)
    assert reaction.tx == next_keys(SECRETS.cipher_suite, SECRETS.tx_secret)
    assert reaction.rx is None


def test_key_update_cut_at_every_byte():
    message = serialize_key_update(True)
    for cut in range(1, len(message)):
        state = ControlState()
        reaction = handle(message[:cut], state=state)
        assert reaction == type(reaction)()
        assert state.fragment == message[:cut]
        assert handle(message[cut:], state=state).tx is not None
        assert not state.fragment


@pytest.mark.parametrize(
    ("content", "alert"),
    [
        (serialize_message(24, b"\x02"), 47),
        (serialize_message(24, b"\xff"), 47),
        (serialize_message(24, b""), 50),
        (b"\x18\x00\x00\x02", 50),
        (serialize_key_update(False) + b"\x18", 10),
        (serialize_key_update(False) * 2, 10),
        (b"", 10),
        (serialize_message(1, bytes(40)), 10),
        (serialize_message(13, b"\x00\x00\x00"), 10),
        (serialize_message(20, bytes(32)), 10),
        (serialize_message(0, b""), 10),
    ],
)
@pytest.mark.parametrize("role", Role)
def test_wrong_messages(role, content, alert):
    reaction = handle(content, role=role)
    assert isinstance(reaction.error, errors.TlsFault)
    assert reaction.alert == bytes((2, alert))
    assert reaction.rx is None


def test_ticket_at_the_server():
    assert handle(serialize_new_session_ticket(TICKET)).alert == b"\x02\x0a"


def test_tickets_at_the_client():
    message = serialize_new_session_ticket(TICKET)
    reaction = handle(message + serialize_new_session_ticket(TICKET._replace(nonce=b"\x01")), role=Role.CLIENT)
    first, second = reaction.tickets
    suite = SUITES[SECRETS.cipher_suite]
    assert first.psk == ticket_psk(suite.hash, SECRETS.resumption_secret, b"\x00")
    assert second.psk == ticket_psk(suite.hash, SECRETS.resumption_secret, b"\x01")
    assert first.ticket == b"ticket"
    assert first.obfuscated_age(1002.5) == 2507


@pytest.mark.parametrize(
    ("content_type", "content", "error"),
    [
        (ContentType.ALERT, b"\x01\x5a", errors.UnexpectedRecord),
        (ContentType.APPLICATION_DATA, b"data", errors.UnexpectedRecord),
        (ContentType.ALERT, b"\x01\x00", errors.CloseNotifyReceived),
        (ContentType.ALERT, b"\x02\x50", errors.AlertReceived),
    ],
)
def test_between_the_fragments_of_a_message(content_type, content, error):
    """Nothing may come there (RFC 8446 §5.1), but for a peer that ends the connection."""
    state = ControlState()
    handle(serialize_key_update(True)[:3], state=state)
    assert type(handle(content, content_type=content_type, state=state).error) is error


def test_early_data_in_a_ticket():
    message = serialize_new_session_ticket(TICKET._replace(extensions={42: b"\x00\x00\x40\x00", 0x7777: b"unknown"}))
    assert len(handle(message, role=Role.CLIENT).tickets) == 1
    message = serialize_new_session_ticket(TICKET._replace(extensions={42: b"\x00\x00\x40"}))
    assert handle(message, role=Role.CLIENT).alert == b"\x02\x32"


def test_ticket_lifetimes():
    def kept(lifetime_s):
        message = serialize_new_session_ticket(TICKET._replace(lifetime_s=lifetime_s))
        return handle(message, role=Role.CLIENT).tickets

    assert kept(0) == ()
    assert kept(2**32 - 1)[0].lifetime_s == 604_800
    (ticket,) = kept(10)
    assert ticket.usable(1009.0)
    assert not ticket.usable(1011.0)
    assert not ticket.usable(999.0)


def test_tickets_too_large_to_send_are_not_kept():
    def kept(size):
        return handle(serialize_new_session_ticket(TICKET._replace(ticket=bytes(size))), role=Role.CLIENT)

    assert len(kept(16_384).tickets) == 1
    assert kept(16_385).tickets == ()
    assert kept(65_535).error is None


def test_ticket_cut_over_records():
    message = serialize_new_session_ticket(TICKET)
    state = ControlState()
    for byte in message[:-1]:
        assert (
            handle(bytes((byte,)), role=Role.CLIENT, state=state, now_s=2000.0 + len(state.fragment) * 2).error is None
        )
    assert len(handle(message[-1:], role=Role.CLIENT, state=state, now_s=3000.0).tickets) == 1


@pytest.mark.parametrize(
    ("message", "alert"),
    [
        (serialize_new_session_ticket(TICKET._replace(ticket=b"")), 50),
        (serialize_new_session_ticket(TICKET._replace(extensions={51: b""})), 47),
        (serialize_new_session_ticket(TICKET)[:-1], None),
        (b"\x04" + (2**24 - 1).to_bytes(3, "big"), 50),
        (serialize_message(4, bytes(8)), 50),
    ],
)
def test_wrong_tickets(message, alert):
    reaction = handle(message, role=Role.CLIENT)
    assert reaction.alert == (bytes((2, alert)) if alert else b"")


def test_unknown_extension_of_a_ticket():
    message = serialize_new_session_ticket(TICKET._replace(extensions={0x7777: b"x", 42: b"\x00\x00\x40\x00"}))
    assert len(handle(message, role=Role.CLIENT).tickets) == 1


def test_alerts():
    def alert(content):
        return handle(content, content_type=ContentType.ALERT)

    assert isinstance(alert(b"\x01\x00").error, errors.CloseNotifyReceived)
    assert alert(b"\x02\x50").error.description == 80
    assert alert(b"\x01\x14").error.description == 20  # the level means nothing
    assert alert(b"\x02\x50").alert == b""
    assert alert(b"\x01\x5a").error is None
    assert alert(b"\x01").alert == b"\x02\x32"
    assert alert(b"\x01\x00\x01\x00").alert == b"\x02\x32"


def test_other_record_types():
    for content_type in (ContentType.CHANGE_CIPHER_SPEC, 0, 24, 255):
        assert handle(b"\x01", content_type=content_type).alert == b"\x02\x0a"


def test_flood():
    state = ControlState()
    for _ in range(int(BUDGET_MESSAGES)):
        assert handle(serialize_key_update(False), state=state).error is None
    assert isinstance(handle(serialize_key_update(False), state=state).error, errors.TooManyRecords)
    # The allowance grows back.
    assert handle(serialize_key_update(False), state=state, now_s=1100.0).error is None


def test_flood_of_tickets_in_one_record():
    reaction = handle(serialize_new_session_ticket(TICKET) * 100, role=Role.CLIENT)
    assert isinstance(reaction.error, errors.TooManyRecords)


def test_session_cache():
    def ticket(number, now_s=1000.0):
        message = serialize_new_session_ticket(TICKET._replace(ticket=b"%d" % number))
        return handle(message, role=Role.CLIENT, now_s=now_s).tickets[0]

    cache = SessionCache(servers_max=2)
    assert cache.take("a", 1000.0) is None
    for number in range(6):
        cache.put("a", ticket(number))
    taken = [cache.take("a", 1001.0).ticket for _ in range(4)]
    assert taken == [b"5", b"4", b"3", b"2"]
    assert cache.take("a", 1001.0) is None
    cache.put("a", ticket(9))
    assert cache.take("a", 9000.0) is None  # expired
    for server in "abc":
        cache.put(server, ticket(1))
        cache.put_group(server, 29)
    assert cache.take("a", 1001.0) is None
    assert cache.group("a") is None
    assert cache.take("c", 1001.0) is not None
    assert cache.group("c") == 29
    nothing = SessionCache(servers_max=0)
    nothing.put("a", ticket(1))
    nothing.put_group("a", 29)
    assert (nothing.take("a", 1001.0), nothing.group("a")) == (None, None)


def test_secrets_are_not_shown():
    reaction = handle(serialize_key_update(True))
    assert "t" * 32 not in repr(SECRETS)
    assert reaction.rx.secret.hex() not in repr(reaction) and repr(reaction.rx.secret) not in repr(reaction)
