"""Which of a file's precompressed siblings a client gets."""

from libc.stdint cimport uint8_t, uint32_t

from kdaemon_pyx.files cimport ENCODING_BROTLI, ENCODING_COUNT, ENCODING_GZIP, ENCODING_IDENTITY, ENCODING_ZSTD, Encoding, Entry
from kdaemon_pyx.http_grammar cimport equals_ignoring_case, is_token_byte, parse_weight, skip_blanks
from kdaemon_pyx.http_request cimport HttpRequest, Slice, next_field

cdef enum:
    WEIGHT_UNSET = -1


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


cdef void take_weights(Slice text, int* weights, int* any_weight) noexcept nogil:
    cdef int encoding
    cdef uint32_t i = 0
    cdef uint32_t start
    while i < text.length:
        i = skip_blanks(text.data, text.length, i)
        start = i
        while i < text.length and is_token_byte(text.data[i]):
            i += 1
        encoding = encoding_of(text.data + start, i - start)
        if encoding >= 0:
            weights[encoding] = parse_weight(text.data, text.length, &i)
        elif i - start == 1 and text.data[start] == c'*':
            any_weight[0] = parse_weight(text.data, text.length, &i)
        while i < text.length and text.data[i] != c',':
            i += 1
        i += 1


cdef Encoding select_encoding(const HttpRequest* request, const Entry* entry) noexcept nogil:
    cdef int[4] weights
    cdef int any_weight = WEIGHT_UNSET
    cdef int weight
    cdef int encoding
    cdef int best = ENCODING_IDENTITY
    cdef uint32_t cursor = 0
    cdef Slice value = request.accept_encoding
    if value.data == NULL:
        return ENCODING_IDENTITY
    for encoding in range(<int>ENCODING_COUNT):
        weights[encoding] = WEIGHT_UNSET
    if not request.accept_encoding_repeated:
        take_weights(value, weights, &any_weight)
    else:                                                  # several lines are one list (section 5.2)
        while next_field(&request.fields, b"accept-encoding", 15, &cursor, &value):
            take_weights(value, weights, &any_weight)
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
