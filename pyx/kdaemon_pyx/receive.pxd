"""Receive side of an established connection: records in, plaintext to the service, everything else up to the control thread."""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from kdaemon_pyx.core cimport Connection


cdef void receive_arm(Connection* c) noexcept nogil
cdef void receive_data_done(Connection* c, int32_t result, uint8_t* data) noexcept nogil
cdef void receive_bulk_done(Connection* c, int32_t result) noexcept nogil
cdef void receive_exact_done(Connection* c, int32_t result) noexcept nogil
cdef void receive_message_done(Connection* c, int32_t result) noexcept nogil
cdef void receive_pull_done(Connection* c, int32_t result) noexcept nogil
cdef void receive_pull_cancel(Connection* c) noexcept nogil
cdef void receive_hangup_done(Connection* c) noexcept nogil
cdef void receive_held(Connection* c) noexcept nogil
cdef void receive_offer(Connection* c) noexcept nogil
