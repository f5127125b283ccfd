"""The output buffer of a connection."""

from libc.stdint cimport uint8_t, uint32_t

from kdaemon_pyx.buffers cimport BUFFER_TAIL, Buffer
from kdaemon_pyx.core cimport RECORD_LAYER_USER, Connection
from kdaemon_pyx.record cimport RECORD_PLAINTEXT_MAX

cdef enum:
    # Records left under a key when the control thread is asked for a KeyUpdate: enough for what goes out until it answers.
    KEY_LIMIT_MARGIN = 65536


cdef inline uint32_t output_capacity(const Buffer* buffer) noexcept nogil:
    return buffer.capacity - BUFFER_TAIL

cdef inline bint output_pending(Connection* c) noexcept nogil:
    return c.output != NULL and (c.output_length != 0 or c.record_length != 0)

cdef inline bint output_limited(Connection* c) noexcept nogil:
    """The peer takes smaller records only (RFC 8449), and they are made here."""
    return c.record_content_max < RECORD_PLAINTEXT_MAX and c.record_layer == RECORD_LAYER_USER

cdef uint8_t* output_reserve(Connection* c, uint32_t length) noexcept nogil
cdef void output_commit(Connection* c, uint32_t length) noexcept nogil
cdef uint32_t output_room(Connection* c) noexcept nogil
cdef int output_seal(Connection* c, uint8_t content_type) noexcept nogil
cdef int output_seal_from(Connection* c, uint8_t content_type, const uint8_t* plaintext, uint32_t length) noexcept nogil
cdef int output_cut(Connection* c) noexcept nogil
cdef uint32_t output_fit(Connection* c) noexcept nogil
