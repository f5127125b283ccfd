"""What a connection holds: ciphertext until a record is complete or wanted, plaintext until the service takes it."""

from libc.stdint cimport uint8_t, uint32_t

from kdaemon_pyx.core cimport Connection


cdef int hold(Connection* c, const uint8_t* data, uint32_t length) noexcept nogil
cdef int keep(Connection* c, const uint8_t* data, uint32_t length) noexcept nogil
cdef bint hold_in(Connection* c, uint32_t size_class) noexcept nogil
cdef bint hold_shrink(Connection* c) noexcept nogil
cdef void hold_release(Connection* c) noexcept nogil
cdef uint32_t hold_rest(Connection* c) noexcept nogil
