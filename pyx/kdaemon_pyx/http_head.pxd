# Heads of responses that have a representation: 200, 206 with one or several ranges, 304.
#
# The caller reserves representation.head_length + HEAD_EXTRA_BYTES_MAX bytes for any of them.

from libc.stdint cimport uint32_t, uint64_t

from kdaemon_pyx.http_conditional cimport ByteRange
from kdaemon_pyx.http_response cimport Writer
from kdaemon_pyx.http_session cimport HttpSession
from kdaemon_pyx.representation cimport Representation

cdef enum:
    HEAD_EXTRA_BYTES_MAX = 256     # what a 206 or 304 has beyond its representation's own head
    PART_HEAD_BYTES_MAX = 192      # of a part of multipart/byteranges, beside the representation's type_length
    END_BOUNDARY_BYTES = 2 + 2 + 16 + 2 + 2

# `room` bytes of the connection's output, and what every head may have besides. False: there is no room now.
cdef bint open_writer(HttpSession* session, Writer* writer, uint32_t room) noexcept nogil
cdef void put_whole_head(
    HttpSession* session, Writer* writer, const Representation* representation) noexcept nogil
cdef void put_not_modified_head(HttpSession* session, Writer* writer, const Representation* representation) noexcept nogil
# One range: a 206 of that part; several: multipart/byteranges (RFC 9110 section 14.6), whose parts put_part_head() begins.
cdef void put_ranges_head(
    HttpSession* session, Writer* writer, const Representation* representation, const ByteRange* ranges,
    uint32_t count) noexcept nogil
cdef void put_part_head(HttpSession* session, Writer* writer, const ByteRange* part) noexcept nogil
cdef void put_end_boundary(Writer* writer, uint64_t boundary) noexcept nogil
# Length of the body that put_part_head(), the ranges and put_end_boundary() come to.
cdef uint64_t multipart_length(
    const Representation* representation, const ByteRange* ranges, uint32_t count) noexcept nogil
