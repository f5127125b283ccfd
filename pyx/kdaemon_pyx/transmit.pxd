"""Send side of a connection: queued items and the pump."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t

from kdaemon_pyx.core cimport Connection


cdef int transmit_item(Connection* c, uint8_t kind, uint8_t content_type, const uint8_t* data, uint32_t length) noexcept nogil
cdef int transmit_alert(Connection* c, uint8_t description) noexcept nogil
cdef bint transmit_idle(Connection* c) noexcept nogil
cdef void transmit_pump(Connection* c) noexcept nogil
cdef void transmit_discard(Connection* c) noexcept nogil
cdef void transmit_shutdown(Connection* c) noexcept nogil
cdef void transmit_send_done(Connection* c, int32_t result) noexcept nogil
cdef void transmit_control_done(Connection* c, int32_t result) noexcept nogil
cdef bint transmit_progressed(Connection* c) noexcept nogil
cdef int64_t transmit_memory_cancel(Connection* c) noexcept nogil
