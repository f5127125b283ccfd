# The system calls of a client ring's program side: nogil, and without any of the ring's Python side.

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from kdaemon_pyx.client_abi cimport client_header

cdef uint64_t monotonic_ns() noexcept nogil
# The daemon has detached this program and punched the memory out: what looks like completions is none, and the hang-up is on its way.
cdef bint client_is_punched(client_header* header) noexcept nogil
# The shared memory, which forked children do not get; NULL and errno.
cdef uint8_t* client_map(int fd, uint64_t size) noexcept nogil
# In such a child: zeros where the memory was, so that an old view of it is no fault.
cdef void client_map_zeros(uint8_t* memory, uint64_t size) noexcept nogil
cdef void client_ring_doorbell(int fd) noexcept nogil
# 1: it had rung; 0: it had not; -1: its other end is closed.
cdef int client_empty_doorbell(int fd) noexcept nogil
# Both directions end, at once and for every holder: who sleeps on it wakes up.
cdef void client_hang_up(int fd) noexcept nogil
# 1: look; 0: time is up; -1: a signal; -2: the daemon is gone. head: the ring's completion_head; done: becomes nonzero when another
# thread has reaped what this one waits for. timeout_ns < 0: none.
cdef int client_sleep(client_header* header, const uint32_t* head, const unsigned char* done, int doorbell_fd, int attach_fd,
                      uint64_t spin_ns, int64_t timeout_ns) noexcept nogil
