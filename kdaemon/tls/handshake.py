"""What both ends of a handshake share: records in and out, reassembly of messages against a transition table, alerts.

A subclass supplies ``TRANSITIONS``: for each state, which messages may come, who handles them, how long they may be,
and whether keys change behind them (then they must end their record). Everything that is not in the table is an
unexpected_message.
"""

import hashlib
from collections.abc import Callable
from typing import Any, ClassVar, Final, NamedTuple

from kdaemon.tls.constants import (
    ALERT_NAMES,
    HANDSHAKE_HEADER_SIZE,
    HANDSHAKE_NAMES,
    AlertDescription,
    ContentType,
)
from kdaemon.tls.errors import (
    AlertReceived,
    CloseNotifyReceived,
    ExcessHandshakeData,
    HandshakeCanceled,
    InternalError,
    MalformedMessage,
    MessageTooLong,
    PlainHttpReceived,
    TlsError,
    TlsFault,
    TooManyRecords,
    UnexpectedMessage,
    UnexpectedRecord,
    alert_for,
)
from kdaemon.tls.key_schedule import SuiteParameters, export_keying_material, traffic_key
from kdaemon.tls.record import RecordReader, RecordWriter
from kdaemon.tls.signing import SignRequest

WARNINGS_MAX: Final = 4  # user_canceled alerts, which announce an end and do not make it
CLOSE_NOTIFY: Final = bytes((1, AlertDescription.CLOSE_NOTIFY))

Random = Callable[[int], bytes]
KeyLog = Callable[[str], None]


class TrafficKeys:
    """One direction of an established connection: key, IV, next record's sequence number, and traffic secret."""

    __slots__ = ("iv", "key", "secret", "sequence")

    def __init__(self, suite: SuiteParameters, secret: bytes) -> None:
        self.key, self.iv = traffic_key(suite, secret)
        self.secret = secret
        self.sequence = 0


class Established:
    """The result of a handshake: all that the record layer and the application need. No repr shows a secret.

    ``tx`` and ``rx`` are this side's directions; ``leftover`` is ciphertext received behind the last handshake record.
    ``record_size_max`` bounds what may be sent: content of a record with its type byte (RFC 8449), 16385 if not
    negotiated.
    """

    __slots__ = (
        "alpn",
        "exporter_secret",
        "external_psk_identity",
        "group",
        "leftover",
        "ocsp_response",
        "peer_chain_der",
        "peer_groups",
        "record_size_max",
        "resumed",
        "resumption_secret",
        "retried",
        "rx",
        "server_name",
        "signature_scheme",
        "suite",
        "tx",
    )

    tx: TrafficKeys
    rx: TrafficKeys

    def __init__(self, suite: SuiteParameters) -> None:
        self.suite = suite
        self.leftover = b""
        self.resumption_secret = b""
        self.exporter_secret = b""
        self.alpn: bytes | None = None
        self.server_name: str | None = None
        self.group = 0
        self.signature_scheme = 0
        self.resumed = False
        self.retried = False
        self.external_psk_identity: bytes | None = None
        self.peer_chain_der: tuple[bytes, ...] = ()
        self.peer_groups: tuple[int, ...] = ()
        self.ocsp_response: bytes | None = None
        self.record_size_max = 0

    @property
    def cipher_suite(self) -> int:
        """Code point of the cipher suite."""
        return self.suite.code

    def export(self, label: bytes, context: bytes, length: int) -> bytes:
        """Keying material for the application (RFC 8446 §7.5)."""
        return export_keying_material(self.suite.hash, self.exporter_secret, label, context, length)


class Expectation(NamedTuple):
    """A message that may come in a state."""

    handle: Callable[[Any, bytes], None]
    size_max: int
    ends_record: bool


Transitions = dict[int, dict[int, Expectation]]


class Handshake:
    """Base of ServerHandshake and ClientHandshake. Not thread-safe. Holds secrets until it is dropped."""

    TRANSITIONS: ClassVar[Transitions]
    STATE_COMPLETE: ClassVar[int]

    __slots__ = (
        "_error",
        "_established",
        "_fragments",
        "_now_s",
        "_out",
        "_random",
        "_reader",
        "_sign_request",
        "_transcript",
        "_warnings",
        "_writer",
        "state",
    )

    def __init__(self, *, random: Random, now_s: float, state: int) -> None:
        self._random = random
        self._now_s = now_s
        self._reader = RecordReader()
        self._writer = RecordWriter()
        self._out: list[bytes] = []
        self._fragments = bytearray()
        self._transcript: Any = None
        self._sign_request: SignRequest | None = None
        self._error: TlsError | None = None
        self._established: Established | None = None
        self._warnings = 0
        self.state = state

    # --- the driver's side

    def receive(self, data: bytes) -> None:
        """Takes bytes from the peer, in any split.

        Raises TlsError when the connection is over; the alert for the peer, if any, is then in ``data_to_send``. After
        completion, bytes are kept as ``established.leftover`` and not looked at.
        """
        if self._error is not None:
            raise self._error
        if self._established is not None:
            self._established.leftover += data
            return
        self._guard(self._receive, data)

    def data_to_send(self) -> bytes:
        """Takes the records made so far, in order. Nothing while a signature is awaited: a flight leaves as a whole."""
        out = self._out
        if not out or self._sign_request is not None:
            return b""
        data = out[0] if len(out) == 1 else b"".join(out)
        self._out = []
        return data

    @property
    def sign_request(self) -> SignRequest | None:
        """The signature that is waited for; nothing goes on until ``signature_ready`` or ``cancel``."""
        return self._sign_request

    def signature_ready(self, signature: bytes) -> None:
        """The answer to ``sign_request``. Raises TlsError like ``receive``."""
        if self._sign_request is None:
            raise ValueError("no signature was asked for")
        request, self._sign_request = self._sign_request, None
        self._guard(self._continue_with_signature, request, signature)

    def cancel(self, fault: TlsFault | None = None) -> None:
        """Ends the handshake from this side: the alert for ``fault`` (user_canceled if None), then nothing more."""
        if self._error is None:
            self._fail(fault or HandshakeCanceled("the handshake was given up"))

    @property
    def complete(self) -> bool:
        """Whether ``established`` is there."""
        return self._established is not None

    @property
    def established(self) -> Established:
        """The result. Raises ValueError before completion."""
        if self._established is None:
            raise ValueError("the handshake is not complete")
        return self._established

    # --- the subclass's side

    def _continue_with_signature(self, request: SignRequest, signature: bytes) -> None:
        raise NotImplementedError

    def _send_record(self, content_type: int, data: bytes) -> None:
        self._out.append(self._writer.write(content_type, data))

    def _start_transcript(self, suite: SuiteParameters, *messages: bytes) -> None:
        self._transcript = hashlib.new(suite.hash.name)
        for message in messages:
            self._transcript.update(message)

    def _log_secret(self, key_log: KeyLog | None, label: str, client_random: bytes, secret: bytes) -> None:
        if key_log is not None:
            key_log(f"{label} {client_random.hex()} {secret.hex()}")

    # --- inside

    def _guard(self, function: Callable[..., None], *arguments: object) -> None:
        try:
            function(*arguments)
        except TlsError as error:
            self._fail(error)
            raise
        except Exception as error:
            # Whatever a hostile peer may provoke in here ends as internal_error on its own connection, and is reported.
            fault = InternalError(f"unexpected {type(error).__name__} in the handshake engine")
            self._fail(fault)
            raise fault from error

    def _fail(self, error: TlsError) -> None:
        self._error = error
        self._sign_request = None
        self._transcript = None
        if isinstance(error, CloseNotifyReceived):  # our direction ends in order, too (RFC 8446 §6.1)
            self._send_record(ContentType.ALERT, CLOSE_NOTIFY)
        if not isinstance(error, TlsFault) or isinstance(error, PlainHttpReceived):
            return
        level = 1 if isinstance(error, HandshakeCanceled) else 2
        self._send_record(ContentType.ALERT, bytes((level, alert_for(error))))
        if level == 1:  # user_canceled is followed by close_notify (RFC 8446 §6.1)
            self._send_record(ContentType.ALERT, CLOSE_NOTIFY)

    def _receive(self, data: bytes) -> None:
        self._reader.feed(data)
        self._process()

    def _process(self) -> None:
        reader = self._reader
        while self._sign_request is None and self._established is None:
            record = reader.next_record()
            if record is None:
                return
            content_type, content = record
            if content_type == ContentType.HANDSHAKE:
                self._handle_fragment(content)
            elif content_type == ContentType.ALERT:
                self._handle_alert(content)
            else:
                raise UnexpectedRecord(f"a record of type {content_type} comes in the handshake")
        if self._established is not None:
            self._established.leftover = reader.leftover()

    def _handle_fragment(self, content: bytes) -> None:
        if self._fragments:
            self._fragments += content
            content = bytes(self._fragments) if self._is_whole(self._fragments) else b""
            if not content:
                return
            self._fragments = bytearray()
        position, end = 0, len(content)
        while end - position >= HANDSHAKE_HEADER_SIZE:
            message_type = content[position]
            size = content[position + 1] << 16 | content[position + 2] << 8 | content[position + 3]
            expectation = self._expect(message_type, size)
            message_end = position + HANDSHAKE_HEADER_SIZE + size
            if message_end > end:
                break
            if expectation.ends_record and message_end != end:
                raise ExcessHandshakeData(f"bytes follow {HANDSHAKE_NAMES[message_type]} in its record")
            expectation.handle(self, content[position:message_end])
            position = message_end
        if position != end:
            self._fragments += content[position:]

    def _is_whole(self, fragments: bytearray) -> bool:
        """Whether the first message is complete; its header is judged before the body is kept."""
        if len(fragments) < HANDSHAKE_HEADER_SIZE:
            return False
        size = fragments[1] << 16 | fragments[2] << 8 | fragments[3]
        self._expect(fragments[0], size)
        return len(fragments) >= HANDSHAKE_HEADER_SIZE + size

    def _expect(self, message_type: int, size: int) -> Expectation:
        expectation = self.TRANSITIONS[self.state].get(message_type)
        if expectation is None:
            name = HANDSHAKE_NAMES.get(message_type, f"type {message_type}")
            raise UnexpectedMessage(f"the handshake message {name} may not come now")
        if size > expectation.size_max:
            raise MessageTooLong(
                f"{HANDSHAKE_NAMES[message_type]} has {size} bytes, over the bound of {expectation.size_max}"
            )
        return expectation

    def _handle_alert(self, content: bytes) -> None:
        if len(content) != 2:
            raise MalformedMessage("an alert record holds something else than one alert")
        description = content[1]
        if description == AlertDescription.CLOSE_NOTIFY:
            raise CloseNotifyReceived
        if description == AlertDescription.USER_CANCELED:
            # A peer that gives up may do so anywhere; what goes on must not have anything between the fragments of a
            # message (RFC 8446 §5.1).
            if self._fragments:
                raise UnexpectedRecord("an alert comes between the fragments of a handshake message")
            self._warnings += 1
            if self._warnings > WARNINGS_MAX:
                raise TooManyRecords(f"too many {ALERT_NAMES[description]} alerts")
            return
        # The level means nothing in TLS 1.3: all others are fatal, unknown ones too (RFC 8446 §6).
        raise AlertReceived(description)
