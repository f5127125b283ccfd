"""HTTP/1.1 request parsing (RFC 9112), without Python objects and without allocation.

``parse`` at the end is the same for Python: for the redirect listener, tests and fuzzers.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memchr, memcmp, memset

from kdaemon_pyx.http_grammar cimport equals_ignoring_case, is_field_byte, is_token_byte, to_lower
from kdaemon_pyx.http_request cimport (
    METHOD_GET, METHOD_HEAD, METHOD_OPTIONS, METHOD_OTHER, PATH_BYTES_MAX, HeadScan, HttpLimits, HttpRequest, Slice,
)
from kdaemon_pyx.http_target cimport parse_target, take_host

cdef enum:
    TOKEN = 1          # RFC 9110 section 5.6.2
    FIELD = 2          # field-vchar, obs-text, SP and HTAB (section 5.5)

cdef uint8_t[256] character_class


cdef void make_table() noexcept nogil:
    cdef int c
    for c in range(256):
        character_class[c] = (TOKEN if is_token_byte(<uint8_t>c) else 0) | (FIELD if is_field_byte(<uint8_t>c) else 0)


make_table()


cdef int64_t scan_request_head(
    const uint8_t* data, uint64_t length, const HttpLimits* limits, HeadScan* scan
) noexcept nogil:
    cdef const uint8_t* found
    cdef uint32_t end
    cdef uint32_t line_bytes
    cdef uint32_t line_bytes_max
    cdef uint32_t available = limits.head_bytes_max if length > limits.head_bytes_max else <uint32_t>length
    while True:
        found = <const uint8_t*>memchr(data + scan.scanned, c'\n', available - scan.scanned)
        end = available if found == NULL else <uint32_t>(found - data)
        line_bytes = end - scan.line_start
        line_bytes_max = limits.request_line_bytes_max if scan.lines == 0 else limits.header_line_bytes_max
        if line_bytes > line_bytes_max + 1:                # the one more is the CR
            return -414 if scan.lines == 0 else -431
        if found == NULL:
            scan.scanned = available
            return -431 if available == limits.head_bytes_max else 0
        if line_bytes == 0 or data[end - 1] != c'\r':      # a bare LF ends no line here (RFC 9112 section 2.2)
            return -400
        scan.scanned = scan.line_start = end + 1
        if line_bytes == 1:
            if scan.lines != 0:
                return end + 1
            scan.leading_lines += 1
            if scan.leading_lines > 1:
                return -400
            continue
        scan.lines += 1
        if scan.lines > limits.header_count_max + 1:
            return -431


cdef int parse_request_line(const uint8_t* start, const uint8_t* end, uint8_t* path, HttpRequest* request) noexcept nogil:
    # method SP request-target SP HTTP-version (RFC 9112 section 3), single spaces, nothing around them.
    cdef const uint8_t* p = start
    cdef const uint8_t* version
    request.line = make_slice(start, end)
    while p < end and character_class[p[0]] & TOKEN:
        p += 1
    if p == start or p == end or p[0] != c' ':
        return 400
    if p - start == 3 and memcmp(start, b"GET", 3) == 0:
        request.method = METHOD_GET
    elif p - start == 4 and memcmp(start, b"HEAD", 4) == 0:
        request.method = METHOD_HEAD
    elif p - start == 7 and memcmp(start, b"OPTIONS", 7) == 0:
        request.method = METHOD_OPTIONS
    else:
        request.method = METHOD_OTHER
    if end - p < 11:                                       # " / HTTP/1.1"
        return 400
    version = end - 9
    if memcmp(version, b" HTTP/", 6) != 0 or version[7] != c'.':
        return 400
    if version[6] < c'0' or version[6] > c'9' or version[8] < c'0' or version[8] > c'9':
        return 400
    if version[6] != c'1':
        return 505
    request.minor_version = 1 if version[8] > c'0' else 0  # a higher minor version is answered as 1.1 (RFC 9110 section 2.5)
    return parse_target(p + 1, version, path, request)


cdef int take_content_length(const Slice* value, HttpRequest* request) noexcept nogil:
    # RFC 9112 section 6.3 allows "5, 5" to be mended; a second length is refused here, because the mender in front of us may differ.
    cdef uint32_t i
    cdef int64_t total = 0
    if request.content_length >= 0 or value.length == 0 or value.length > 18:
        return 400
    for i in range(value.length):
        if value.data[i] < c'0' or value.data[i] > c'9':
            return 400
        total = total * 10 + (value.data[i] - c'0')
    request.content_length = total
    return 0


cdef void take_connection(const Slice* value, HttpRequest* request, bint* close) noexcept nogil:
    cdef uint32_t i = 0
    cdef uint32_t start
    cdef uint32_t end
    while i < value.length:
        while i < value.length and (value.data[i] == c',' or value.data[i] == c' ' or value.data[i] == c'\t'):
            i += 1
        start = i
        while i < value.length and value.data[i] != c',':
            i += 1
        end = i
        while end > start and (value.data[end - 1] == c' ' or value.data[end - 1] == c'\t'):
            end -= 1
        if equals_ignoring_case(value.data + start, end - start, b"close", 5):
            close[0] = True
        elif equals_ignoring_case(value.data + start, end - start, b"keep-alive", 10):
            request.keep_alive = True


cdef inline void take_single(Slice* field, const Slice* value) noexcept nogil:
    # A second line of a field that has one value makes it invalid, and an invalid Range or date is ignored (RFC 9110 section 13.1).
    if field.data != NULL:
        field.length = 0
    else:
        field[0] = value[0]


cdef int take_field(const Slice* name, const Slice* value, HttpRequest* request, bint* host_seen, bint* close) noexcept nogil:
    cdef uint32_t n = name.length
    cdef const uint8_t* data = name.data
    cdef uint8_t first = to_lower(data[0])
    cdef Slice host
    if first == c'h' and equals_ignoring_case(data, n, b"host", 4):
        if host_seen[0]:
            return 400
        host_seen[0] = True
        if take_host(value[0], &host) != 0:
            return 400
        if request.host.data == NULL:                      # absolute-form wins over Host (RFC 9112 section 3.2.2)
            request.host = host
    elif first == c'u':
        if equals_ignoring_case(data, n, b"user-agent", 10):
            request.user_agent = value[0]
    elif first == c'a':
        if equals_ignoring_case(data, n, b"accept", 6):
            request.accept = value[0]
        elif equals_ignoring_case(data, n, b"accept-encoding", 15):
            request.accept_encoding_repeated = request.accept_encoding.data != NULL
            request.accept_encoding = value[0]
    elif first == c'c':
        if equals_ignoring_case(data, n, b"connection", 10):
            take_connection(value, request, close)
        elif equals_ignoring_case(data, n, b"content-length", 14):
            return take_content_length(value, request)
    elif first == c'i':
        if equals_ignoring_case(data, n, b"if-none-match", 13):
            request.if_none_match_repeated = request.if_none_match.data != NULL
            request.if_none_match = value[0]
        elif equals_ignoring_case(data, n, b"if-modified-since", 17):
            take_single(&request.if_modified_since, value)
        elif equals_ignoring_case(data, n, b"if-range", 8):
            take_single(&request.if_range, value)
        elif equals_ignoring_case(data, n, b"if-match", 8):
            request.if_match_repeated = request.if_match.data != NULL
            request.if_match = value[0]
        elif equals_ignoring_case(data, n, b"if-unmodified-since", 19):
            take_single(&request.if_unmodified_since, value)
    elif first == c'r':
        if equals_ignoring_case(data, n, b"range", 5):
            take_single(&request.range, value)
        elif equals_ignoring_case(data, n, b"referer", 7):
            request.referer = value[0]
    elif first == c't':
        if equals_ignoring_case(data, n, b"transfer-encoding", 17):
            if request.chunked:
                return 400
            if not equals_ignoring_case(value.data, value.length, b"chunked", 7):
                return 501                                 # RFC 9112 section 6.1: a coding that is not understood
            request.chunked = True
    elif first == c'e':
        if equals_ignoring_case(data, n, b"expect", 6):
            if equals_ignoring_case(value.data, value.length, b"100-continue", 12):
                request.expect_continue = True
            else:
                request.expect_unknown = True
    return 0


cdef const uint8_t* parse_field_line(const uint8_t* p, Slice* name, Slice* value) noexcept nogil:
    # One header line that is known to end with CRLF: the start of the next, or NULL where RFC 9112 section 5 is broken.
    cdef const uint8_t* start = p
    cdef const uint8_t* end
    while character_class[p[0]] & TOKEN:
        p += 1
    if p == start or p[0] != c':':                         # obs-fold begins with a space; so does a space before the colon
        return NULL
    name[0] = make_slice(start, p)
    p += 1
    while p[0] == c' ' or p[0] == c'\t':
        p += 1
    start = p
    while character_class[p[0]] & FIELD:
        p += 1
    if p[0] != c'\r' or p[1] != c'\n':                     # NUL, bare CR, other controls
        return NULL
    end = p
    while end > start and ((end - 1)[0] == c' ' or (end - 1)[0] == c'\t'):
        end -= 1
    value[0] = make_slice(start, end)
    return p + 2


cdef int parse_request_head(const uint8_t* data, uint32_t length, uint8_t* path, HttpRequest* request) noexcept nogil:
    cdef const uint8_t* p = data
    cdef const uint8_t* end = data + length - 2            # the empty line
    cdef const uint8_t* line_end
    cdef Slice name
    cdef Slice value
    cdef bint host_seen = False
    cdef bint close = False
    cdef int status
    memset(request, 0, sizeof(HttpRequest))
    request.content_length = -1
    if p[0] == c'\r' and p[1] == c'\n':
        p += 2
    line_end = <const uint8_t*>memchr(p, c'\n', length) - 1
    status = parse_request_line(p, line_end, path, request)
    if status != 0:
        return status
    p = line_end + 2
    request.fields = make_slice(p, end)
    while p < end:
        p = parse_field_line(p, &name, &value)
        if p == NULL:
            return 400
        status = take_field(&name, &value, request, &host_seen, &close)
        if status != 0:
            return status
    if request.minor_version != 0:
        request.keep_alive = not close
        if not host_seen:                                  # RFC 9112 section 3.2
            return 400
    elif close:
        request.keep_alive = False
    if request.chunked and (request.content_length >= 0 or request.minor_version == 0):
        return 400                                         # section 6.1: both, or chunked from 1.0, is how requests are smuggled
    return 0


cdef bint next_field(
    const Slice* fields, const char* name, uint32_t name_length, uint32_t* cursor, Slice* value
) noexcept nogil:
    cdef const uint8_t* p = fields.data + cursor[0]
    cdef const uint8_t* end = fields.data + fields.length
    cdef Slice found
    while p < end:
        p = parse_field_line(p, &found, value)
        if p == NULL:
            return False
        cursor[0] = <uint32_t>(p - fields.data)
        if equals_ignoring_case(found.data, found.length, name, name_length):
            return True
    return False


# --- from Python: the redirect listener, tests and fuzzers ------------------------------------------------------------

cdef HttpLimits default_limits(dict given) except *:
    cdef HttpLimits limits
    memset(&limits, 0, sizeof(limits))
    limits.request_line_bytes_max = given.get("request_line_bytes_max", 8192)
    limits.header_line_bytes_max = given.get("header_line_bytes_max", 8192)
    limits.head_bytes_max = given.get("head_bytes_max", 32768)
    limits.header_count_max = given.get("header_count_max", 100)
    limits.body_bytes_max = given.get("body_bytes_max", 1 << 20)
    return limits


cdef object slice_bytes(Slice slice):
    return None if slice.data == NULL else (<const char*>slice.data)[:slice.length]


def parse(bytes data, step=None, **limits_given):
    """Scans and parses one request head, offering ``step`` more bytes at a time (None: all at once).

    Returns a dict: ``status`` 0 with the head's parts and ``head_length``, or the HTTP status it is refused with; None
    when ``data`` holds no complete head yet.
    """
    cdef HttpLimits limits = default_limits(limits_given)
    cdef HeadScan scan
    cdef HttpRequest request
    cdef uint8_t[PATH_BYTES_MAX] path
    cdef const uint8_t* start = data
    cdef uint64_t length = len(data)
    cdef uint64_t offered = length if step is None else min(length, step)
    cdef int64_t head
    cdef int status
    memset(&scan, 0, sizeof(scan))
    while True:
        head = scan_request_head(start, offered, &limits, &scan)
        if head != 0 or offered == length:
            break
        offered = min(length, offered + step)
    if head == 0:
        return None
    if head < 0:
        return {"status": -head}
    status = parse_request_head(start, <uint32_t>head, path, &request)
    if status != 0:
        return {"status": status}
    return {
        "status": 0,
        "head_length": head,
        "method": ("GET", "HEAD", "OPTIONS", "other")[<int>request.method],
        "version": (1, request.minor_version),
        "path": (<const char*>path)[:request.path_length],
        "target": slice_bytes(request.target),
        "query": slice_bytes(request.query),
        "host": slice_bytes(request.host),
        "keep_alive": bool(request.keep_alive),
        "chunked": bool(request.chunked),
        "content_length": None if request.content_length < 0 else request.content_length,
        "expect": "100-continue" if request.expect_continue else "unknown" if request.expect_unknown else None,
        "range": slice_bytes(request.range),
        "if_range": slice_bytes(request.if_range),
        "if_match": slice_bytes(request.if_match),
        "if_none_match": slice_bytes(request.if_none_match),
        "if_modified_since": slice_bytes(request.if_modified_since),
        "if_unmodified_since": slice_bytes(request.if_unmodified_since),
        "accept": slice_bytes(request.accept),
        "accept_encoding": slice_bytes(request.accept_encoding),
        "user_agent": slice_bytes(request.user_agent),
        "referer": slice_bytes(request.referer),
    }
