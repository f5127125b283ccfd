"""The worker's side of keymgr: signing requests, pipelined in batches, that outlive the keymgr they went to."""

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from kdaemon.key_protocol import (
    BATCH_MAX,
    MESSAGE_SIZE_MAX,
    REPLY,
    REQUEST,
    SIGN,
    SIGNATURES,
    TICKET_KEYS,
    TicketKey,
    parse_ticket_keys,
)


@dataclass(slots=True)
class _Pending:
    connection: int
    packed: bytes
    deadline: float
    channel: "KeyChannel | None"  # where it was sent; None: to be sent


class KeyChannel:
    """A connection to one keymgr. Owns the socket; `wants_write` tells whether the event loop should wait for room."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.retiring = False
        self.wants_write = False

    def fileno(self) -> int:
        return self.socket.fileno()


class KeyClient:
    """All signing requests of a worker. Used by the control thread only.

    `on_signature(connection, signature)` is called with b"" when keymgr refused or the signing deadline passed;
    `on_ticket_keys(keys)` with the newest key first. A request whose keymgr died is sent again to the next one.
    """

    def __init__(
        self,
        on_signature: Callable[[int, bytes], None],
        on_ticket_keys: Callable[[list[TicketKey]], None],
        deadline_s: float,
    ) -> None:
        self._on_signature = on_signature
        self._on_ticket_keys = on_ticket_keys
        self._deadline_s = deadline_s
        self._pending: dict[int, _Pending] = {}  # by request id, oldest first
        self._unsent: list[int] = []
        self._current: KeyChannel | None = None
        # One for all messages: a block of that size for each, given back in part, leaves the heap in pieces
        self._received = memoryview(bytearray(MESSAGE_SIZE_MAX))
        self._next_id = 1

    def attach(self, sock: socket.socket) -> KeyChannel:
        """Requests go through `sock` from now on; the channel before is kept for the answers that it owes."""
        if self._current is not None:
            self._current.retiring = True
        self._current = KeyChannel(sock)
        return self._current

    def request(self, connection: int, key_id: bytes, scheme: int, role: int, transcript_hash: bytes) -> None:
        """Queues one request; flush() sends the batch. `key_id`: 32 bytes, `transcript_hash`: at most 64."""
        request_id = self._next_id
        self._next_id += 1
        packed = REQUEST.pack(request_id, scheme, role, len(transcript_hash), key_id, transcript_hash)
        self._pending[request_id] = _Pending(connection, packed, time.monotonic() + self._deadline_s, None)
        self._unsent.append(request_id)

    def flush(self) -> None:
        """Sends what is queued, as far as the socket takes it."""
        channel = self._current
        if channel is None:
            return
        while self._unsent:
            batch = self._unsent[:BATCH_MAX]
            entries = [self._pending[request_id] for request_id in batch if request_id in self._pending]
            if entries:
                try:
                    channel.socket.send(
                        bytes((SIGN,)) + b"".join([entry.packed for entry in entries]), socket.MSG_NOSIGNAL
                    )
                except BlockingIOError:
                    channel.wants_write = True
                    return
                except OSError:
                    return  # it is dying: the event loop will see the end of file and call lost()
                for entry in entries:
                    entry.channel = channel
            del self._unsent[:BATCH_MAX]
        channel.wants_write = False

    def readable(self, channel: KeyChannel) -> bool:
        """Takes the messages that are there. False when the channel has ended: close it with lost()."""
        while True:
            try:
                message = self._received[: channel.socket.recv_into(self._received)]
            except BlockingIOError:
                return not self._is_spent(channel)
            except OSError:
                return False
            if not message:
                return False
            if message[0] == SIGNATURES:
                self._signatures(message)
            elif message[0] == TICKET_KEYS and not channel.retiring:
                self._on_ticket_keys(parse_ticket_keys(message[1:]))

    def lost(self, channel: KeyChannel) -> None:
        """The channel is gone: closes it and queues again what it did not answer."""
        channel.socket.close()
        if channel is self._current:
            self._current = None
        again = [request_id for request_id, entry in self._pending.items() if entry.channel is channel]
        for request_id in again:
            self._pending[request_id].channel = None
        self._unsent = again + self._unsent

    def expire(self, now: float) -> float | None:
        """Fails what has waited beyond its deadline; returns the time of the next deadline, if any."""
        while self._pending:
            request_id, entry = next(iter(self._pending.items()))
            if entry.deadline > now:
                return entry.deadline
            del self._pending[request_id]
            self._on_signature(entry.connection, b"")
        return None

    def _is_spent(self, channel: KeyChannel) -> bool:
        return channel.retiring and not any(entry.channel is channel for entry in self._pending.values())

    def _signatures(self, message: memoryview) -> None:
        offset = 1
        while offset < len(message):
            request_id, length = REPLY.unpack_from(message, offset)
            offset += REPLY.size
            signature = bytes(message[offset : offset + length])
            offset += length
            entry = self._pending.pop(request_id, None)
            if entry is not None:
                self._on_signature(entry.connection, signature)
