"""The output buffer of a connection: plaintext goes in, sealed records stand in it.

User record layer: plaintext is written where it is encrypted in place. ``output`` holds ``output_length`` sealed bytes and behind them one open
record with ``record_length`` bytes of plaintext. A record is sealed exactly once, and its ciphertext is kept until all of it is sent.
Kernel record layer, and handshake bytes: ``output`` holds what is sent as it is.

Where the peer takes smaller records only (RFC 8449), plaintext is written into the open record all the same, however long, and cut into
records when it is committed.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t
from libc.string cimport memmove

from kdaemon_pyx.buffers cimport BUFFER_LARGE, BUFFER_SMALL, pool_take
from kdaemon_pyx.core cimport CLOSE_LIMIT, CONNECTION_CLOSING, RECORD_LAYER_USER, Connection
from kdaemon_pyx.lifecycle cimport EVENT_KIND_KEY_LIMIT, connection_mark, connection_terminate, event_push_keys
from kdaemon_pyx.record cimport (
    CONTENT_APPLICATION_DATA, RECORD_HEADER, RECORD_OVERHEAD, RECORD_PLAINTEXT_MAX, RECORD_TRAILER, record_seal_from)


cdef int output_seal(Connection* c, uint8_t content_type) noexcept nogil:
    """User layer: closes the open record. 0, or a negative errno after which the connection is closing."""
    cdef uint32_t length = c.record_length
    c.record_length = 0
    return output_seal_from(c, content_type, c.output.data + c.output_length + RECORD_HEADER, length)


cdef int output_seal_from(Connection* c, uint8_t content_type, const uint8_t* plaintext, uint32_t length) noexcept nogil:
    """The same with plaintext from elsewhere, read once; no record is open."""
    cdef int64_t sealed
    if c.transmit_keys.sequence + KEY_LIMIT_MARGIN >= c.transmit_keys.sequence_max and not c.key_limit_told:
        c.key_limit_told = 1
        event_push_keys(c, EVENT_KIND_KEY_LIMIT, 1, NULL, 0)
    sealed = record_seal_from(&c.transmit_keys, content_type, c.output.data + c.output_length, plaintext, length)
    if sealed < 0:
        connection_terminate(c, CLOSE_LIMIT, <int32_t>-sealed)
        return <int>sealed
    if content_type == CONTENT_APPLICATION_DATA:
        c.core.counters.bytes_out += length
    c.output_length += <uint32_t>sealed
    return 0


cdef int output_cut(Connection* c) noexcept nogil:
    """User layer: an open record that is longer than the peer takes becomes several; the last stays open. 0, or as output_seal."""
    cdef uint32_t size = c.record_content_max
    cdef uint32_t left = c.record_length
    cdef uint32_t whole, i
    cdef uint8_t* start
    cdef int result
    if left <= size:
        return 0
    whole = (left - 1) // size
    start = c.output.data + c.output_length + RECORD_HEADER
    i = whole
    while i:                                       # from the back: each piece makes room for the overhead of those before it
        memmove(start + i * (size + RECORD_OVERHEAD), start + i * size, left - i * size if i == whole else size)
        i -= 1
    while left > size:
        c.record_length = size
        result = output_seal(c, CONTENT_APPLICATION_DATA)
        if result < 0:
            return result
        left -= size
    c.record_length = left
    return 0


cdef uint32_t output_fit(Connection* c) noexcept nogil:
    """User layer: bytes of plaintext that the output can take behind what it holds, in records as small as the peer wants."""
    cdef uint32_t wire = c.record_content_max + RECORD_OVERHEAD
    cdef uint32_t room = output_capacity(c.output) - c.output_length
    cdef uint32_t most = room // wire * c.record_content_max
    if room % wire > RECORD_OVERHEAD:
        most += room % wire - RECORD_OVERHEAD
    return most - c.record_length if most > c.record_length else 0


cdef uint8_t* output_reserve(Connection* c, uint32_t length) noexcept nogil:
    """Room for ``length`` (at most 16384) bytes, or NULL."""
    cdef uint32_t used
    if c.file != NULL or c.finishing or length > RECORD_PLAINTEXT_MAX or c.state == CONNECTION_CLOSING:
        return NULL
    if c.output == NULL:
        # Small records take more room on the wire, and a head has to fit as before.
        c.output = pool_take(&c.core.pool, BUFFER_LARGE if output_limited(c) else BUFFER_SMALL)
        if c.output == NULL:
            return NULL
        c.output_length = 0
        c.record_length = 0
    if c.record_layer != RECORD_LAYER_USER:
        if c.output_length + length > output_capacity(c.output):
            return NULL
        return c.output.data + c.output_length
    if output_limited(c):
        return c.output.data + c.output_length + RECORD_HEADER + c.record_length if length <= output_fit(c) else NULL
    used = c.output_length + RECORD_HEADER + c.record_length
    if c.record_length + length > RECORD_PLAINTEXT_MAX:
        if used + RECORD_TRAILER + RECORD_HEADER + length + RECORD_TRAILER > output_capacity(c.output):
            return NULL
        if output_seal(c, CONTENT_APPLICATION_DATA) < 0:
            return NULL
        used = c.output_length + RECORD_HEADER
    if used + length + RECORD_TRAILER > output_capacity(c.output):
        return NULL
    return c.output.data + used


cdef void output_commit(Connection* c, uint32_t length) noexcept nogil:
    if c.record_layer == RECORD_LAYER_USER:
        c.record_length += length
        if output_cut(c) < 0:
            return
    else:
        c.output_length += length
        c.core.counters.bytes_out += length
    c.sent_pending = 1
    connection_mark(c)


cdef uint32_t output_room(Connection* c) noexcept nogil:
    """Bytes that one output_reserve() can get now."""
    cdef uint32_t used, room
    if c.file != NULL or c.finishing or c.state == CONNECTION_CLOSING:
        return 0
    if c.output == NULL:
        return RECORD_PLAINTEXT_MAX
    if output_limited(c):
        room = output_fit(c)
        return room if room < RECORD_PLAINTEXT_MAX else RECORD_PLAINTEXT_MAX
    used = c.output_length
    if c.record_layer == RECORD_LAYER_USER:
        used += RECORD_OVERHEAD + c.record_length
        if c.record_length == RECORD_PLAINTEXT_MAX:
            used += RECORD_OVERHEAD
    room = output_capacity(c.output) - used if used < output_capacity(c.output) else 0
    if c.record_layer == RECORD_LAYER_USER and c.record_length < RECORD_PLAINTEXT_MAX and room > RECORD_PLAINTEXT_MAX - c.record_length:
        return RECORD_PLAINTEXT_MAX - c.record_length
    return room if room < RECORD_PLAINTEXT_MAX else RECORD_PLAINTEXT_MAX
