# Classes of bytes in HTTP (RFC 9110 section 5), as inline functions shared by the parsers.

from libc.stdint cimport uint8_t


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
