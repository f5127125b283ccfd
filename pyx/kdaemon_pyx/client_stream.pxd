# A connection's bytes for an event loop: without a Python object per operation.

from libc.stdint cimport int64_t, uint32_t, uint64_t

from kdaemon_pyx.client_ring cimport ClientRing, Pending


cdef class LaneReader:
    cdef readonly object loop
    cdef ClientRing ring
    cdef int fd
    cdef object hang_up                # epoll of the attach socket's end
    cdef bint scheduled                # turn() is with the loop

    cdef int posted(self) except -1
    cdef int batch(self) except -1


cdef class Stream(Pending):
    cdef ClientRing ring
    cdef LaneReader reader
    cdef uint64_t handle
    cdef object owner                  # the transport: told of ends, failures, and when all is posted
    cdef object protocol
    cdef object received               # protocol.data_received
    cdef bint buffered                 # the protocol has get_buffer() instead
    cdef bint reading
    cdef bint closing                  # nothing is delivered any more
    cdef bint writing_ended
    cdef bint lost
    cdef bint holding                  # nothing is posted, for START_TLS
    cdef bint delivering               # the protocol is being called with what was read
    cdef bint due                      # run() is in the ring's list
    cdef bint has_block                # read_offset is a block of the arena
    cdef bint arrived                  # a READ has ended and its result was not delivered, or not wholly
    cdef uint32_t read_slot
    cdef uint32_t read_size
    cdef uint32_t read_detail
    cdef uint32_t write_detail
    cdef uint64_t read_offset
    cdef uint64_t read_position        # bytes of the READ that the protocol has
    cdef uint64_t read_user_data
    cdef int64_t read_result
    cdef int64_t write_error
    cdef object waiting                # deque of memoryviews that found no room in ring or arena
    cdef uint64_t waiting_size
    cdef uint64_t in_flight            # bytes of WRITEs
    cdef uint64_t high
    cdef uint64_t low
    cdef bint paused

    cdef int post_read(self) except -1
    cdef int deliver(self) except -1
    cdef int hand_out(self, uint64_t length) except -1
    cdef void release_block(self) noexcept
    cdef bint post_write(self, const char* data, uint32_t length) except -1
    cdef int wait_with(self, object data) except -1
    cdef int strain(self) except -1
    cdef int relieve(self) except -1
