"""The request-target (RFC 9112 section 3.2) and the Host field: which path of which host is wanted."""

from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memchr, memcpy, memmove

from kdaemon_pyx.http_grammar cimport equals_ignoring_case, hex_value
from kdaemon_pyx.http_request cimport METHOD_OPTIONS, METHOD_OTHER, PATH_BYTES_MAX, HttpRequest, Slice, make_slice

cdef enum:
    TARGET = 1         # what a request-target may hold; bytes above 0x7f too, which browsers encode and people do not
    HOST = 2           # reg-name, IP-literal and the colon of a port (RFC 3986 section 3.2.2)

cdef uint8_t[256] character_class


cdef void make_table() noexcept nogil:
    cdef int c
    cdef const char* host_punctuation = b"-._~%!$&'()*+,;=:[]"
    cdef bint alphanumeric
    for c in range(256):
        alphanumeric = (c >= c'0' and c <= c'9') or (c >= c'a' and c <= c'z') or (c >= c'A' and c <= c'Z')
        character_class[c] = 0
        if alphanumeric or (c != 0 and memchr(host_punctuation, c, 19) != NULL):
            character_class[c] |= HOST
        if c > 0x20 and c != 0x7f and c != c'#':
            character_class[c] |= TARGET


make_table()


cdef void normalise_path(uint8_t* path, uint32_t* path_length) noexcept nogil:
    # In place, so that one file has one path and a rule for "/a/*" cannot be passed by with "//a/" or "/x/../a/":
    # empty and dot segments go, as in nginx (RFC 3986 section 5.2.4). What leads above the root becomes "/..", which no open follows.
    cdef uint32_t length = path_length[0]
    cdef uint32_t start = 0, end, n = 0                    # at a '/', and where its segment ends
    while start < length:
        end = start + 1
        while end < length and path[end] != c'/':
            end += 1
        if end - start == 3 and path[start + 1] == c'.' and path[start + 2] == c'.':
            if n == 0:
                memcpy(path, b"/..", 4)
                path_length[0] = 3
                return
            n -= 1
            while path[n] != c'/':
                n -= 1
        elif end - start > 2 or (end - start == 2 and path[start + 1] != c'.'):
            memmove(path + n, path + start, end - start)
            n += end - start
            start = end
            continue
        if end == length:                                  # a segment that went leaves its slash at the end
            path[n] = c'/'
            n += 1
        start = end
    path[n] = 0
    path_length[0] = n


cdef int decode_path(const Slice* raw, uint8_t* path, uint32_t* path_length) noexcept nogil:
    # RFC 3986 section 2.1. The target begins with '/'.
    cdef uint32_t i = 0, n = 0
    cdef uint8_t c
    cdef bint regular = True
    while i < raw.length:
        c = raw.data[i]
        if c == c'%':
            if i + 2 >= raw.length or hex_value(raw.data[i + 1]) < 0 or hex_value(raw.data[i + 2]) < 0:
                return 400
            c = <uint8_t>(hex_value(raw.data[i + 1]) << 4 | hex_value(raw.data[i + 2]))
            if c == 0:
                return 400
            i += 2
        if n == PATH_BYTES_MAX - 1:
            return 414
        if (c == c'.' or c == c'/') and n != 0 and path[n - 1] == c'/':
            regular = False
        path[n] = c
        n += 1
        i += 1
    path[n] = 0
    path_length[0] = n
    if not regular:
        normalise_path(path, path_length)
    return 0


cdef int take_host(Slice value, Slice* host) noexcept nogil:
    # Drops the port; an IPv6 literal keeps its brackets.
    cdef uint32_t i
    cdef uint32_t end = value.length
    for i in range(value.length):
        if not character_class[value.data[i]] & HOST:
            return 400
    if value.length != 0 and value.data[0] == c'[':
        i = 0
        while i < value.length and value.data[i] != c']':
            i += 1
        if i == value.length or (i + 1 < value.length and value.data[i + 1] != c':'):
            return 400
        end = i + 1
    else:
        for i in range(value.length):
            if value.data[i] == c':':
                end = i
                break
    for i in range(end + 1, value.length):
        if value.data[i] < c'0' or value.data[i] > c'9':
            return 400
    host.data = value.data
    host.length = end
    return 0


cdef int parse_target(const uint8_t* start, const uint8_t* end, uint8_t* path, HttpRequest* request) noexcept nogil:
    cdef const uint8_t* p = start
    cdef uint32_t scheme = 0
    if start == end:
        return 400
    while p < end:
        if not character_class[p[0]] & TARGET:
            return 400
        p += 1
    p = start
    if p[0] == c'*' and end - p == 1:                      # asterisk-form, for OPTIONS alone (RFC 9112 section 3.2.4)
        request.target = make_slice(start, end)
        path[0] = c'*'
        path[1] = 0
        request.path_length = 1
        return 0 if request.method == METHOD_OPTIONS else 400
    if p[0] != c'/':                                       # absolute-form (section 3.2.2)
        if end - p >= 8 and equals_ignoring_case(p, 8, b"https://", 8):
            scheme = 8
        elif end - p >= 7 and equals_ignoring_case(p, 7, b"http://", 7):
            scheme = 7
        else:
            return 405 if request.method == METHOD_OTHER else 400
        start = p + scheme
        p = start
        while p < end and p[0] != c'/' and p[0] != c'?':
            p += 1
        if p == start or take_host(make_slice(start, p), &request.host) != 0:
            return 400
    start = p
    p = <const uint8_t*>memchr(start, c'?', end - start)
    if p != NULL:
        request.query = make_slice(p, end)
        end = p
    request.target = make_slice(start, end)
    if start == end:                                       # absolute-form without a path means "/"
        path[0] = c'/'
        path[1] = 0
        request.path_length = 1
        return 0
    return decode_path(&request.target, path, &request.path_length)
