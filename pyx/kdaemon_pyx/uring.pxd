"""One io_uring instance and its ring of provided receive buffers."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from kdaemon_pyx.liburing cimport io_uring, io_uring_buf_ring, io_uring_cqe, io_uring_sqe


cdef struct Uring:
    io_uring ring
    uint32_t setup_flags           # what the kernel took
    uint32_t features
    uint8_t registered             # ring.enter_ring_fd is an index
    int error                      # negative errno once submission failed for good; the loop ends with it
    uint64_t enters                # io_uring_enter calls
    io_uring_sqe scratch           # where preparations go after an error


# Receive buffers: filled by the kernel when data is there, so a connection that waits holds none.
# Owner of a buffer: the kernel, from receive_ring_recycle() to the completion that names it; then whoever handles that completion.
cdef struct ReceiveRing:
    io_uring_buf_ring* ring
    uint8_t* memory
    size_t ring_size
    size_t memory_size
    uint32_t count                 # power of two
    uint32_t buffer_size           # bytes
    uint16_t group
    uint16_t added                 # recycled, not yet published
    uint64_t resident              # buffers that may have pages: none or all, for the kernel takes them in turn


cdef int uring_setup(Uring* u, uint32_t entries) noexcept nogil
cdef void uring_teardown(Uring* u) noexcept nogil
cdef io_uring_sqe* uring_sqe(Uring* u) noexcept nogil
cdef int uring_enter(Uring* u, bint wait, uint64_t timeout_ns, uint32_t hold_us) noexcept nogil
cdef uint32_t uring_peek(Uring* u, io_uring_cqe** cqes, uint32_t count) noexcept nogil
cdef void uring_seen(Uring* u, uint32_t count) noexcept nogil

cdef int receive_ring_setup(
    ReceiveRing* r, Uring* u, uint16_t group, uint32_t count, uint32_t buffer_size) noexcept nogil
cdef void receive_ring_teardown(ReceiveRing* r, Uring* u) noexcept nogil
cdef uint8_t* receive_ring_buffer(ReceiveRing* r, uint16_t index) noexcept nogil
cdef void receive_ring_recycle(ReceiveRing* r, uint16_t index) noexcept nogil
cdef void receive_ring_publish(ReceiveRing* r) noexcept nogil
cdef void receive_ring_rest(ReceiveRing* r) noexcept nogil
