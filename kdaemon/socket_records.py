"""Records on a client's own socket after the handshake: in the kernel (kTLS) or here, behind one interface.

For `kdaemon connect`, which has one connection and no engine. `receive` gives (content type, content) of whole
records in user mode and of what the kernel returns at once in kernel mode; data of type 23 may come in pieces of
any size.
"""

import errno
import select
import socket
import struct
from typing import Protocol

from cryptography.exceptions import InvalidTag

from kdaemon import ktls
from kdaemon.tls.constants import (
    CIPHERTEXT_SIZE_MAX,
    PLAINTEXT_SIZE_MAX,
    RECORD_HEADER_SIZE,
    RECORD_SIZE_LIMIT_MAX,
    ContentType,
)
from kdaemon.tls.errors import BadRecordMac, RecordOverflow, UnexpectedRecord
from kdaemon.tls.handshake import Established
from kdaemon.tls.post_handshake import NewKeys
from kdaemon.tls.record import RecordWriter

TLS_SET_RECORD_TYPE = 1  # include/uapi/linux/tls.h
TLS_GET_RECORD_TYPE = 2
CONTROL_DEADLINE_S = 10.0  # for a control record to find room in the socket


class SocketRecords(Protocol):
    """One connection's records. Methods raise BlockingIOError when the socket has nothing or no room; then poll it."""

    backend: str
    tx_secret: bytes
    rx_secret: bytes

    @property
    def tx_records(self) -> int:
        """Records sent under the present key, or more."""

    def send(self, content_type: int, data: bytes) -> int:
        """Sends or takes up a part of `data`; returns how many bytes. Call flush() until it returns True."""

    def flush(self) -> bool:
        """Sends what was taken up; False: there is more, wait for room."""

    def receive(self) -> tuple[int, bytes] | None:
        """The next record or piece of data; None at the end of the stream. Raises BlockingIOError, TlsFault."""

    def rekey_tx(self, keys: NewKeys) -> None:
        """Sends with these keys from here on (RFC 8446, section 7.2)."""

    def rekey_rx(self, keys: NewKeys) -> None:
        """Receives with these keys from here on. Raises OSError where the kernel cannot (before Linux 6.14)."""


class UserRecords:
    """Records protected by this process."""

    backend = "user"

    def __init__(self, sock: socket.socket, established: Established) -> None:
        self._socket = sock
        self._suite = established.suite
        tx, rx = established.tx, established.rx
        self.tx_secret, self.rx_secret = tx.secret, rx.secret
        self._writer = RecordWriter()
        self._writer.set_key(self._suite, tx.key, tx.iv)
        self._writer.sequence = tx.sequence
        self._writer.record_size_max = established.record_size_max
        self._out = b""
        self._aead = self._suite.aead(rx.key)
        self._iv = int.from_bytes(rx.iv, "big")
        self._sequence = rx.sequence
        self._in = bytearray(established.leftover)

    @property
    def tx_records(self) -> int:
        return self._writer.sequence

    def send(self, content_type: int, data: bytes) -> int:
        data = data[:PLAINTEXT_SIZE_MAX]
        self._out += self._writer.write(content_type, data)  # sealed exactly once, whatever the socket takes of it
        self.flush()
        return len(data)

    def flush(self) -> bool:
        try:
            while self._out:
                self._out = self._out[self._socket.send(self._out) :]
        except BlockingIOError:
            return False
        return True

    def receive(self) -> tuple[int, bytes] | None:
        while (record := self._next()) is None:
            data = self._socket.recv(65536)
            if not data:
                return None
            self._in += data
        return record

    def rekey_tx(self, keys: NewKeys) -> None:
        self._writer.set_key(self._suite, keys.key, keys.iv)
        self.tx_secret = keys.secret

    def rekey_rx(self, keys: NewKeys) -> None:
        self._aead, self._iv, self._sequence = self._suite.aead(keys.key), int.from_bytes(keys.iv, "big"), 0
        self.rx_secret = keys.secret

    def _next(self) -> tuple[int, bytes] | None:
        if len(self._in) < RECORD_HEADER_SIZE:
            return None
        header = bytes(self._in[:RECORD_HEADER_SIZE])
        size = int.from_bytes(header[3:], "big")
        if header[0] != ContentType.APPLICATION_DATA:
            raise UnexpectedRecord("a record is in the clear after the handshake")
        if size > CIPHERTEXT_SIZE_MAX:
            raise RecordOverflow(f"a protected record has {size} bytes")
        end = RECORD_HEADER_SIZE + size
        if len(self._in) < end:
            return None
        body = bytes(self._in[RECORD_HEADER_SIZE:end])
        del self._in[:end]
        nonce = (self._iv ^ self._sequence).to_bytes(12, "big")
        self._sequence += 1
        try:
            inner = self._aead.decrypt(nonce, body, header)
        except InvalidTag:
            raise BadRecordMac("a record does not decrypt") from None
        if len(inner) > RECORD_SIZE_LIMIT_MAX:
            raise RecordOverflow(f"a record has {len(inner)} bytes after decryption")
        inner = inner.rstrip(b"\0")
        if not inner:
            raise UnexpectedRecord("a record is all padding, without a type")
        return inner[-1], inner[:-1]


class KernelRecords:
    """Records protected by the kernel. The handshake must have left no byte unread: `established.leftover` is empty."""

    backend = "kernel"

    def __init__(self, sock: socket.socket, established: Established) -> None:
        """Attaches the ULP and installs the keys. Raises OSError; before the first key nothing has changed."""
        assert not established.leftover
        self._socket = sock
        self._content_max = established.record_size_max - 1
        self._cipher_suite = established.cipher_suite
        self.tx_records = 0
        tx, rx = established.tx, established.rx
        self.tx_secret, self.rx_secret = tx.secret, rx.secret
        tx_info = ktls.crypto_info(self._cipher_suite, tx.key, tx.iv, tx.sequence)
        rx_info = ktls.crypto_info(self._cipher_suite, rx.key, rx.iv, rx.sequence)
        sock.setsockopt(socket.IPPROTO_TCP, ktls.TCP_ULP, b"tls")
        sock.setsockopt(ktls.SOL_TLS, ktls.TLS_TX, tx_info)
        if established.record_size_max < RECORD_SIZE_LIMIT_MAX:
            sock.setsockopt(ktls.SOL_TLS, ktls.TLS_TX_MAX_PAYLOAD_LEN, struct.pack("=H", self._content_max))
        sock.setsockopt(ktls.SOL_TLS, ktls.TLS_RX, rx_info)

    def send(self, content_type: int, data: bytes) -> int:
        # The kernel may begin a record anywhere in what it takes: each send makes one more than it fills, at most.
        self.tx_records += len(data) // self._content_max + 2
        if content_type == ContentType.APPLICATION_DATA:
            return self._socket.send(data)
        ancillary = [(ktls.SOL_TLS, TLS_SET_RECORD_TYPE, bytes((content_type,)))]
        while True:
            try:
                return self._socket.sendmsg([data], ancillary)
            except BlockingIOError:
                if not select.select([], [self._socket], [], CONTROL_DEADLINE_S)[1]:
                    raise TimeoutError(errno.ETIMEDOUT, "the peer takes nothing any more") from None

    def flush(self) -> bool:
        return True

    def receive(self) -> tuple[int, bytes] | None:
        data, ancillary, flags, _ = self._socket.recvmsg(65536, socket.CMSG_SPACE(1))
        if flags & socket.MSG_CTRUNC:
            raise UnexpectedRecord("the kernel did not say the type of a record")
        content_type = int(ContentType.APPLICATION_DATA)
        for level, kind, value in ancillary:
            if level == ktls.SOL_TLS and kind == TLS_GET_RECORD_TYPE and len(value) == 1:
                content_type = value[0]
        if not data and not ancillary:
            return None
        return content_type, data

    def rekey_tx(self, keys: NewKeys) -> None:
        self._socket.setsockopt(ktls.SOL_TLS, ktls.TLS_TX, ktls.crypto_info(self._cipher_suite, keys.key, keys.iv, 0))
        self.tx_secret = keys.secret
        self.tx_records = 0

    def rekey_rx(self, keys: NewKeys) -> None:
        self._socket.setsockopt(ktls.SOL_TLS, ktls.TLS_RX, ktls.crypto_info(self._cipher_suite, keys.key, keys.iv, 0))
        self.rx_secret = keys.secret
