"""HTTP sessions over memory: the same session code the engine runs, without a socket, for tests and fuzzers.

A Loopback stands for one connection. It is deterministic: nothing is sent before ``run``, and its clock stands still until ``advance``.
"""

import os

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from kdaemon_pyx.core cimport CloseReason, Connection, Deadlines, File
from kdaemon_pyx.files cimport file_table_sweep
from kdaemon_pyx.http_context cimport FileContext
from kdaemon_pyx.http_log cimport PeerAddress
from kdaemon_pyx.http_session cimport (
    HttpSession, session_free, session_on_data, session_on_deadline, session_on_drain, session_on_end_of_data,
    session_on_sent, session_open,
)

cdef struct Wire:
    uint8_t* output
    uint32_t capacity
    uint32_t length
    File* file
    uint64_t file_offset
    uint64_t file_length
    uint64_t now_ns
    uint64_t deadline_ns
    Deadlines deadlines
    int finished                   # CloseReason + 1; 0: open
    bint closed
    bint sent_due
    uint32_t requests


cdef uint8_t* wire_reserve(Connection* c, uint32_t length) noexcept nogil:
    cdef Wire* wire = <Wire*>c
    if wire.file != NULL or wire.capacity - wire.length < length:
        return NULL
    return wire.output + wire.length


cdef void wire_commit(Connection* c, uint32_t length) noexcept nogil:
    cdef Wire* wire = <Wire*>c
    wire.length += length
    wire.sent_due = True


cdef uint32_t wire_room(Connection* c) noexcept nogil:
    cdef Wire* wire = <Wire*>c
    return 0 if wire.file != NULL else wire.capacity - wire.length


cdef int wire_send_file(Connection* c, File* file, uint64_t offset, uint64_t length) noexcept nogil:
    cdef Wire* wire = <Wire*>c
    wire.file = file
    file.references += 1
    wire.file_offset = offset
    wire.file_length = length
    wire.sent_due = True
    return 0


cdef uint64_t wire_file_position(Connection* c) noexcept nogil:
    return (<Wire*>c).file_offset


cdef void wire_finish(Connection* c, CloseReason reason) noexcept nogil:
    (<Wire*>c).finished = <int>reason + 1


cdef void wire_close(Connection* c, CloseReason reason) noexcept nogil:
    (<Wire*>c).finished = <int>reason + 1
    (<Wire*>c).closed = True


cdef void wire_set_deadline(Connection* c, uint64_t deadline_ns) noexcept nogil:
    (<Wire*>c).deadline_ns = deadline_ns


cdef uint64_t wire_now_ns(Connection* c) noexcept nogil:
    return (<Wire*>c).now_ns


cdef const Deadlines* wire_deadlines(Connection* c) noexcept nogil:
    return &(<Wire*>c).deadlines


cdef void wire_count_request(Connection* c) noexcept nogil:
    (<Wire*>c).requests += 1


cdef void wire_peer(Connection* c, PeerAddress* peer) noexcept nogil:
    peer.length = 4
    memcpy(peer.bytes, b"\xc0\x00\x02\x01", 4)           # 192.0.2.1, for documentation (RFC 5737)


cdef class Loopback:
    """One connection in memory.

    context: an ``http_context.FileContext`` of its own: it must not serve an engine too. output_bytes_max: room of the output buffer.
    kernel_layer: behave as over kTLS (files are mapped).
    """

    cdef FileContext _context
    cdef Wire _wire
    cdef HttpSession* _session
    cdef bytes _pending
    cdef bytearray _output

    def __cinit__(self, FileContext context, site=0, output_bytes_max=131072, bint kernel_layer=False):
        self._context = context
        memset(&self._wire, 0, sizeof(self._wire))
        self._wire.capacity = output_bytes_max
        self._wire.output = <uint8_t*>malloc(output_bytes_max)
        if self._wire.output == NULL:
            raise MemoryError
        self._wire.now_ns = 1_000_000_000_000
        self._wire.deadlines.header_ns = 60_000_000_000
        self._wire.deadlines.body_ns = 60_000_000_000
        self._wire.deadlines.idle_ns = 75_000_000_000
        context.context.transport.reserve = wire_reserve
        context.context.transport.commit = wire_commit
        context.context.transport.room = wire_room
        context.context.transport.send_file = wire_send_file
        context.context.transport.file_position = wire_file_position
        context.context.transport.finish = wire_finish
        context.context.transport.close = wire_close
        context.context.transport.set_deadline = wire_set_deadline
        context.context.transport.now_ns = wire_now_ns
        context.context.transport.deadlines = wire_deadlines
        context.context.transport.count_request = wire_count_request
        context.context.transport.peer = wire_peer
        self._pending = b""
        self._output = bytearray()
        self._session = session_open(&context.context, <Connection*>&self._wire, site, kernel_layer)
        if self._session == NULL:
            raise ValueError(f"no site {site}")

    def __dealloc__(self):
        if self._wire.file != NULL:
            self._release_file()
        if self._session != NULL:
            session_free(self._session)
        free(self._wire.output)

    cdef void _release_file(self) noexcept:
        cdef File* file = self._wire.file
        self._wire.file = NULL
        file.references -= 1
        if file.references == 0:
            file.release(file)

    cdef int _offer(self) except -1:
        cdef int64_t consumed
        if not self._pending or self._wire.finished:
            return 0
        consumed = session_on_data(self._session, self._pending, len(self._pending))
        assert 0 <= consumed <= len(self._pending)
        self._pending = self._pending[consumed:]
        return 0

    def feed(self, bytes data):
        """Plaintext arrives: it is offered to the session together with what was left before."""
        self._pending += data
        self._offer()

    def flush(self):
        """Sends what is queued, tells the session, offers it what is pending: False when nothing was queued."""
        if not self._wire.sent_due:
            return False
        self._wire.sent_due = False
        self._output += (<char*>self._wire.output)[:self._wire.length]
        self._wire.length = 0
        if self._wire.file != NULL:
            end = self._wire.file_offset + self._wire.file_length
            while self._wire.file_offset < end:
                piece = os.pread(self._wire.file.fd, min(1 << 20, end - self._wire.file_offset), self._wire.file_offset)
                assert piece, "the file is shorter than its response"
                self._output += piece
                self._wire.file_offset += len(piece)
            self._release_file()
        if not self._wire.closed:
            session_on_sent(self._session)
            self._offer()
        return True

    def run(self):
        """Flushes until nothing is queued; gives and forgets what was sent since the last time, as bytes."""
        while self.flush():
            pass
        sent = bytes(self._output)
        self._output.clear()
        return sent

    def exchange(self, bytes data):
        """``feed`` and ``run``."""
        self.feed(data)
        return self.run()

    def end_of_data(self):
        """close_notify arrives."""
        session_on_end_of_data(self._session)

    def drain(self):
        session_on_drain(self._session)

    def advance(self, uint64_t milliseconds):
        """Moves the clock; fires the deadline if it passes, and what the engine does from time to time."""
        self._wire.now_ns += milliseconds * 1_000_000
        file_table_sweep(&self._session.context.table, self._wire.now_ns)
        if self._wire.deadline_ns != 0 and self._wire.now_ns >= self._wire.deadline_ns:
            self._wire.deadline_ns = 0
            session_on_deadline(self._session)

    @property
    def finished(self):
        """The CloseReason (a number) the session finished with, or None."""
        return self._wire.finished - 1 if self._wire.finished else None

    @property
    def unread(self):
        """Bytes the session has left unconsumed."""
        return len(self._pending)

    @property
    def deadline_ms(self):
        """Milliseconds until the session's deadline, or None."""
        if self._wire.deadline_ns == 0:
            return None
        return (self._wire.deadline_ns - self._wire.now_ns) // 1_000_000

    @property
    def requests(self):
        return self._wire.requests
