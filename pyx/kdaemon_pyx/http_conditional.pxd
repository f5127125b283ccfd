# Preconditions and ranges (RFC 9110 sections 13 and 14).

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from kdaemon_pyx.http_request cimport HttpRequest, Slice

cdef enum:
    MTIME_NONE = -2147483648       # before every HTTP-date that matters: 1901
    RANGES_BOUND = 64              # what HttpLimits.ranges_max may be set to

# What a response is compared with: the selected representation's validators.
cdef struct Validators:
    Slice etag                     # opaque-tag with its quotes, without W/
    bint etag_weak
    int64_t mtime_s                # MTIME_NONE: there is no Last-Modified
    int64_t now_s                  # a Last-Modified of this very second is a weak validator (section 8.8.2.2)

cdef struct ByteRange:
    uint64_t first
    uint64_t length

# 0: go on (a Range may apply); 304 or 412. In the order of section 13.2.2.
cdef int evaluate_preconditions(const HttpRequest* request, const Validators* validators) noexcept nogil

# The ranges to send, in the order asked for: their number; 0: the whole (no Range, not understood, If-Range says no, too many,
# or more bytes than the whole); -416: none of them exists.
cdef int select_ranges(
    const HttpRequest* request, const Validators* validators, uint64_t size, uint32_t ranges_max, ByteRange* ranges
) noexcept nogil

# All three forms of section 5.6.7; False: not a date.
cdef bint parse_http_date(Slice text, int64_t now_s, int64_t* seconds) noexcept nogil
