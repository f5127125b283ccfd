"""The program's side of a client ring: post, reap, wait, and the data arena. libtls imports this and nothing else of the engine.

Lifetime: a ``ClientRing`` owns its mapping and three fds (memory, doorbell, attach socket). An ``Operation`` is kept alive by its ring until
its completion is reaped, and keeps its arena block until it is destroyed. Thread-safety: every method may be called from any thread;
with the GIL each call is atomic, without it each takes the ring's critical section. Waits release both. One waiting
thread at a time sleeps on the doorbell (the leader) and wakes the others. A ring does not survive fork in the child.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EAGAIN, ECONNRESET, ENOBUFS, EPROTO, EPROTONOSUPPORT, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
from posix.mman cimport munmap
from posix.unistd cimport close, getpid

from kdaemon_pyx.client_abi cimport (
    CLIENT_CANCEL, CLIENT_MAGIC, CLIENT_VERSION_MAJOR, CLIENT_WRITE, client_completion, client_header, client_must_ring,
    client_observe, client_parameters, client_publish, client_say_asleep, client_say_awake, client_submission, fill_parameters,
)
from kdaemon_pyx.client_arena cimport arena_allocate, arena_destroy, arena_initialize, arena_release
from kdaemon_pyx.client_wait cimport (
    client_empty_doorbell, client_hang_up, client_is_punched, client_map, client_map_zeros, client_ring_doorbell, client_sleep, monotonic_ns,
)

import os
import threading

from kdaemon_pyx.client_abi import OPCODE_NAMES

cdef enum:
    COMPLETE = 1                       # 0: in flight


cdef class Pending:
    """What a slot's completion goes to. ``completed`` notes it, while the ring is reaped; ``run`` may call back, afterwards."""

    cdef int completed(self, ClientRing ring, uint32_t slot, int64_t result, uint32_t detail) except -1:
        return 0                       # 1: run() is due

    cdef int run(self) except -1:
        return 0


@cython.no_gc_clear      # __dealloc__ gives the arena block back to its ring, which must be there even at the end of a cycle
cdef class Operation(Pending):
    """One posted operation. Buffer protocol: the bytes that a completed READ or INFO got, in the arena, without a copy."""

    def __init__(self):
        raise TypeError("operations are made by posting them")

    def __dealloc__(self):
        if self.has_block:
            arena_release(&self.ring.arena_state, self.offset)

    cdef int completed(self, ClientRing ring, uint32_t slot, int64_t result, uint32_t detail) except -1:
        self.raw_result = result
        self.detail = detail
        self.state = COMPLETE
        if self.opcode == CLIENT_WRITE and self.has_block and not self.exports:
            self.has_block = False
            arena_release(&ring.arena_state, self.offset)
        if ring.followers:
            ring._release_followers(self)
        return self.callback is not None

    cdef int run(self) except -1:
        callback, self.callback = self.callback, None
        callback(self)
        return 0

    @property
    def done(self) -> bool:
        """Whether the completion was reaped."""
        return self.state == COMPLETE

    @property
    def result(self) -> int:
        """Bytes, a handle, 0, or a negative errno. Only when done."""
        if self.state != COMPLETE:
            raise ValueError("the operation is in flight")
        return self.raw_result

    def bytes(self) -> bytes:
        """A copy of what READ or INFO got; empty at the end of the data."""
        if self.state != COMPLETE:
            raise ValueError("the operation is in flight")
        if not self.has_block or self.raw_result <= 0:
            return b""
        self.ring._check_process()
        return (<char*> (self.ring.arena + self.offset))[:self.raw_result]

    def release(self) -> None:
        """Give the arena block back early. ValueError while in flight, BufferError while a view of it exists."""
        if self.state != COMPLETE:
            raise ValueError("the operation is in flight")
        if self.exports:
            raise BufferError("a memoryview of the operation's data exists")
        if self.has_block:
            self.has_block = False
            arena_release(&self.ring.arena_state, self.offset)

    def __getbuffer__(self, Py_buffer* buffer, int flags):
        if self.state != COMPLETE or not self.has_block:
            raise BufferError("the operation has no data")
        self.ring._check_process()
        PyBuffer_FillInfo(buffer, self, self.ring.arena + self.offset, self.raw_result if self.raw_result > 0 else 0, 1, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer* buffer):
        self.exports -= 1

    def __repr__(self) -> str:
        state = f"result={self.raw_result}" if self.state == COMPLETE else "in flight"
        return f"<Operation {OPCODE_NAMES[self.opcode]} {state}>"


cdef class ClientRing:
    """One lane to one worker of the daemon. See the module's docstring for lifetime and threads."""

    def __cinit__(self, int memory_fd, int doorbell_fd, int attach_fd):
        cdef client_header header
        cdef uint64_t size = os.fstat(memory_fd).st_size
        self.memory_fd = self.doorbell_fd = self.attach_fd = -1
        self.memory = client_map(memory_fd, size)
        if self.memory == NULL:
            raise OSError(errno, os.strerror(errno))
        self.memory_size = size
        self.header = <client_header*> self.memory
        header = self.header[0]
        if header.magic != CLIENT_MAGIC or header.version_major != CLIENT_VERSION_MAJOR:
            raise OSError(EPROTONOSUPPORT, "the daemon's client ring has another version")
        if header.arena_offset + header.arena_size > size:
            raise OSError(EPROTO, "the daemon's client ring does not fit its memory")
        self.submissions = <client_submission*> (self.memory + header.submission_offset)
        self.completions = <client_completion*> (self.memory + header.completion_offset)
        self.slots = <client_parameters*> (self.memory + header.slot_offset)
        self.arena = self.memory + header.arena_offset
        self.submission_mask = header.submission_entries - 1
        self.completion_mask = header.completion_entries - 1
        self.slot_count = header.slot_count
        self.arena_size = header.arena_size
        self.free_slots = <uint32_t*> malloc(self.slot_count * sizeof(uint32_t))
        self.blocks = <Block*> malloc(self.slot_count * sizeof(Block))
        self.has_quiet = header.version_minor >= 1
        if self.free_slots == NULL or self.blocks == NULL or arena_initialize(&self.arena_state, header.arena_size) < 0:
            raise MemoryError
        for slot in range(self.slot_count):
            self.free_slots[self.slot_count - 1 - slot] = slot
        self.free_count = self.slot_count
        self.pending = [None] * self.slot_count
        self.followers = []
        self.called_back = []
        self.pid = getpid()
        self.spin_ns = 20000 if len(os.sched_getaffinity(0)) > 1 else 0
        self.memory_fd, self.doorbell_fd, self.attach_fd = memory_fd, doorbell_fd, attach_fd

    def __dealloc__(self):
        if self.memory != NULL and self.pid == getpid():
            munmap(self.memory, self.memory_size)
        free(self.free_slots)
        free(self.blocks)
        arena_destroy(&self.arena_state)
        self._close_fds()

    cdef void _close_fds(self) noexcept:
        if self.memory_fd >= 0:
            close(self.memory_fd)
            close(self.doorbell_fd)
            close(self.attach_fd)
            self.memory_fd = self.doorbell_fd = self.attach_fd = -1

    def abandon(self) -> None:
        """In a forked child: close the fds that the parent's ring left here, so that the parent's end is the last one."""
        self.dead = True
        self.has_leader = False      # that thread stayed with the parent
        self.followers = []
        client_map_zeros(self.memory, self.memory_size)
        self._close_fds()

    def close(self) -> None:
        """Detach: what is in flight ends with ECONNRESET, every later call raises."""
        self._die()
        if self.memory_fd >= 0 and self.pid == getpid():
            # A thread that sleeps on these would keep them open and go on sleeping: closing alone is not enough.
            client_hang_up(self.doorbell_fd)
            client_hang_up(self.attach_fd)
        self.closed = True
        if not self.has_leader:
            self._close_fds()
        self._run_callbacks()

    def fileno(self) -> int:
        """The doorbell: readable when completions may be there, provided ``arm`` was called."""
        return self.doorbell_fd

    def attach_fileno(self) -> int:
        return self.attach_fd

    @property
    def is_dead(self) -> bool:
        return self.dead

    @property
    def in_flight(self) -> int:
        return self.slot_count - self.free_count

    @property
    def arena_used(self) -> int:
        return self.arena_state.used

    def post(self, unsigned char opcode, uint64_t handle=0, uint32_t length=0, object data=None, uint64_t timeout_ns=0,
             dict parameters=None, Operation target=None, unsigned short argument=0, object context=None) -> Operation:
        """Post an operation. length: arena bytes to reserve (READ, INFO); data: bytes-like to copy into the arena (WRITE, START_TLS).

        Raises BlockingIOError: all slots are in flight; MemoryError: the arena is full; ConnectionResetError: the daemon is gone.
        """
        cdef Operation operation = Operation.__new__(Operation)
        cdef Py_buffer view
        cdef bint has_view = False
        cdef long offset = -1
        if data is not None:
            PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
            has_view = True
            if view.len > 0xffffffff:
                PyBuffer_Release(&view)
                raise ValueError("one operation moves less than 4 GiB")
            length = <uint32_t> view.len
        try:
            with cython.critical_section(self):
                self._check()
                if self.free_count == 0:
                    self._reap()
                    if self.free_count == 0:
                        raise BlockingIOError(EAGAIN, f"all {self.slot_count} operations of the ring are in flight: wait for one")
                operation.ring = self
                if length:
                    offset = self.allocate(length)
                    if offset < 0:
                        raise OSError(ENOBUFS, f"no room for {length} bytes in the ring's arena of {self.arena_size}: "
                                               "release operations whose data was used")
                    if has_view:
                        memcpy(self.arena + offset, view.buf, length)
                    operation.has_block = True
                    operation.offset = offset
                    operation.length = length
                operation.opcode = opcode
                operation.handle = handle
                operation.context = context
                self._submit(operation, timeout_ns, parameters, target, argument)
        finally:
            if has_view:
                PyBuffer_Release(&view)
        return operation

    cdef int _submit(self, Operation operation, uint64_t timeout_ns, dict parameters, Operation target, uint16_t argument) except -1:
        cdef client_submission* submission
        # Before the slot is taken: what it raises must leave nothing behind.
        if parameters is not None:
            fill_parameters(&self.slots[self.free_slots[self.free_count - 1]], parameters)
        submission = self.prepare(operation, operation.opcode, operation.handle)
        operation.slot = submission.slot
        operation.user_data = submission.user_data
        submission.argument = argument
        submission.timeout_ns = timeout_ns
        submission.offset = operation.offset
        submission.length = operation.length
        if target is not None:
            submission.target_slot = target.slot
            submission.target_user_data = target.user_data
        self.publish()
        if not self.batching:
            self.ring_now()
        return 0

    # Takes a free slot, of which there must be one, and the next entry, zero but for what it is given. publish() has to follow.
    cdef client_submission* prepare(self, Pending owner, uint8_t opcode, uint64_t handle) except NULL:
        # There is room: entries in the ring are at most the slots in flight, and the daemon makes no fewer entries than slots.
        cdef client_submission* submission = &self.submissions[self.submission_tail & self.submission_mask]
        self.free_count -= 1
        self.user_data += 1
        memset(submission, 0, sizeof(client_submission))
        submission.opcode = opcode
        submission.handle = handle
        submission.slot = self.free_slots[self.free_count]
        submission.user_data = self.user_data
        self.pending[submission.slot] = owner
        return submission

    cdef void publish(self) noexcept:
        self.submission_tail += 1
        client_publish(&self.header.submission_tail, self.submission_tail)
        self.ring_due = True

    # Wakes the daemon if it sleeps and something was published since the last time.
    cdef void ring_now(self) noexcept:
        if self.ring_due and not self.dead:
            self.ring_due = False
            if client_must_ring(&self.header.daemon_state):
                client_ring_doorbell(self.doorbell_fd)
                self.doorbells += 1

    # A block of the arena, or -1. Looks for completions that give some back before it says no.
    cdef long allocate(self, uint32_t length) except? -2:
        cdef long offset = arena_allocate(&self.arena_state, length)
        if offset < 0 and self._reap():
            offset = arena_allocate(&self.arena_state, length)
        return offset

    def cancel(self, Operation target) -> Operation:
        """Posts CANCEL: result 0 (it ends with ECANCELED or its real result), or -ENOENT, -EALREADY."""
        return self.post(CLIENT_CANCEL, target=target)

    cdef int _check_process(self) except -1:
        if self.dead and self.pid != getpid():
            raise RuntimeError("this ring belongs to the parent process: call tls_init() in the child")
        return 0

    cdef int _check(self) except -1:
        if self.dead:
            self._check_process()
            raise ConnectionResetError(ECONNRESET, "kdaemon is gone: call tls_destroy() and tls_init() again")
        return 0

    cdef int _reap(self) except -1:
        cdef uint32_t tail = client_observe(&self.header.completion_tail)
        cdef client_completion completion
        cdef int count = 0
        # A completion may run anything (a destructor, a garbage collection that lets another thread in), a reap included.
        while not self.dead and <int> (tail - self.completion_head) > 0:
            completion = self.completions[self.completion_head & self.completion_mask]
            if client_is_punched(self.header):      # then neither this nor `tail` was written by anybody
                break
            self._complete(completion.slot, completion.result, completion.detail, 1)
            count += 1
        if count:
            client_publish(&self.header.completion_head, self.completion_head)
            # Room for completions is what an idle daemon may be waiting for before it takes more submissions.
            if client_observe(&self.header.submission_head) != self.submission_tail:
                self.ring_due = True
                if not self.batching:
                    self.ring_now()
        return count

    cdef int _complete(self, uint32_t slot, int64_t result, uint32_t detail, uint32_t reaped) except -1:
        cdef Pending owner = <Pending> self.pending[slot]
        cdef bint due = False
        if owner is not None:
            self.pending[slot] = None
            self.free_slots[self.free_count] = slot
            self.free_count += 1
            due = owner.completed(self, slot, result, detail)
        # After the operation's state: a leader that looks at both without the GIL sees the one or the other.
        self.completion_head += reaped
        if due:
            self.called_back.append(owner)
        return 0

    cdef int _die(self) except -1:
        cdef uint32_t slot
        if self.dead:
            return 0
        self.dead = True
        for slot in range(self.slot_count):
            self._complete(slot, -ECONNRESET, 0, 0)
        return 0

    def reap(self) -> int:
        """Take all completions that are there and run their callbacks; how many. Never blocks."""
        cdef int count = 0
        with cython.critical_section(self):
            count = self._reap()
        self._run_callbacks()
        return count

    cdef int _run_callbacks(self) except -1:
        cdef list due
        cdef Py_ssize_t position = 0
        while self.called_back:
            due, self.called_back = self.called_back, []
            position = 0
            try:
                while position < len(due):
                    position += 1
                    (<Pending> due[position - 1]).run()
            finally:
                if position < len(due):      # one of them raised: the others are not its victims
                    self.called_back = due[position:] + self.called_back
        return 0

    def on_done(self, Operation operation, object callback) -> None:
        """Call ``callback(operation)`` from the ``reap`` or wait that takes its completion; at once if it is done."""
        if operation.state == COMPLETE:
            callback(operation)
        elif operation.callback is None:
            operation.callback = callback
        else:
            first = operation.callback
            operation.callback = lambda done: (first(done), callback(done))

    cpdef bint arm(self) noexcept:
        """Ask for the doorbell. False: completions are there already, reap instead of waiting."""
        if self.dead:
            return False
        self.watched = True
        client_say_asleep(&self.header.program_state)
        # Pairs with the daemon's client_must_ring() after it published completion_tail.
        if client_observe(&self.header.completion_tail) != self.completion_head and not client_is_punched(self.header):
            client_say_awake(&self.header.program_state)
            return False
        return True

    def disarm(self) -> bool:
        """After the doorbell rang: empty it. False when the daemon is gone; then everything in flight has ended."""
        if self.dead:
            return False
        client_say_awake(&self.header.program_state)
        if client_empty_doorbell(self.doorbell_fd) < 0:
            self.lose()
            return False
        return True

    def lose(self) -> None:
        """The daemon's end hung up: take the completions that are there, and end everything else that is in flight."""
        self._reap()
        self._die()
        self._run_callbacks()

    def wait(self, Operation operation, timeout=None) -> bool:
        """Wait until the operation is done; False when ``timeout`` (seconds) passed before. Signals run their handlers (PEP 475)."""
        cdef uint64_t deadline_ns = 0
        cdef int64_t left_ns = -1
        if operation.state == COMPLETE:
            return True
        if timeout is not None and timeout < 1e9:    # longer is for ever
            deadline_ns = monotonic_ns() + <uint64_t> (max(0.0, timeout) * 1e9)
        try:
            while True:
                self.reap()
                self.ring_now()
                if operation.state == COMPLETE:
                    return True
                self._check_process()
                if deadline_ns:
                    left_ns = <int64_t> (deadline_ns - monotonic_ns())
                    if left_ns <= 0:
                        return False
                if self.has_leader:
                    self._follow(operation, left_ns)
                else:
                    self._lead(operation, left_ns)
        finally:
            # Whoever was woken to lead may have had enough at that moment.
            if self.followers and not self.has_leader:
                self._release_followers(None)

    cdef int _lead(self, Operation operation, int64_t left_ns) except -1:
        cdef int got
        self.has_leader = True
        try:
            with nogil:
                got = client_sleep(self.header, &self.completion_head, &operation.state, self.doorbell_fd, self.attach_fd,
                                   self.spin_ns, left_ns)
            if got == -1:
                PyErr_CheckSignals()
            elif got == -2:
                self.lose()
        finally:
            self.has_leader = False
            if self.closed:
                self._close_fds()
            self.reap()
            # The wait said "awake": who watches the doorbell (an event loop) must still be woken by it.
            while self.watched and not self.dead and not self.arm():
                self.reap()
        return 0

    # Another thread sleeps on the doorbell: wait until it completes this operation, or leaves and hands the doorbell on.
    cdef int _follow(self, Operation operation, int64_t left_ns) except -1:
        lock = threading.Lock()
        lock.acquire()
        entry = (operation, lock)
        self.followers.append(entry)
        try:
            if operation.state != COMPLETE and self.has_leader:
                lock.acquire(timeout=-1 if left_ns < 0 else left_ns / 1e9)
        finally:
            self.followers.remove(entry)
        return 0

    # Those that wait for this operation; None: any one of them, to lead.
    cdef int _release_followers(self, Operation operation) except -1:
        for waited_for, lock in self.followers:
            if (operation is None or waited_for is operation) and lock.locked():
                lock.release()
                if operation is None:
                    break
        return 0
