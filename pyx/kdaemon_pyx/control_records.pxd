"""Records that are not application data, and the end of connections whose peers break the protocol."""

from libc.stdint cimport uint8_t, uint32_t

from kdaemon_pyx.core cimport CloseReason, Connection


cdef void violation(Connection* c, CloseReason reason, int alert, int error) noexcept nogil
cdef bint control_flooded(Connection* c) noexcept nogil
cdef void control_record(Connection* c, int content_type, const uint8_t* data, uint32_t length) noexcept nogil
