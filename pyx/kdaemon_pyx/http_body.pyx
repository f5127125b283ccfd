"""Request bodies, read and forgotten within a bound (RFC 9112 sections 6 and 7).

``discard`` at the end is for tests and fuzzers: the same function the engine runs, driven from Python.
"""

from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.string cimport memset

from kdaemon_pyx.http_body cimport BODY_CHUNKED, BODY_NONE, BODY_SIZED, BodyDiscard
from kdaemon_pyx.http_grammar cimport hex_value, is_field_byte, is_token_byte
from kdaemon_pyx.http_request cimport HttpLimits, HttpRequest

cdef enum:
    LINE_BYTES_OF_CHUNK_MAX = 1024
    CHUNK_OVERHEAD_FACTOR = 16

cdef enum ChunkState:
    CHUNK_SIZE = 0
    CHUNK_SIZE_DIGITS
    CHUNK_SIZE_BLANKS
    CHUNK_EXTENSION
    CHUNK_SIZE_LF
    CHUNK_DATA
    CHUNK_DATA_CR
    CHUNK_DATA_LF
    CHUNK_TRAILER_START
    CHUNK_TRAILER
    CHUNK_TRAILER_LF
    CHUNK_END_LF


cdef int begin_body(const HttpRequest* request, const HttpLimits* limits, BodyDiscard* body) noexcept nogil:
    memset(body, 0, sizeof(BodyDiscard))
    if request.chunked:
        body.kind = BODY_CHUNKED
        body.chunk_state = CHUNK_SIZE
    elif request.content_length > 0:
        if <uint64_t>request.content_length > limits.body_bytes_max:
            return 413
        body.kind = BODY_SIZED
        body.remaining = <uint64_t>request.content_length
    return 0


cdef int64_t discard_body(
    BodyDiscard* body, const HttpLimits* limits, const uint8_t* data, uint64_t length
) noexcept nogil:
    cdef uint64_t taken
    if body.kind == BODY_NONE:
        return 0
    if body.kind == BODY_CHUNKED:
        return discard_chunked(body, limits, data, length)
    taken = length if length < body.remaining else body.remaining
    body.remaining -= taken
    body.discarded += taken
    if body.remaining == 0:
        body.kind = BODY_NONE
    return <int64_t>taken


cdef int64_t discard_chunked(
    BodyDiscard* body, const HttpLimits* limits, const uint8_t* data, uint64_t length
) noexcept nogil:
    # RFC 9112 section 7.1. Sizes count into `discarded`; chunk overhead is bounded by a factor of the same limit.
    cdef uint64_t i = 0
    cdef uint64_t taken
    cdef uint8_t c
    cdef uint8_t state = body.chunk_state
    while i < length:
        if state == CHUNK_DATA:
            taken = length - i if length - i < body.remaining else body.remaining
            body.remaining -= taken
            i += taken
            if body.remaining == 0:
                state = CHUNK_DATA_CR
            continue
        c = data[i]
        i += 1
        if state == CHUNK_SIZE or state == CHUNK_SIZE_DIGITS:
            if hex_value(c) >= 0:
                if body.line_bytes == 15:
                    return -400
                if state == CHUNK_SIZE:
                    body.line_bytes = 0
                    body.remaining = 0
                    state = CHUNK_SIZE_DIGITS
                body.line_bytes += 1
                body.remaining = body.remaining << 4 | <uint64_t>hex_value(c)
            elif state == CHUNK_SIZE:
                return -400
            elif c == c'\r':
                state = CHUNK_SIZE_LF
            elif c == c';':
                state = CHUNK_EXTENSION
            elif c == c' ' or c == c'\t':
                state = CHUNK_SIZE_BLANKS
            else:
                return -400
        elif state == CHUNK_SIZE_BLANKS:                   # allowed before an extension only (section 7.1.1)
            body.line_bytes += 1
            if c == c';':
                state = CHUNK_EXTENSION
            elif (c != c' ' and c != c'\t') or body.line_bytes > LINE_BYTES_OF_CHUNK_MAX:
                return -400
        elif state == CHUNK_EXTENSION:
            body.line_bytes += 1
            if c == c'\r':
                state = CHUNK_SIZE_LF
            elif not is_field_byte(c) or body.line_bytes > LINE_BYTES_OF_CHUNK_MAX:
                return -400
        elif state == CHUNK_SIZE_LF:
            if c != c'\n':
                return -400
            body.discarded += body.remaining + body.line_bytes // CHUNK_OVERHEAD_FACTOR + 1
            if body.discarded > limits.body_bytes_max:
                return -413
            body.line_bytes = 0
            state = CHUNK_TRAILER_START if body.remaining == 0 else CHUNK_DATA
        elif state == CHUNK_DATA_CR:
            if c != c'\r':
                return -400
            state = CHUNK_DATA_LF
        elif state == CHUNK_DATA_LF:
            if c != c'\n':
                return -400
            state = CHUNK_SIZE
        elif state == CHUNK_TRAILER_START:
            if c == c'\r':
                state = CHUNK_END_LF
            elif is_token_byte(c):
                state = CHUNK_TRAILER
            else:
                return -400
        elif state == CHUNK_TRAILER:
            body.line_bytes += 1                           # of all trailers together
            if c == c'\r':
                state = CHUNK_TRAILER_LF
            elif not is_field_byte(c) or body.line_bytes > LINE_BYTES_OF_CHUNK_MAX:
                return -400
        elif state == CHUNK_TRAILER_LF:
            if c != c'\n':
                return -400
            state = CHUNK_TRAILER_START
        else:                                              # CHUNK_END_LF
            if c != c'\n':
                return -400
            body.kind = BODY_NONE
            break
    body.chunk_state = state
    return <int64_t>i


def discard(bytes data, step=None, uint64_t body_bytes_max=1 << 20):
    """Discards one chunked body, ``step`` bytes at a time: (consumed, ended), or (-status, False). For tests."""
    cdef HttpLimits limits
    cdef BodyDiscard body
    cdef const uint8_t* start = data
    cdef uint64_t length = len(data)
    cdef uint64_t position = 0
    cdef uint64_t n
    cdef int64_t consumed
    memset(&limits, 0, sizeof(limits))
    limits.body_bytes_max = body_bytes_max
    memset(&body, 0, sizeof(body))
    body.kind = BODY_CHUNKED
    while body.kind != BODY_NONE and position < length:
        n = length - position if step is None else min(length - position, step)
        consumed = discard_body(&body, &limits, start + position, n)
        if consumed < 0:
            return consumed, False
        position += consumed
    return position, body.kind == BODY_NONE
