# The program's side of a client ring.

cimport cython
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from kdaemon_pyx.client_abi cimport client_completion, client_header, client_parameters, client_submission
from kdaemon_pyx.client_arena cimport Arena


@cython.final
cdef class Operation:
    cdef ClientRing ring
    cdef uint64_t offset               # of the arena block, while has_block
    cdef uint64_t user_data
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
    cdef uint64_t user_data            # of the last operation posted
    cdef list operations               # by slot; keeps what is in flight alive
    cdef list called_back              # complete, callback not yet run
    cdef list followers                # (operation, lock) of waiting threads that do not sleep on the doorbell themselves
    cdef bint has_leader
    cdef bint dead
    cdef long pid
    cdef int memory_fd
    cdef int doorbell_fd
    cdef int attach_fd
    cdef public uint64_t spin_ns       # how long a wait looks at the ring before it sleeps
    cdef readonly uint64_t doorbells   # sent

    cdef void _close_fds(self) noexcept
    cdef int _submit(self, Operation operation, uint64_t timeout_ns, dict parameters, Operation target, unsigned short argument) except -1
    cdef int _check(self) except -1
    cdef int _reap(self) except -1
    cdef int _complete(self, Operation operation) except -1
    cdef int _die(self) except -1
    cdef int _run_callbacks(self) except -1
    cdef int _sleep(self, Operation operation, int64_t timeout_ns) noexcept nogil
    cdef int _follow(self, Operation operation, int64_t left_ns) except -1
    cdef int _release_followers(self, Operation operation) except -1
    cdef int _promote(self) except -1
