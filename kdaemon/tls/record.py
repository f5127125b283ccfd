"""Record protection while the handshake lasts (RFC 8446 §5): framing, fragmentation, the compatibility
change_cipher_spec.

The bulk of a connection is protected elsewhere (kernel or engine); this layer carries handshake records and the few
that are sealed ahead of the hand-over. A reader holds at most what one ``feed`` brought plus one incomplete record.
"""

from typing import Final

from cryptography.exceptions import InvalidTag

from kdaemon.tls.constants import (
    AEAD_TAG_SIZE,
    CIPHERTEXT_SIZE_MAX,
    PLAINTEXT_SIZE_MAX,
    RECORD_HEADER_SIZE,
    RECORD_SIZE_LIMIT_MAX,
    ContentType,
)
from kdaemon.tls.errors import (
    BadRecordMac,
    EmptyRecord,
    PlainHttpReceived,
    RecordOverflow,
    TooManyRecords,
    UnexpectedRecord,
)
from kdaemon.tls.key_schedule import Aead, SuiteParameters

BUFFER_SIZE_MAX: Final = 1 << 18  # bytes waiting unread, while a signature is awaited for instance
COMPATIBILITY_RECORDS_MAX: Final = 32  # change_cipher_spec records dropped in one handshake
EARLY_DATA_SKIPPED_MAX: Final = PLAINTEXT_SIZE_MAX  # plaintext bytes of refused 0-RTT; no ticket of ours invites any

CHANGE_CIPHER_SPEC_RECORD: Final = b"\x14\x03\x03\x00\x01\x01"

_HTTP_METHODS: Final = (b"GET ", b"HEAD ", b"POST ", b"PUT ", b"DELETE ", b"OPTIONS ", b"PATCH ", b"CONNECT ")


class EarlyDataSkipping:
    """What the server does with 0-RTT data it refused (RFC 8446 §4.2.10)."""

    NONE: Final = 0
    UNDECRYPTABLE: Final = 1  # after ServerHello: drop what does not decrypt, up to the first record that does
    APPLICATION_DATA: Final = 2  # after HelloRetryRequest: drop application data up to the second ClientHello


class RecordReader:
    """Takes bytes in any split, gives records one by one. Not thread-safe."""

    __slots__ = (
        "_aead",
        "_buffer",
        "_compatibility_records",
        "_first",
        "_iv",
        "_record_size_max",
        "_size_seen",
        "_skipped_size",
        "change_cipher_spec_allowed",
        "early_data_skipping",
        "plaintext_alerts_allowed",
        "sequence",
    )

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._aead: Aead | None = None
        self._iv = 0
        self._first = True
        self._compatibility_records = 0
        self._skipped_size = 0
        self.sequence = 0
        self.change_cipher_spec_allowed = False
        self.early_data_skipping = EarlyDataSkipping.NONE
        #: A peer that fails before it has keys can only complain in the clear.
        self.plaintext_alerts_allowed = False
        self._record_size_max = RECORD_SIZE_LIMIT_MAX
        self._size_seen = 0

    def feed(self, data: bytes) -> None:
        """Appends received bytes."""
        if len(self._buffer) + len(data) > BUFFER_SIZE_MAX:
            raise TooManyRecords("more was received than can be waiting in a handshake")
        self._buffer += data

    def set_key(self, suite: SuiteParameters, key: bytes, iv: bytes) -> None:
        """From the next record on, protection with this key; the sequence number starts again."""
        self._aead = suite.aead(key)
        self._iv = int.from_bytes(iv, "big")
        self.sequence = 0
        self._first = False

    def limit(self, record_size_max: int) -> None:
        """Bounds the content of protected records with type and padding (RFC 8449 §4), of those already opened, too."""
        self._record_size_max = record_size_max
        if self._size_seen > record_size_max:
            raise RecordOverflow(f"a record has {self._size_seen} bytes after decryption, over our record_size_limit")

    def leftover(self) -> bytes:
        """Takes what is behind the last record that was read."""
        rest = bytes(self._buffer)
        self._buffer = bytearray()
        return rest

    def next_record(self) -> tuple[int, bytes] | None:
        """(content type, content) of the next record that matters, or None if more bytes are needed."""
        buffer = self._buffer
        while len(buffer) >= RECORD_HEADER_SIZE:
            content_type = buffer[0]
            if self._first:
                self._check_first(content_type)
            if not ContentType.CHANGE_CIPHER_SPEC <= content_type <= ContentType.APPLICATION_DATA:
                raise UnexpectedRecord(f"a record has the unknown type {content_type}")
            size = buffer[3] << 8 | buffer[4]
            # legacy_record_version is ignored for all purposes (RFC 8446 §5.1).
            if size > (CIPHERTEXT_SIZE_MAX if content_type == ContentType.APPLICATION_DATA else PLAINTEXT_SIZE_MAX):
                raise RecordOverflow(f"a record has {size} bytes")
            end = RECORD_HEADER_SIZE + size
            if len(buffer) < end:
                return None
            header = bytes(buffer[:RECORD_HEADER_SIZE])
            body = bytes(buffer[RECORD_HEADER_SIZE:end])
            del buffer[:end]
            self._first = False
            if content_type == ContentType.CHANGE_CIPHER_SPEC:
                self._drop_change_cipher_spec(body)
            elif content_type == ContentType.APPLICATION_DATA:
                record = self._open(header, body)
                if record is not None:
                    return record
            elif self._aead is None or (content_type == ContentType.ALERT and self.plaintext_alerts_allowed):
                if not body:
                    raise EmptyRecord("a handshake or alert record is empty")
                if content_type == ContentType.HANDSHAKE:
                    self.early_data_skipping = EarlyDataSkipping.NONE
                return content_type, body
            else:
                raise UnexpectedRecord("a record is in the clear although keys are in use")
        if self._first and buffer:
            self._check_first(buffer[0])
        return None

    def _check_first(self, content_type: int) -> None:
        if content_type in (ContentType.HANDSHAKE, ContentType.ALERT):
            return
        if content_type == ContentType.CHANGE_CIPHER_SPEC and self.change_cipher_spec_allowed:
            return  # a server may send it before its ServerHello
        start = bytes(self._buffer[:8])
        if any(method.startswith(start[: len(method)]) for method in _HTTP_METHODS):
            if len(start) >= RECORD_HEADER_SIZE:
                raise PlainHttpReceived("an HTTP request in the clear came to a TLS port")
            return
        raise UnexpectedRecord(f"the first record has type {content_type}, which is not a handshake")

    def _drop_change_cipher_spec(self, body: bytes) -> None:
        # RFC 8446 §5: one byte 0x01, between the first ClientHello and the peer's Finished, means nothing; all others
        # are errors.
        if body != b"\x01" or not self.change_cipher_spec_allowed:
            raise UnexpectedRecord("a change_cipher_spec record is malformed or comes out of place")
        self._compatibility_records += 1
        if self._compatibility_records > COMPATIBILITY_RECORDS_MAX:
            raise TooManyRecords("too many change_cipher_spec records")

    def _open(self, header: bytes, body: bytes) -> tuple[int, bytes] | None:
        aead = self._aead
        if aead is None:
            if self.early_data_skipping == EarlyDataSkipping.APPLICATION_DATA:
                self._skip(body)
                return None
            raise UnexpectedRecord("application data comes before keys are agreed")
        nonce = (self._iv ^ self.sequence).to_bytes(12, "big")
        try:
            inner = aead.decrypt(nonce, body, header)
        except InvalidTag:
            if self.early_data_skipping == EarlyDataSkipping.UNDECRYPTABLE:
                self._skip(body)
                return None
            raise BadRecordMac("a record does not decrypt") from None
        self.early_data_skipping = EarlyDataSkipping.NONE
        self.sequence += 1
        self.plaintext_alerts_allowed = False
        size = len(inner)
        if size > self._record_size_max:
            raise RecordOverflow(f"a record has {size} bytes after decryption")
        self._size_seen = max(self._size_seen, size)
        if inner and inner[-1]:  # no padding, the usual case
            content_type, content = inner[-1], inner[:-1]
        else:
            inner = inner.rstrip(b"\x00")
            if not inner:
                raise UnexpectedRecord("a record is all padding, without a type")  # RFC 8446 §5.4
            content_type, content = inner[-1], inner[:-1]
        if content_type in (ContentType.HANDSHAKE, ContentType.ALERT):
            if not content:
                raise EmptyRecord("a handshake or alert record is empty")
            return content_type, content
        raise UnexpectedRecord(f"a protected record of type {content_type} comes in the handshake")

    def _skip(self, body: bytes) -> None:
        self._skipped_size += max(len(body) - AEAD_TAG_SIZE - 1, 1)
        if self._skipped_size > EARLY_DATA_SKIPPED_MAX:
            if self._aead is not None:
                raise BadRecordMac("more early data than may be skipped")
            raise TooManyRecords("more early data than may be skipped")


class RecordWriter:
    """Makes records. Not thread-safe."""

    __slots__ = ("_aead", "_iv", "record_size_max", "sequence")

    def __init__(self) -> None:
        self._aead: Aead | None = None
        self._iv = 0
        self.sequence = 0
        #: Content of a protected record, its type included: the peer's record_size_limit (RFC 8449 §4).
        self.record_size_max = RECORD_SIZE_LIMIT_MAX

    def set_key(self, suite: SuiteParameters, key: bytes, iv: bytes) -> None:
        """From the next record on, protection with this key; the sequence number starts again."""
        self._aead = suite.aead(key)
        self._iv = int.from_bytes(iv, "big")
        self.sequence = 0

    def write(self, content_type: int, data: bytes, legacy_version: bytes = b"\x03\x03") -> bytes:
        """``data`` as one or more records; ``legacy_version`` matters for a first ClientHello in the clear only."""
        if self._aead is None:
            if len(data) <= PLAINTEXT_SIZE_MAX:
                return b"%c%b%b%b" % (content_type, legacy_version, len(data).to_bytes(2, "big"), data)
            step = PLAINTEXT_SIZE_MAX
            return b"".join(
                self.write(content_type, data[start : start + step], legacy_version)
                for start in range(0, len(data), step)
            )
        step = self.record_size_max - 1
        if len(data) <= step:
            return self._seal(self._aead, content_type, data)
        aead = self._aead
        return b"".join(
            self._seal(aead, content_type, data[start : start + step]) for start in range(0, len(data), step)
        )

    def _seal(self, aead: Aead, content_type: int, data: bytes) -> bytes:
        header = b"\x17\x03\x03" + (len(data) + 1 + AEAD_TAG_SIZE).to_bytes(2, "big")
        nonce = (self._iv ^ self.sequence).to_bytes(12, "big")
        self.sequence += 1
        return header + aead.encrypt(nonce, data + content_type.to_bytes(1, "big"), header)
