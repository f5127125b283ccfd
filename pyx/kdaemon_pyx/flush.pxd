"""Kernel record layer: whether TCP has all that was sent."""

from libc.stdint cimport int32_t

from kdaemon_pyx.core cimport Connection


cdef void flush_begin(Connection* c) noexcept nogil
cdef bint flush_complete(Connection* c) noexcept nogil
cdef void flush_done(Connection* c, int32_t result) noexcept nogil
