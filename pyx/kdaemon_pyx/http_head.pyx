"""Heads of responses that have a representation: made from its prepared head, with what only this response has."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from kdaemon_pyx.http_conditional cimport ByteRange
from kdaemon_pyx.http_response cimport (
    HTTP_DATE_BYTES, Writer, put, put_decimal, put_end_of_head, put_hexadecimal, put_status_line, put_text,
)
from kdaemon_pyx.http_session cimport HttpSession
from kdaemon_pyx.representation cimport Representation


cdef bint open_writer(HttpSession* session, Writer* writer, uint32_t room) noexcept nogil:
    # 64 bytes more than asked: the Connection field and a 100 Continue.
    writer.position = session.context.transport.reserve(session.connection, room + 64)
    writer.end = writer.position + room + 64
    writer.overflow = False
    return writer.position != NULL


cdef void put_common(HttpSession* session, Writer* writer, const Representation* representation) noexcept nogil:
    cdef uint8_t* start = writer.position
    put(writer, representation.head + representation.common_start,
        representation.head_length - representation.common_start)
    if not writer.overflow:
        memcpy(
            start + representation.date_start - representation.common_start, session.context.date.text,
            HTTP_DATE_BYTES)
    put_end_of_head(writer, session.keep_alive, session.minor_version)


cdef void put_content_range(Writer* writer, const ByteRange* part, uint64_t size) noexcept nogil:
    put_text(writer, b"Content-Range: bytes ")
    put_decimal(writer, part.first)
    put(writer, b"-", 1)
    put_decimal(writer, part.first + part.length - 1)
    put(writer, b"/", 1)
    put_decimal(writer, size)
    put(writer, b"\r\n", 2)


cdef void put_boundary(Writer* writer, uint64_t boundary) noexcept nogil:
    cdef int shift
    for shift in range(60, -4, -4):
        put_hexadecimal(writer, boundary >> shift & 15)


cdef void put_end_boundary(Writer* writer, uint64_t boundary) noexcept nogil:
    put(writer, b"\r\n--", 4)
    put_boundary(writer, boundary)
    put(writer, b"--\r\n", 4)


cdef void put_part_head(HttpSession* session, Writer* writer, const ByteRange* part) noexcept nogil:
    # The coding is the part's: the multipart body itself is not encoded.
    cdef const Representation* representation = session.representation
    put(writer, b"\r\n--", 4)
    put_boundary(writer, session.boundary)
    put(writer, b"\r\n", 2)
    put(writer, representation.head + representation.type_start, representation.type_length)
    put_content_range(writer, part, representation.file.size)
    put(writer, b"\r\n", 2)


cdef uint64_t decimal_digits(uint64_t value) noexcept nogil:
    cdef uint64_t digits = 1
    while value >= 10:
        value //= 10
        digits += 1
    return digits


cdef uint64_t multipart_length(const Representation* representation, const ByteRange* ranges, uint32_t count) noexcept nogil:
    # What put_part_head() and the closing boundary come to, and the parts themselves.
    cdef uint64_t total = END_BOUNDARY_BYTES
    cdef uint32_t i
    for i in range(count):
        total += 4 + 16 + 2 + representation.type_length + 21 + 2 + 2 + 2
        total += decimal_digits(ranges[i].first) + decimal_digits(ranges[i].first + ranges[i].length - 1)
        total += decimal_digits(representation.file.size) + ranges[i].length
    return total


cdef void put_ranges_head(
    HttpSession* session, Writer* writer, const Representation* representation, const ByteRange* ranges, uint32_t count
) noexcept nogil:
    put_status_line(writer, 206)
    if count == 1:
        put(writer, representation.head + representation.type_start, representation.type_length)
        put_content_range(writer, ranges, representation.file.size)
        put_text(writer, b"Content-Length: ")
        put_decimal(writer, ranges[0].length)
    else:
        put_text(writer, b"Content-Type: multipart/byteranges; boundary=")
        put_boundary(writer, session.context.boundary)
        put_text(writer, b"\r\nContent-Length: ")
        put_decimal(writer, multipart_length(representation, ranges, count))
    put(writer, b"\r\n", 2)
    put_common(session, writer, representation)


cdef void put_not_modified_head(HttpSession* session, Writer* writer, const Representation* representation) noexcept nogil:
    put_status_line(writer, 304)
    put_common(session, writer, representation)


cdef void put_whole_head(HttpSession* session, Writer* writer, const Representation* representation) noexcept nogil:
    cdef uint8_t* start = writer.position
    put(writer, representation.head, representation.head_length)
    if not writer.overflow:
        memcpy(start + representation.date_start, session.context.date.text, HTTP_DATE_BYTES)
    put_end_of_head(writer, session.keep_alive, session.minor_version)
