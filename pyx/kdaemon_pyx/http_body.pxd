# Request bodies (RFC 9112 sections 6 and 7): a file server needs none, but must find where the next request begins.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint64_t

from kdaemon_pyx.http_request cimport HttpLimits, HttpRequest

ctypedef enum BodyKind:
    BODY_NONE = 0
    BODY_SIZED
    BODY_CHUNKED

# A request body that is read and forgotten.
cdef struct BodyDiscard:
    BodyKind kind
    uint8_t chunk_state
    uint16_t line_bytes            # of the chunk-size line or trailer line under way
    uint64_t remaining             # of a sized body or of the chunk under way
    uint64_t discarded

# Starts discarding the body that `request` announces: 0, or 413.
cdef int begin_body(const HttpRequest* request, const HttpLimits* limits, BodyDiscard* body) noexcept nogil

# Takes body bytes: how many were consumed (body.kind is BODY_NONE when it ended), or minus an HTTP status (400, 413).
cdef int64_t discard_body(
    BodyDiscard* body, const HttpLimits* limits, const uint8_t* data, uint64_t length) noexcept nogil
