# The program's side of a client ring.

cimport cython
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from kdaemon_pyx.client_abi cimport client_completion, client_header, client_parameters, client_submission
from kdaemon_pyx.client_arena cimport Arena


cdef struct Block:                   # of the arena, per slot: for operations that have no object of their own
    uint64_t offset
    uint32_t length


cdef class Pending:
    cdef int completed(self, ClientRing ring, uint32_t slot, int64_t result, uint32_t detail) except -1
    cdef int run(self) except -1


@cython.final
cdef class Operation(Pending):
    cdef ClientRing ring
    cdef uint64_t offset               # of the arena block, while has_block
    cdef readonly uint64_t user_data   # names it beside the rings
    cdef int64_t raw_result
    cdef uint32_t length
    cdef uint32_t slot
    cdef int exports                   # memoryviews of the arena block
    cdef bint has_block
    cdef uint8_t state
    cdef readonly uint64_t handle
    cdef readonly uint32_t detail
    cdef readonly uint8_t opcode
    cdef public object context         # the poster's own
    cdef object callback


cdef class ClientRing:
    cdef uint8_t* memory
    cdef uint64_t memory_size
    cdef client_header* header
    cdef client_submission* submissions
    cdef client_completion* completions
    cdef client_parameters* slots
    cdef uint8_t* arena
    cdef readonly uint64_t arena_size
    cdef Arena arena_state
    cdef uint32_t submission_tail
    cdef uint32_t submission_mask
    cdef uint32_t completion_head
    cdef uint32_t completion_mask
    cdef readonly uint32_t slot_count
    cdef uint32_t free_count
    cdef uint32_t* free_slots          # stack
    cdef Block* blocks                 # by slot, for those Pendings that have several operations
    cdef bint has_quiet                # the daemon knows CLIENT_SUBMISSION_QUIET
    cdef uint64_t user_data            # of the last operation posted
    cdef list pending                  # by slot: a Pending, kept alive while it is in flight
    cdef list called_back              # those whose run() is due
    cdef bint batching                 # posts do not ring the doorbell: whoever set it does, by ring_now()
    cdef bint ring_due                 # something was published since the daemon was looked after
    cdef bint watched                  # somebody watches the doorbell: arm() was called
    cdef list followers                # (operation, lock) of waiting threads that do not sleep on the doorbell themselves
    cdef bint has_leader
    cdef bint dead
    cdef bint closed                   # by close(): the leader closes the fds, which it may be sleeping on
    cdef long pid
    cdef int memory_fd
    cdef int doorbell_fd
    cdef int attach_fd
    cdef public uint64_t spin_ns       # how long a wait looks at the ring before it sleeps
    cdef readonly uint64_t doorbells   # sent

    cdef void _close_fds(self) noexcept
    cdef client_submission* prepare(self, Pending owner, uint8_t opcode, uint64_t handle) except NULL
    cdef void publish(self) noexcept
    cdef void ring_now(self) noexcept
    cdef long allocate(self, uint32_t length) except? -2
    cpdef bint arm(self) noexcept
    cdef int _submit(self, Operation operation, uint64_t timeout_ns, dict parameters, Operation target, uint16_t argument) except -1
    cdef int _check_process(self) except -1
    cdef int _check(self) except -1
    cdef int _reap(self) except -1
    cdef int _complete(self, uint32_t slot, int64_t result, uint32_t detail, uint32_t reaped) except -1
    cdef int _die(self) except -1
    cdef int _run_callbacks(self) except -1
    cdef int _lead(self, Operation operation, int64_t left_ns) except -1
    cdef int _follow(self, Operation operation, int64_t left_ns) except -1
    cdef int _release_followers(self, Operation operation) except -1
