# Classes of bytes in HTTP (RFC 9110 section 5), as inline functions shared by the parsers.

from libc.stdint cimport uint8_t, uint32_t


cdef inline uint8_t to_lower(uint8_t c) noexcept nogil:
    return c | 0x20 if c >= c'A' and c <= c'Z' else c


cdef inline bint equals_ignoring_case(
    const uint8_t* data, uint32_t length, const char* lower, uint32_t lower_length
) noexcept nogil:
    # ASCII; `lower` is in lower case.
    cdef uint32_t i
    if length != lower_length:
        return False
    for i in range(length):
        if to_lower(data[i]) != <uint8_t>lower[i]:
            return False
    return True


cdef inline int hex_value(uint8_t c) noexcept nogil:
    # -1: not a hexadecimal digit.
    if c >= c'0' and c <= c'9':
        return c - c'0'
    c |= 0x20
    return c - c'a' + 10 if c >= c'a' and c <= c'f' else -1


cdef inline bint is_field_byte(uint8_t c) noexcept nogil:
    # field-vchar, obs-text, SP and HTAB (section 5.5).
    return c == c'\t' or (c >= 0x20 and c != 0x7f)


cdef inline bint is_token_byte(uint8_t c) noexcept nogil:
    # tchar (section 5.6.2).
    if (c >= c'0' and c <= c'9') or ((c | 0x20) >= c'a' and (c | 0x20) <= c'z'):
        return True
    return (
        c == c'-' or c == c'_' or c == c'.' or c == c'!' or c == c'#' or c == c'$' or c == c'%' or c == c'&'
        or c == c'\'' or c == c'*' or c == c'+' or c == c'^' or c == c'`' or c == c'|' or c == c'~'
    )


cdef inline uint32_t utf8_length(const uint8_t* data, uint32_t length) noexcept nogil:
    # Of the well-formed UTF-8 character at `data`; 0: none (RFC 3629 section 4).
    cdef uint8_t c = data[0]
    cdef uint32_t n
    cdef uint32_t i
    if c < 0x80:
        return 1
    n = 2 if c >= 0xC2 and c <= 0xDF else 3 if c >= 0xE0 and c <= 0xEF else 4 if c >= 0xF0 and c <= 0xF4 else 0
    if n > length:
        return 0
    for i in range(1, n):
        if data[i] & 0xC0 != 0x80:
            return 0
    if (
        (c == 0xE0 and data[1] < 0xA0) or (c == 0xED and data[1] > 0x9F)
        or (c == 0xF0 and data[1] < 0x90) or (c == 0xF4 and data[1] > 0x8F)
    ):
        return 0
    return n


cdef inline uint32_t skip_blanks(const uint8_t* text, uint32_t length, uint32_t i) noexcept nogil:
    while i < length and (text[i] == c' ' or text[i] == c'\t'):
        i += 1
    return i


cdef inline int parse_weight(const uint8_t* text, uint32_t length, uint32_t* i) noexcept nogil:
    # ";q=0.5" (section 12.4.2) in thousandths, 1000 where there is none; what is malformed counts as 0.
    cdef int weight = 0
    cdef int unit = 100
    cdef uint32_t p = skip_blanks(text, length, i[0])
    if p == length or text[p] != c';':
        i[0] = p
        return 1000
    p = skip_blanks(text, length, p + 1)
    if p + 2 < length and (text[p] | 0x20) == c'q' and text[p + 1] == c'=':
        p += 2
        if text[p] == c'1':
            weight = 1000
        p += 1
        if p < length and text[p] == c'.':
            p += 1
            while p < length and text[p] >= c'0' and text[p] <= c'9':
                if weight < 1000:
                    weight += unit * (text[p] - c'0')
                unit //= 10
                p += 1
    i[0] = p
    return weight
