# The access log: lines formatted where the response is made, put into the ring when it has ended, written to the file by another thread
# in batches.
#
# One ring per engine thread: the engine thread produces, whoever calls AccessLog.drain() consumes. The engine never waits for the
# disk: a line that does not fit is dropped and counted.

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kdaemon_pyx.http_request cimport HttpRequest
from kdaemon_pyx.http_response cimport DateCache

cdef struct LogRing:
    uint8_t* data
    uint32_t size                  # a power of two
    uint32_t head                  # bytes ever produced, modulo 2^32; written by the engine thread
    uint32_t tail                  # bytes ever consumed; written by the consumer
    bint json
    int event_fd                   # rung when the ring becomes half full
    uint64_t lines
    uint64_t dropped

# Address of the peer in network byte order; length 0: not known.
cdef struct PeerAddress:
    uint8_t length                 # 4, 16, or 0
    uint8_t bytes[16]

cdef enum:
    REQUEST_BYTES_MAX = 2048       # of each field, before escaping: the rest is cut off
    FIELD_BYTES_MAX = 768
    LINE_BYTES_MAX = 6 * (REQUEST_BYTES_MAX + 3 * FIELD_BYTES_MAX) + 512

# The line of a response that has not ended; the number of bytes of its body is put in at last.
cdef struct LogLine:
    uint64_t body_bytes            # that number
    uint32_t length
    uint32_t bytes_at
    uint8_t text[LINE_BYTES_MAX]   # less where it was kept

cdef void log_line_format(
    const LogRing* ring, LogLine* line, const DateCache* date, const PeerAddress* peer, const HttpRequest* request,
    int status, uint64_t body_bytes) noexcept nogil
# A copy, the caller's to free; NULL: no memory.
cdef LogLine* log_line_keep(const LogLine* line) noexcept nogil
cdef void log_line_write(LogRing* ring, const LogLine* line) noexcept nogil

cdef class AccessLog:
    cdef LogRing ring
    cdef bint _cut                 # a write ended within a line
