"""A connection's bytes for an event loop: READs and WRITEs without a Python object per operation.

One READ is in flight while the transport reads; its block of the arena stays with the stream and is used again. WRITEs are copied into the
arena when they are made. As long as nobody waits for their end they are quiet: their completions are taken along with others and wake nobody.

The reader (one per lane and loop) takes all completions that are there in one batch, calls back, and wakes the daemon once at its end. Between
batches the ring is armed: the doorbell rings for the next completion that is not quiet.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy

from kdaemon_pyx.client_abi cimport CLIENT_CANCEL, CLIENT_READ, CLIENT_SUBMISSION_QUIET, CLIENT_WRITE, client_submission
from kdaemon_pyx.client_arena cimport arena_release
from kdaemon_pyx.client_ring cimport ClientRing, Pending

import asyncio
import select
from collections import deque

cdef extern from "errno.h" nogil:
    enum:
        EAGAIN
        ECANCELED
        ECONNRESET

cdef enum:
    NO_SLOT = 0xffffffff
    BATCHES = 8                    # per turn of the loop, while completions keep coming
    READ_SIZE_MIN = 2048           # what an idle connection keeps of the arena; a read that is filled doubles the next one
    READ_SIZE_MAX = 1048576
    PIECE = 262144                 # a large write leaves in pieces, so that it needs no large block of the arena
    HIGH_WATER = 262144

WRITE_PIECE_SIZE = PIECE
RETRY_S = 0.001                    # ring or arena were full


cdef class LaneReader:
    """Takes a lane's completions in an event loop, which watches the lane's doorbell, and its attach socket for the hang-up alone: exported
    sockets that nobody took yet may wait there."""

    def __init__(self, ClientRing ring not None, object loop):
        self.ring = ring
        self.loop = loop
        self.fd = ring.fileno()
        self.hang_up = select.epoll()
        self.hang_up.register(ring.attach_fileno(), select.EPOLLRDHUP)
        loop.add_reader(self.fd, self.rung)
        loop.add_reader(self.hang_up, self.hung_up)
        self.posted()

    def rung(self) -> None:
        if self.ring.disarm():
            self.batch()
        else:
            self.close()

    def hung_up(self) -> None:
        self.close()
        self.ring.lose()

    def turn(self) -> None:
        self.scheduled = False
        self.batch()

    def soon(self) -> None:
        self.posted()

    def close(self) -> None:
        if not self.loop.is_closed() and not self.hang_up.closed:
            self.loop.remove_reader(self.fd)
            self.loop.remove_reader(self.hang_up)
        self.hang_up.close()

    cdef int posted(self) except -1:
        if not self.scheduled and not self.ring.batching:
            self.scheduled = True
            self.loop.call_soon(self.turn)
        return 0

    cdef int batch(self) except -1:
        cdef int _
        for _ in range(BATCHES):
            self.ring.batching = True
            try:
                self.ring.reap()
            finally:
                self.ring.batching = False
                self.ring.ring_now()
            if self.ring.dead or self.ring.arm():
                return 0
        return self.posted()


@cython.final
@cython.no_gc_clear                # __dealloc__ gives the arena block back to its ring: a stream and its transport are a cycle
cdef class Stream(Pending):
    """READs and WRITEs of one connection, for its transport. Belongs to the thread of the event loop."""

    def __init__(self, ClientRing ring not None, LaneReader reader not None, uint64_t handle, object owner):
        self.ring = ring
        self.reader = reader
        self.handle = handle
        self.owner = owner
        self.reading = True
        self.read_slot = NO_SLOT
        self.read_size = READ_SIZE_MIN
        self.waiting = deque()
        self.set_write_buffer_limits()

    def __dealloc__(self):
        if self.ring is not None:
            self.release_block()

    def set_protocol(self, object protocol) -> None:
        self.protocol = protocol
        self.buffered = isinstance(protocol, asyncio.BufferedProtocol)
        self.received = None if self.buffered else protocol.data_received

    cdef void release_block(self) noexcept:
        if self.has_block and self.read_slot == NO_SLOT:
            self.has_block = False
            arena_release(&self.ring.arena_state, self.read_offset)

    # --- completions

    cdef int completed(self, ClientRing ring, uint32_t slot, int64_t result, uint32_t detail) except -1:
        if slot == self.read_slot:
            self.read_slot = NO_SLOT
            self.read_result = result
            self.read_detail = detail
            self.arrived = True
        else:
            arena_release(&ring.arena_state, ring.blocks[slot].offset)
            self.in_flight -= ring.blocks[slot].length
            if result < 0:
                self.write_error = result
                self.write_detail = detail
            elif not self.paused and not self.waiting_size:
                return 0
        if self.due:
            return 0
        self.due = True
        return 1

    cdef int run(self) except -1:
        cdef int64_t error = self.write_error
        self.due = False
        if self.lost:
            self.release_block()
            return 0
        if error:
            self.write_error = 0
            self.owner.failed(error, self.write_detail)
            return 0
        if self.waiting_size:
            self.flush()
        self.relieve()
        # A transport that pauses is told of an end when it resumes, as asyncio's own are; unless that is everybody's.
        if self.arrived and (self.reading or self.holding or (self.read_result < 0 and self.ring.dead)):
            self.deliver()
        return 0

    # --- reading

    def start(self) -> None:
        self.post_read()

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True
        if self.arrived:
            self.reader.loop.call_soon(self.deliver_held)
        else:
            self.post_read()

    def deliver_held(self) -> None:
        if self.arrived and self.reading:
            self.deliver()

    def is_reading(self) -> bool:
        return self.reading and not self.closing

    def retry_read(self) -> None:
        self.post_read()

    cdef int post_read(self) except -1:
        cdef client_submission* submission
        cdef ClientRing ring = self.ring
        cdef long offset
        if self.read_slot != NO_SLOT or self.arrived or not self.reading or self.closing or self.holding:
            return 0
        if ring.dead:
            self.owner.failed(-ECONNRESET, 0)
            return 0
        if not self.has_block:
            offset = ring.allocate(self.read_size)
            while offset < 0 and self.read_size > READ_SIZE_MIN:
                self.read_size //= 2
                offset = ring.allocate(self.read_size)
            if offset >= 0:
                self.read_offset = offset
                self.has_block = True
        if not self.has_block or not ring.free_count:
            self.reader.loop.call_later(RETRY_S, self.retry_read)
            return 0
        submission = ring.prepare(self, CLIENT_READ, self.handle)
        submission.offset = self.read_offset
        submission.length = self.read_size
        self.read_slot = submission.slot
        self.read_user_data = submission.user_data
        ring.publish()
        return self.reader.posted()

    cdef int deliver(self) except -1:
        cdef int64_t length = self.read_result
        if self.delivering:            # the protocol looks at the ring itself
            return 0
        if length <= 0 or self.closing:
            self.arrived = False
            self.release_block()
            if not self.closing and not (self.holding and length == -ECANCELED):
                self.owner.ended(length, self.read_detail)
            return 0
        self.delivering = True
        try:
            self.hand_out(<uint64_t> length)
        except Exception as error:
            self.owner.raised(error, "buffer_updated" if self.buffered else "data_received")
        finally:
            self.delivering = False
        if self.read_position < <uint64_t> length and not self.closing:
            return 0                   # paused midway: the rest comes when it resumes
        self.read_position = 0
        self.arrived = False
        if self.closing:
            self.release_block()
            return 0
        if length == self.read_size and self.read_size < READ_SIZE_MAX and 8 * length <= <int64_t> (self.ring.arena_size - self.ring.arena_state.used):
            self.release_block()
            self.read_size *= 2
        elif 4 * length < self.read_size and self.read_size > READ_SIZE_MIN:
            self.release_block()
            self.read_size //= 2
        return self.post_read()

    # Until the protocol pauses or ends it. Each piece is for who is the protocol then.
    cdef int hand_out(self, uint64_t length) except -1:
        cdef uint64_t size
        cdef Py_buffer view
        cdef char* data = <char*> self.ring.arena + self.read_offset
        while self.read_position < length and (self.reading or self.holding) and not self.closing:
            size = length - self.read_position
            if not self.buffered:
                piece = PyBytes_FromStringAndSize(data + self.read_position, size)
                self.read_position = length
                self.received(piece)
                continue
            PyObject_GetBuffer(self.protocol.get_buffer(size), &view, PyBUF_WRITABLE)
            size = min(<uint64_t> view.len, size)
            memcpy(view.buf, data + self.read_position, size)
            PyBuffer_Release(&view)
            if not size:
                raise RuntimeError("get_buffer() returned an empty buffer")
            self.read_position += size
            self.protocol.buffer_updated(size)
        return 0

    # --- writing

    def write(self, object data) -> None:
        cdef Py_buffer view
        cdef bint posted
        if self.writing_ended:
            raise RuntimeError("write_eof() was called")
        if self.closing:
            return                     # as asyncio's own transports
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            posted = view.len == 0
            if view.len <= PIECE and not posted and not self.waiting_size and not self.holding:
                posted = self.post_write(<const char*> view.buf, <uint32_t> view.len)
            if not posted:
                self.wait_with(PyBytes_FromStringAndSize(<const char*> view.buf, view.len))
        finally:
            PyBuffer_Release(&view)
        if self.in_flight + self.waiting_size > self.high:
            self.strain()

    # False: ring or arena are full just now.
    cdef bint post_write(self, const char* data, uint32_t length) except -1:
        cdef ClientRing ring = self.ring
        cdef client_submission* submission
        cdef long offset
        if ring.dead:
            self.owner.failed(-ECONNRESET, 0)
            return True
        offset = ring.allocate(length)
        if offset < 0 or not ring.free_count:
            if offset >= 0:
                arena_release(&ring.arena_state, offset)
            self.reader.loop.call_later(RETRY_S, self.flush)
            return False
        memcpy(ring.arena + offset, data, length)
        self.in_flight += length
        submission = ring.prepare(self, CLIENT_WRITE, self.handle)
        # Nobody waits for its end, and there is room enough without the place it takes.
        if (ring.has_quiet and self.in_flight <= self.high and not self.waiting_size and 2 * ring.free_count > ring.slot_count
                and 2 * ring.arena_state.used < ring.arena_size):
            submission.flags = CLIENT_SUBMISSION_QUIET
        submission.offset = offset
        submission.length = length
        ring.blocks[submission.slot].offset = offset
        ring.blocks[submission.slot].length = length
        ring.publish()
        self.reader.posted()
        return True

    cdef int wait_with(self, object data) except -1:
        view = memoryview(data)
        self.waiting_size += len(view)
        for begin in range(0, len(view), PIECE):
            self.waiting.append(view[begin:begin + PIECE])
        self.flush()
        return 0

    def flush(self) -> bool:
        cdef Py_buffer view
        cdef bint posted
        if self.holding:
            return False
        while self.waiting_size and not self.lost and self.in_flight < max(self.high, PIECE):
            PyObject_GetBuffer(self.waiting[0], &view, PyBUF_SIMPLE)
            try:
                posted = self.post_write(<const char*> view.buf, <uint32_t> view.len)
                if posted and not self.lost:
                    self.waiting_size -= view.len
            finally:
                PyBuffer_Release(&view)
            if not posted:
                return False
            if not self.lost:
                self.waiting.popleft()
        if self.waiting_size or self.lost:
            return False
        self.owner.flushed()
        self.relieve()
        return True

    cdef int strain(self) except -1:
        if not self.paused and not self.lost and self.in_flight + self.waiting_size > self.high:
            self.paused = True
            try:
                self.protocol.pause_writing()
            except Exception as error:
                self.owner.raised(error, "pause_writing")
        return 0

    cdef int relieve(self) except -1:
        if self.paused and not self.lost and self.in_flight + self.waiting_size <= self.low:
            self.paused = False
            try:
                self.protocol.resume_writing()
            except Exception as error:
                self.owner.raised(error, "resume_writing")
        return 0

    def write_buffer_size(self) -> int:
        return self.in_flight + self.waiting_size

    def write_buffer_limits(self) -> tuple:
        return self.low, self.high

    def set_write_buffer_limits(self, high=None, low=None) -> None:
        if high is None:
            high = HIGH_WATER if low is None else 4 * low
        if low is None:
            low = high // 4
        if not high >= low >= 0:
            raise ValueError(f"high ({high}) must be >= low ({low}) must be >= 0")
        self.high = high
        self.low = low
        self.strain()

    # --- what no operation may be in flight for (START_TLS)

    def hold(self) -> None:
        cdef client_submission* submission
        if self.read_slot != NO_SLOT and not self.ring.dead:
            if not self.ring.free_count:
                raise BlockingIOError(EAGAIN, "all operations of the ring are in flight: wait for one")
            submission = self.ring.prepare(Pending(), CLIENT_CANCEL, 0)
            submission.target_slot = self.read_slot
            submission.target_user_data = self.read_user_data
            self.ring.publish()
            self.reader.posted()
        self.holding = True
        if self.arrived:               # from before TLS, and must not come behind its start
            self.deliver()

    def resume(self) -> None:
        self.holding = False
        self.flush()
        self.post_read()

    # --- the end

    def end_writing(self) -> None:
        self.writing_ended = True

    def stop(self) -> None:
        self.closing = True

    def give_up(self) -> None:
        self.lost = self.closing = True
        self.waiting.clear()
        self.waiting_size = 0
        if self.arrived and not self.delivering:
            self.arrived = False
            self.release_block()
