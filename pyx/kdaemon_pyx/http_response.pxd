# Response heads: status lines, header fields, dates, and the small bodies of errors (RFC 9110, RFC 9112 section 4).

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from kdaemon_pyx.http_request cimport Slice

cdef enum:
    HTTP_DATE_BYTES = 29           # "Sun, 06 Nov 1994 08:49:37 GMT"
    # Room that any generated response (error, redirect without its Location, 100, OPTIONS) fits in.
    GENERATED_BYTES_MAX = 768

# Writes into memory somebody else owns; what does not fit sets `overflow` and is not written.
cdef struct Writer:
    uint8_t* position
    uint8_t* end
    bint overflow

# The current Date field, formatted once a second; one per engine thread.
cdef struct DateCache:
    int64_t now_s
    uint8_t[32] text


cdef inline void put(Writer* writer, const void* data, uint32_t length) noexcept nogil:
    if <uint64_t>(writer.end - writer.position) < length:
        writer.overflow = True
        return
    memcpy(writer.position, data, length)
    writer.position += length


cdef inline void put_slice(Writer* writer, Slice slice) noexcept nogil:
    put(writer, slice.data, slice.length)

cdef void put_text(Writer* writer, const char* text) noexcept nogil
cdef void put_decimal(Writer* writer, uint64_t value) noexcept nogil
cdef void put_hexadecimal(Writer* writer, uint64_t value) noexcept nogil
# A path as a URI's path: everything but unreserved characters and '/' percent-encoded, runs of '/' made one, so that no path
# on disk can turn into a reference to another host.
cdef void put_encoded_path(Writer* writer, const uint8_t* path, uint32_t length) noexcept nogil

cdef const char* reason_phrase(int status) noexcept nogil
# "HTTP/1.1 404 Not Found" CRLF
cdef void put_status_line(Writer* writer, int status) noexcept nogil
# The empty line that ends a head, with the Connection field before it where the default of the request's version does not hold.
cdef void put_end_of_head(Writer* writer, bint keep_alive, int minor_version) noexcept nogil
cdef void put_server_and_date(Writer* writer, const DateCache* date) noexcept nogil
# An error of its own. Behind the head's first lines the caller puts its fields, put_end_of_head() and, but for HEAD, the body,
# whose length this gives.
cdef uint64_t put_error_head(Writer* writer, int status, const DateCache* date) noexcept nogil
cdef void put_error_body(Writer* writer, int status) noexcept nogil

cdef void format_http_date(int64_t seconds, uint8_t* text) noexcept nogil
# Reads the (coarse) clock; formats again only when the second has changed.
cdef void refresh_date(DateCache* date) noexcept nogil
