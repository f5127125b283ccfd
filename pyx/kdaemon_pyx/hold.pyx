"""What a connection holds of its input: ciphertext or handshake bytes that cannot be opened yet, in ``cipher`` from ``cipher_start`` to
``cipher_end``; plaintext that the service has not taken, in ``input`` likewise.

A buffer grows as it must. The largest kind is only for receiving in bulk: a connection that waits does not keep it.
"""

from libc.errno cimport ENOMEM
from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy, memmove

from kdaemon_pyx.buffers cimport BUFFER_BULK, BUFFER_LARGE, BUFFER_SMALL, Buffer, pool_give, pool_take
from kdaemon_pyx.core cimport CLOSE_RESOURCES, Connection
from kdaemon_pyx.lifecycle cimport connection_terminate
from kdaemon_pyx.record cimport RECORD_HEADER

cdef enum:
    SMALL_MAX = 16896              # a whole record begins in a small buffer, and has room for the beginning of the next


cdef int append(
        Connection* c, Buffer** buffer, uint32_t* start, uint32_t* end, const uint8_t* data, uint32_t length) noexcept nogil:
    """Appends to what stands in ``buffer`` from ``start`` to ``end``; NULL: nothing yet. 0, or -1 after which the connection is closing."""
    cdef Buffer* larger
    cdef uint32_t held = end[0] - start[0]
    if buffer[0] == NULL:
        buffer[0] = pool_take(&c.core.pool, BUFFER_SMALL if length <= SMALL_MAX else BUFFER_LARGE)
        start[0] = end[0] = held = 0
    elif start[0] and end[0] + length > buffer[0].capacity:
        memmove(buffer[0].data, buffer[0].data + start[0], held)
        start[0], end[0] = 0, held
    if buffer[0] != NULL and end[0] + length > buffer[0].capacity and buffer[0].size_class == BUFFER_SMALL:
        larger = pool_take(&c.core.pool, BUFFER_LARGE)
        if larger != NULL:
            memcpy(larger.data, buffer[0].data + start[0], held)
            pool_give(&c.core.pool, buffer[0])
            buffer[0] = larger
            start[0], end[0] = 0, held
    if buffer[0] == NULL or end[0] + length > buffer[0].capacity:
        connection_terminate(c, CLOSE_RESOURCES, ENOMEM)
        return -1
    memcpy(buffer[0].data + end[0], data, length)
    end[0] += length
    return 0


cdef int hold(Connection* c, const uint8_t* data, uint32_t length) noexcept nogil:
    """Keeps ciphertext or handshake bytes until more comes. 0, or -1 after which the connection is closing."""
    return append(c, &c.cipher, &c.cipher_start, &c.cipher_end, data, length)


cdef int keep(Connection* c, const uint8_t* data, uint32_t length) noexcept nogil:
    """Keeps plaintext until the service wants it. 0, or -1 after which the connection is closing."""
    return append(c, &c.input, &c.input_start, &c.input_end, data, length)


cdef void hold_release(Connection* c) noexcept nogil:
    if c.cipher != NULL and c.cipher_start >= c.cipher_end:
        pool_give(&c.core.pool, c.cipher)
        c.cipher = NULL


cdef uint32_t hold_rest(Connection* c) noexcept nogil:
    """Bytes missing from the partial record that is held: of its header first, then of its body. 0: it is whole."""
    cdef uint32_t held = c.cipher_end - c.cipher_start
    cdef uint8_t* data = c.cipher.data + c.cipher_start
    cdef uint32_t record
    if held < RECORD_HEADER:
        return RECORD_HEADER - held
    record = RECORD_HEADER + (data[3] << 8 | data[4])
    return record - held if record > held else 0


cdef bint hold_in(Connection* c, uint32_t size_class) noexcept nogil:
    """Moves the held ciphertext, if any, to the beginning of a buffer of that class. False without a buffer."""
    cdef uint32_t held = c.cipher_end - c.cipher_start if c.cipher != NULL else 0
    cdef Buffer* buffer
    if c.cipher != NULL and c.cipher.size_class == size_class:
        memmove(c.cipher.data, c.cipher.data + c.cipher_start, held)
        c.cipher_start, c.cipher_end = 0, held
        return True
    buffer = pool_take(&c.core.pool, size_class)
    if buffer == NULL or held > buffer.capacity:
        if buffer != NULL:
            pool_give(&c.core.pool, buffer)
        return False
    if c.cipher != NULL:
        memcpy(buffer.data, c.cipher.data + c.cipher_start, held)
        pool_give(&c.core.pool, c.cipher)
    c.cipher = buffer
    c.cipher_start = 0
    c.cipher_end = held
    return True


cdef bint hold_shrink(Connection* c) noexcept nogil:
    """Gives a buffer for bulk back before a wait. False without another one."""
    if c.cipher == NULL or c.cipher.size_class != BUFFER_BULK:
        return True
    hold_release(c)
    return c.cipher == NULL or hold_in(c, BUFFER_SMALL) or hold_in(c, BUFFER_LARGE)
