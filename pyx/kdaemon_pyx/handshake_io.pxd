"""A connection before its keys are installed: bytes up to the control thread and down from it, and the installation itself."""

from libc.stdint cimport int32_t, uint8_t

from kdaemon_pyx.core cimport Connection


cdef const char* record_layer_reason(uint8_t reason) noexcept nogil
cdef void handshake_arm(Connection* c) noexcept nogil
cdef void handshake_received(Connection* c, int32_t result, uint8_t* data) noexcept nogil
cdef void handshake_offer(Connection* c) noexcept nogil
cdef void handshake_install(Connection* c) noexcept nogil
