# HTTP/1.1 request heads (RFC 9112), strict: whatever two readers could understand differently is refused.
#
# A head is parsed in one go, once it is complete. Until then scan_request_head() remembers how far it looked, so that a
# head that comes byte by byte costs each byte once, and a line that can no longer be right is refused at once.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    # Decoded path with its NUL: Linux opens nothing longer (PATH_MAX).
    PATH_BYTES_MAX = 4096

cdef struct Slice:
    const uint8_t* data
    uint32_t length

# Everything a client can make large or slow, with nginx's defaults; set from Python (http_config.Limits).
cdef struct HttpLimits:
    uint32_t request_line_bytes_max
    uint32_t header_line_bytes_max
    uint32_t head_bytes_max
    uint32_t header_count_max
    uint32_t requests_per_connection_max
    uint32_t ranges_max
    uint64_t body_bytes_max
    uint64_t connection_age_ns_max

ctypedef enum Method:
    METHOD_GET = 0
    METHOD_HEAD
    METHOD_OPTIONS
    METHOD_OTHER

# How far the end of a head has been looked for; all zero at the start of each request.
cdef struct HeadScan:
    uint32_t scanned               # bytes looked at
    uint32_t line_start
    uint16_t lines                 # complete lines, the request line included
    uint16_t leading_lines         # empty lines before the request line: one is allowed (RFC 9112 section 2.2)

# A parsed head. Slices point into the caller's buffer and are valid as long as it is; a field that is absent has data == NULL.
cdef struct HttpRequest:
    Method method
    uint8_t minor_version
    bint keep_alive
    bint chunked
    bint expect_continue
    bint expect_unknown
    bint accept_encoding_repeated
    bint if_match_repeated
    bint if_none_match_repeated
    int64_t content_length         # -1: none given
    uint32_t path_length
    Slice line                     # the request line, for the log
    Slice target                   # path as sent, without the query
    Slice query                    # with its '?'; empty: none
    Slice host                     # without the port; from the target in absolute form
    Slice fields                   # all header lines, each with its CRLF
    Slice range
    Slice if_range
    Slice if_match
    Slice if_none_match
    Slice if_modified_since
    Slice if_unmodified_since
    Slice accept
    Slice accept_encoding
    Slice user_agent
    Slice referer

# Head length in bytes when complete; 0: more bytes are needed; below 0: minus the HTTP status to refuse it with.
cdef int64_t scan_request_head(
    const uint8_t* data, uint64_t length, const HttpLimits* limits, HeadScan* scan) noexcept nogil

# Parses a complete head. `path` has room for PATH_BYTES_MAX bytes and gets the decoded path without dot segments, NUL-terminated.
# 0, or the HTTP status to refuse it with (400, 414, 501, 505).
cdef int parse_request_head(
    const uint8_t* data, uint32_t length, uint8_t* path, HttpRequest* request) noexcept nogil

# The next value of the header field `name` (lower case) at or behind *cursor; False: no more.
cdef bint next_field(
    const Slice* fields, const char* name, uint32_t name_length, uint32_t* cursor, Slice* value) noexcept nogil

cdef inline Slice make_slice(const uint8_t* start, const uint8_t* end) noexcept nogil:
    cdef Slice slice
    slice.data = start
    slice.length = <uint32_t>(end - start)
    return slice
