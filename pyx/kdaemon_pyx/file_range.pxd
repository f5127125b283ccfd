"""A file range on its way into the output buffer."""

from libc.stdint cimport int32_t, uint8_t, uint64_t

from kdaemon_pyx.core cimport Connection, File


cdef int file_range_queue(Connection* c, File* file, uint64_t offset, uint64_t length) noexcept nogil
cdef int file_range_queue_memory(Connection* c, const uint8_t* data, uint64_t length) noexcept nogil
cdef bint file_range_window(Connection* c) noexcept nogil
cdef void file_range_fill(Connection* c) noexcept nogil
cdef void file_range_read_done(Connection* c, int32_t result) noexcept nogil
cdef void file_range_drop(Connection* c) noexcept nogil
