"""What a connection holds of its input before it can be opened: ciphertext, or handshake bytes, in ``cipher`` from ``cipher_start`` to ``cipher_end``.

The buffer grows as it must. The largest kind is only for receiving in bulk: a connection that waits does not keep it.
"""

from libc.errno cimport ENOMEM
from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy, memmove

from kdaemon_pyx.buffers cimport BUFFER_BULK, BUFFER_LARGE, BUFFER_SMALL, Buffer, pool_give, pool_take
from kdaemon_pyx.core cimport CLOSE_RESOURCES, Connection
from kdaemon_pyx.lifecycle cimport connection_terminate
from kdaemon_pyx.record cimport RECORD_HEADER


cdef int hold(Connection* c, const uint8_t* data, uint32_t length) noexcept nogil:
    """Keeps ciphertext or handshake bytes until more comes. 0, or -1 after which the connection is closing."""
    cdef Buffer* larger
    cdef uint32_t held = c.cipher_end - c.cipher_start
    if c.cipher == NULL:
        c.cipher = pool_take(&c.core.pool, BUFFER_SMALL if length <= 16896 else BUFFER_LARGE)
        c.cipher_start = 0
        c.cipher_end = 0
        held = 0
    elif c.cipher_start and c.cipher_end + length > c.cipher.capacity:
        memmove(c.cipher.data, c.cipher.data + c.cipher_start, held)
        c.cipher_start = 0
        c.cipher_end = held
    if c.cipher != NULL and c.cipher_end + length > c.cipher.capacity and c.cipher.size_class == BUFFER_SMALL:
        larger = pool_take(&c.core.pool, BUFFER_LARGE)
        if larger != NULL:
            memcpy(larger.data, c.cipher.data + c.cipher_start, held)
            pool_give(&c.core.pool, c.cipher)
            c.cipher = larger
            c.cipher_start = 0
            c.cipher_end = held
    if c.cipher == NULL or c.cipher_end + length > c.cipher.capacity:
        connection_terminate(c, CLOSE_RESOURCES, ENOMEM)
        return -1
    memcpy(c.cipher.data + c.cipher_end, data, length)
    c.cipher_end += length
    return 0


cdef void hold_release(Connection* c) noexcept nogil:
    if c.cipher != NULL and c.cipher_start >= c.cipher_end and not c.receiving_bulk:
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
    cdef Buffer* buffer = pool_take(&c.core.pool, size_class)
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
