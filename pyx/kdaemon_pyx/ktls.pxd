"""Kernel TLS: attaching the ULP and installing keys."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from kdaemon_pyx.core cimport ControlMessage

cdef enum:
    KTLS_RX = 0
    KTLS_TX = 1


cdef int ktls_attach(int fd) noexcept nogil
cdef bint ktls_suite_known(uint16_t cipher_suite) noexcept nogil
cdef int ktls_set_keys(
    int fd, int direction, uint16_t cipher_suite, const uint8_t* key, const uint8_t* iv, uint64_t sequence) noexcept nogil
cdef int ktls_set_record_content_max(int fd, uint16_t record_content_max) noexcept nogil
cdef int ktls_transmit_sequence(int fd, uint16_t cipher_suite, uint64_t* sequence) noexcept nogil
cdef void ktls_control_prepare_send(ControlMessage* m, uint8_t content_type, uint32_t length) noexcept nogil
cdef void ktls_control_prepare_receive(ControlMessage* m) noexcept nogil
cdef int ktls_control_type(const ControlMessage* m) noexcept nogil
