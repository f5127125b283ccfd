"""Which of a file's precompressed siblings a client gets."""

from libc.stdint cimport uint8_t, uint32_t

from kdaemon_pyx.files cimport ENCODING_BROTLI, ENCODING_COUNT, ENCODING_GZIP, ENCODING_IDENTITY, ENCODING_ZSTD, Encoding, Entry
from kdaemon_pyx.http_grammar cimport is_token_byte
from kdaemon_pyx.http_request cimport Slice, equals_ignoring_case

cdef enum:
    WEIGHT_UNSET = -1
    WEIGHT_ONE = 1000


cdef int encoding_of(const uint8_t* name, uint32_t length) noexcept nogil:
    if equals_ignoring_case(name, length, b"gzip", 4) or equals_ignoring_case(name, length, b"x-gzip", 6):
        return ENCODING_GZIP
    if equals_ignoring_case(name, length, b"br", 2):
        return ENCODING_BROTLI
    if equals_ignoring_case(name, length, b"zstd", 4):
        return ENCODING_ZSTD
    if equals_ignoring_case(name, length, b"identity", 8):
        return ENCODING_IDENTITY
    return -1


cdef uint32_t skip_spaces(Slice text, uint32_t i) noexcept nogil:
    while i < text.length and (text.data[i] == c' ' or text.data[i] == c'\t'):
        i += 1
    return i


cdef int parse_weight(Slice text, uint32_t* i) noexcept nogil:
    # ";q=0.5" (section 12.4.2) in thousandths; what is malformed counts as 0.
    cdef int weight = 0
    cdef int unit = 100
    cdef uint32_t p = skip_spaces(text, i[0])
    if p == text.length or text.data[p] != c';':
        i[0] = p
        return WEIGHT_ONE
    p = skip_spaces(text, p + 1)
    if p + 2 < text.length and (text.data[p] | 0x20) == c'q' and text.data[p + 1] == c'=':
        p += 2
        if text.data[p] == c'1':
            weight = WEIGHT_ONE
        p += 1
        if p < text.length and text.data[p] == c'.':
            p += 1
            while p < text.length and text.data[p] >= c'0' and text.data[p] <= c'9':
                if weight < WEIGHT_ONE:
                    weight += unit * (text.data[p] - c'0')
                unit //= 10
                p += 1
    i[0] = p
    return weight


cdef Encoding select_encoding(Slice accept_encoding, const Entry* entry) noexcept nogil:
    cdef int[4] weights
    cdef int any_weight = WEIGHT_UNSET
    cdef int weight
    cdef int encoding
    cdef int best = ENCODING_IDENTITY
    cdef uint32_t i = 0
    cdef uint32_t start
    if accept_encoding.length == 0:
        return ENCODING_IDENTITY
    for encoding in range(<int>ENCODING_COUNT):
        weights[encoding] = WEIGHT_UNSET
    while i < accept_encoding.length:
        i = skip_spaces(accept_encoding, i)
        start = i
        while i < accept_encoding.length and is_token_byte(accept_encoding.data[i]):
            i += 1
        encoding = encoding_of(accept_encoding.data + start, i - start)
        if encoding >= 0:
            weights[encoding] = parse_weight(accept_encoding, &i)
        elif i - start == 1 and accept_encoding.data[start] == c'*':
            any_weight = parse_weight(accept_encoding, &i)
        while i < accept_encoding.length and accept_encoding.data[i] != c',':
            i += 1
        i += 1
    # Identity is acceptable unless it is refused by name, and comes last among equals; a coding that is not named is not wanted.
    weight = weights[<int>ENCODING_IDENTITY] if weights[<int>ENCODING_IDENTITY] != WEIGHT_UNSET else 1
    for encoding in range(1, <int>ENCODING_COUNT):
        if entry.representations[encoding] == NULL:
            continue
        if weights[encoding] == WEIGHT_UNSET:
            weights[encoding] = any_weight
        if weights[encoding] > 0 and weights[encoding] >= weight:
            weight = weights[encoding]
            best = encoding
    return <Encoding>best
