"""After the handshake (RFC 8446 §4.6, §6): what to do about a record that is not application data.

Everything is a function of the record and of the connection's secrets, which live with the record layer. The only thing
to remember is a :class:`ControlState`, and only for connections that received such a record at all.
"""

from typing import Final, NamedTuple

from kdaemon.tls.constants import (
    HANDSHAKE_HEADER_SIZE,
    HANDSHAKE_NAMES,
    KEY_UPDATE_SIZE,
    NEW_SESSION_TICKET_SIZE_MAX,
    AlertDescription,
    ContentType,
    ExtensionType,
    HandshakeType,
)
from kdaemon.tls.errors import (
    AlertReceived,
    CloseNotifyReceived,
    EmptyRecord,
    ExcessHandshakeData,
    IllegalParameter,
    MalformedMessage,
    MessageTooLong,
    TlsError,
    TlsFault,
    TooManyRecords,
    UnexpectedMessage,
    UnexpectedRecord,
    alert_for,
)
from kdaemon.tls.key_schedule import SUITES, next_traffic_secret, traffic_key
from kdaemon.tls.messages import parse_key_update, parse_new_session_ticket, serialize_key_update
from kdaemon.tls.session import SessionTicket, session_ticket
from kdaemon.tls.signing import Role

#: Control messages a peer may send at once, and how fast the allowance grows back. Honest peers send one per terabyte.
BUDGET_MESSAGES: Final = 64.0
BUDGET_PER_SECOND: Final = 0.5
RECOGNISED_ELSEWHERE: Final = frozenset(
    code for code in vars(ExtensionType).values() if isinstance(code, int) and code != ExtensionType.EARLY_DATA
)


class ControlState:
    """What is remembered of a connection between its control records: a message cut in two, and the flood budget."""

    __slots__ = ("budget", "fragment", "refilled_at_s")

    def __init__(self) -> None:
        self.fragment = b""
        self.budget = BUDGET_MESSAGES
        self.refilled_at_s = 0.0

    def spend(self, now_s: float) -> None:
        """Takes one message from the budget. Raises TooManyRecords."""
        elapsed_s = max(now_s - self.refilled_at_s, 0.0)
        self.budget = min(BUDGET_MESSAGES, self.budget + elapsed_s * BUDGET_PER_SECOND)
        self.refilled_at_s = now_s
        if self.budget < 1.0:
            raise TooManyRecords("the peer floods the connection with control messages")
        self.budget -= 1.0


class ConnectionSecrets(NamedTuple):
    """What the record layer keeps of a connection for us, in the order in which the engine hands it up."""

    cipher_suite: int
    tx_secret: bytes
    rx_secret: bytes
    resumption_secret: bytes

    def __repr__(self) -> str:
        return f"ConnectionSecrets(cipher_suite={self.cipher_suite:#06x})"


class NewKeys(NamedTuple):
    """The next generation of one direction's traffic keys."""

    key: bytes
    iv: bytes
    secret: bytes

    def __repr__(self) -> str:
        return "NewKeys()"


class Reaction(NamedTuple):
    """What to do in order: install ``rx``, send ``messages`` (handshake content) under the old key, install ``tx``.

    ``error`` ends the connection; then only ``alert`` (alert content, empty if none is due) is sent. ``tickets`` are
    for the client's cache.
    """

    rx: NewKeys | None = None
    messages: bytes = b""
    tx: NewKeys | None = None
    tickets: tuple[SessionTicket, ...] = ()
    error: TlsError | None = None
    alert: bytes = b""


def next_keys(cipher_suite: int, secret: bytes) -> NewKeys:
    """The generation behind ``secret`` (RFC 8446 §7.2)."""
    suite = SUITES[cipher_suite]
    following = next_traffic_secret(suite.hash, secret)
    return NewKeys(*traffic_key(suite, following), following)


def start_key_update(secrets: ConnectionSecrets, *, request_update: bool = False) -> Reaction:
    """Our own KeyUpdate, before the AEAD's record limit: a message to send, and the keys to send with behind it."""
    return Reaction(
        messages=serialize_key_update(request_update), tx=next_keys(secrets.cipher_suite, secrets.tx_secret)
    )


def handle_control_record(
    role: Role,
    content_type: int,
    content: bytes,
    secrets: ConnectionSecrets,
    *,
    state: ControlState,
    now_s: float,
) -> Reaction:
    """Judges one decrypted record that is not application data. ``role`` is ours, ``now_s`` wall-clock time in seconds.

    Never raises a TlsError: it is in the reaction.
    """
    try:
        state.spend(now_s)
        if content_type == ContentType.ALERT:
            _judge_alert(content)
            if state.fragment:
                raise UnexpectedRecord("an alert comes between the fragments of a handshake message")  # RFC 8446 §5.1
            return Reaction()
        if content_type != ContentType.HANDSHAKE:
            raise UnexpectedRecord(f"a record of type {content_type} comes after the handshake")
        if not content:
            raise EmptyRecord("a handshake record is empty")
        return _handle_messages(role, content, secrets, state, now_s)
    except TlsFault as fault:
        return Reaction(error=fault, alert=bytes((2, alert_for(fault))))
    except TlsError as error:
        return Reaction(error=error)


def _judge_alert(content: bytes) -> None:
    if len(content) != 2:
        raise MalformedMessage("an alert record holds something else than one alert")
    if content[1] == AlertDescription.CLOSE_NOTIFY:
        raise CloseNotifyReceived
    if content[1] != AlertDescription.USER_CANCELED:
        raise AlertReceived(content[1])


def _handle_messages(
    role: Role, content: bytes, secrets: ConnectionSecrets, state: ControlState, now_s: float
) -> Reaction:
    data, state.fragment = state.fragment + content, b""
    tickets: list[SessionTicket] = []
    position = 0
    while len(data) - position >= HANDSHAKE_HEADER_SIZE:
        message_type = data[position]
        size = int.from_bytes(data[position + 1 : position + HANDSHAKE_HEADER_SIZE], "big")
        _check_expected(role, message_type, size)
        end = position + HANDSHAKE_HEADER_SIZE + size
        if end > len(data):
            break
        message, position = data[position:end], end
        if position < len(data):
            state.spend(now_s)
        if message_type == HandshakeType.NEW_SESSION_TICKET:
            ticket = _accept_ticket(message, secrets, now_s)
            if ticket is not None:
                tickets.append(ticket)
            continue
        update_requested = parse_key_update(message)
        if position != len(data):
            raise ExcessHandshakeData("bytes follow a KeyUpdate in its record")  # RFC 8446 §5.1
        rx = next_keys(secrets.cipher_suite, secrets.rx_secret)
        if not update_requested:
            return Reaction(rx=rx, tickets=tuple(tickets))
        return start_key_update(secrets)._replace(rx=rx, tickets=tuple(tickets))
    state.fragment = data[position:]
    return Reaction(tickets=tuple(tickets))


def _check_expected(role: Role, message_type: int, size: int) -> None:
    if message_type == HandshakeType.KEY_UPDATE:
        size_max = KEY_UPDATE_SIZE
    elif message_type == HandshakeType.NEW_SESSION_TICKET and role is Role.CLIENT:
        size_max = NEW_SESSION_TICKET_SIZE_MAX
    else:
        # Post-handshake authentication is never offered, so a CertificateRequest is wrong too (RFC 8446 §4.6.2).
        name = HANDSHAKE_NAMES.get(message_type, f"type {message_type}")
        raise UnexpectedMessage(f"the handshake message {name} may not come after the handshake")
    if size > size_max:
        raise MessageTooLong(f"{HANDSHAKE_NAMES[message_type]} has {size} bytes, over the bound of {size_max}")


def _accept_ticket(message: bytes, secrets: ConnectionSecrets, now_s: float) -> SessionTicket | None:
    ticket = parse_new_session_ticket(message)
    if not RECOGNISED_ELSEWHERE.isdisjoint(ticket.extensions):
        raise IllegalParameter("a NewSessionTicket has an extension that belongs elsewhere")  # RFC 8446 §4.2
    early_data = ticket.extensions.get(ExtensionType.EARLY_DATA)
    if early_data is not None and len(early_data) != 4:
        raise MalformedMessage("max_early_data_size has a length that does not fit")
    if not secrets.resumption_secret:
        return None
    return session_ticket(ticket, secrets.cipher_suite, secrets.resumption_secret, now_s)
