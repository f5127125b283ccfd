"""Response heads and the small bodies of errors, written straight into the connection's output buffer."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, strlen
from posix.time cimport clock_gettime, timespec

from kdaemon_pyx.http_response cimport HTTP_DATE_BYTES, DateCache, Writer, put

cdef extern from "<time.h>" nogil:
    const int CLOCK_REALTIME_COARSE

cdef const char* LOWER_DIGITS = b"0123456789abcdef"
cdef const char* UPPER_DIGITS = b"0123456789ABCDEF"
cdef const char* WEEKDAYS = b"SunMonTueWedThuFriSat"
cdef const char* MONTHS = b"JanFebMarAprMayJunJulAugSepOctNovDec"


cdef void put_text(Writer* writer, const char* text) noexcept nogil:
    put(writer, text, <uint32_t>strlen(text))


cdef void put_decimal(Writer* writer, uint64_t value) noexcept nogil:
    cdef uint8_t[20] digits
    cdef int i = 20
    while True:
        i -= 1
        digits[i] = <uint8_t>(c'0' + value % 10)
        value //= 10
        if value == 0:
            break
    put(writer, &digits[i], <uint32_t>(20 - i))


cdef void put_hexadecimal(Writer* writer, uint64_t value) noexcept nogil:
    cdef uint8_t[16] digits
    cdef int i = 16
    while True:
        i -= 1
        digits[i] = <uint8_t>LOWER_DIGITS[value & 15]
        value >>= 4
        if value == 0:
            break
    put(writer, &digits[i], <uint32_t>(16 - i))


cdef void put_encoded_path(Writer* writer, const uint8_t* path, uint32_t length) noexcept nogil:
    cdef uint32_t i
    cdef uint8_t c
    cdef uint8_t[3] encoded
    for i in range(length):
        c = path[i]
        if c == c'/' and i > 0 and path[i - 1] == c'/':
            continue
        if (
            (c >= c'0' and c <= c'9') or ((c | 0x20) >= c'a' and (c | 0x20) <= c'z')
            or c == c'/' or c == c'-' or c == c'.' or c == c'_' or c == c'~'
        ):
            put(writer, &c, 1)
        else:
            encoded[0] = c'%'
            encoded[1] = <uint8_t>UPPER_DIGITS[c >> 4]
            encoded[2] = <uint8_t>UPPER_DIGITS[c & 15]
            put(writer, encoded, 3)


cdef const char* reason_phrase(int status) noexcept nogil:
    if status == 200:
        return b"OK"
    if status == 206:
        return b"Partial Content"
    if status == 204:
        return b"No Content"
    if status == 301:
        return b"Moved Permanently"
    if status == 302:
        return b"Found"
    if status == 303:
        return b"See Other"
    if status == 304:
        return b"Not Modified"
    if status == 307:
        return b"Temporary Redirect"
    if status == 308:
        return b"Permanent Redirect"
    if status == 400:
        return b"Bad Request"
    if status == 403:
        return b"Forbidden"
    if status == 404:
        return b"Not Found"
    if status == 405:
        return b"Method Not Allowed"
    if status == 408:
        return b"Request Timeout"
    if status == 410:
        return b"Gone"
    if status == 412:
        return b"Precondition Failed"
    if status == 413:
        return b"Content Too Large"
    if status == 414:
        return b"URI Too Long"
    if status == 416:
        return b"Range Not Satisfiable"
    if status == 417:
        return b"Expectation Failed"
    if status == 421:
        return b"Misdirected Request"
    if status == 429:
        return b"Too Many Requests"
    if status == 431:
        return b"Request Header Fields Too Large"
    if status == 500:
        return b"Internal Server Error"
    if status == 501:
        return b"Not Implemented"
    if status == 503:
        return b"Service Unavailable"
    if status == 505:
        return b"HTTP Version Not Supported"
    return b"Unknown"


cdef const char* explanation(int status) noexcept nogil:
    # One sentence for the person who sees it; says nothing about what is on the disk.
    if status == 400:
        return b"The request is not well-formed HTTP/1.1."
    if status == 403:
        return b"This may not be read."
    if status == 404:
        return b"There is nothing here by that name."
    if status == 405:
        return b"Files can be read only: GET, HEAD or OPTIONS."
    if status == 408:
        return b"The request did not arrive in time."
    if status == 412:
        return b"The file is not in the state the request asks for."
    if status == 413:
        return b"The request's body is larger than this server reads."
    if status == 414:
        return b"The request's address is too long."
    if status == 416:
        return b"The file has no such range of bytes."
    if status == 417:
        return b"The only expectation understood is 100-continue."
    if status == 421:
        return b"This connection was not made for that host name; connect again."
    if status == 429:
        return b"Too many requests from this address; try again in a second."
    if status == 431:
        return b"The request's header is too large."
    if status == 500:
        return b"The file could not be read."
    if status == 501:
        return b"The only transfer coding understood is chunked."
    if status == 503:
        return b"The server lacks resources at the moment; try again."
    if status == 505:
        return b"This server speaks HTTP/1.1."
    return b""


cdef void put_status_line(Writer* writer, int status) noexcept nogil:
    put(writer, b"HTTP/1.1 ", 9)
    put_decimal(writer, <uint64_t>status)
    put(writer, b" ", 1)
    put_text(writer, reason_phrase(status))
    put(writer, b"\r\n", 2)


cdef void put_end_of_head(Writer* writer, bint keep_alive, int minor_version) noexcept nogil:
    if not keep_alive:
        put(writer, b"Connection: close\r\n\r\n", 21)
    elif minor_version == 0:
        put(writer, b"Connection: keep-alive\r\n\r\n", 26)
    else:
        put(writer, b"\r\n", 2)


cdef void put_server_and_date(Writer* writer, const DateCache* date) noexcept nogil:
    put_text(writer, b"Server: kdaemon\r\nDate: ")
    put(writer, date.text, HTTP_DATE_BYTES)
    put(writer, b"\r\n", 2)


cdef uint64_t put_error_head(Writer* writer, int status, const DateCache* date) noexcept nogil:
    cdef const char* sentence = explanation(status)
    cdef uint64_t length = 3 + 1 + strlen(reason_phrase(status)) + 1
    if sentence[0] != 0:
        length += strlen(sentence) + 1
    put_status_line(writer, status)
    put_server_and_date(writer, date)
    put_text(writer, b"Content-Type: text/plain; charset=utf-8\r\nContent-Length: ")
    put_decimal(writer, length)
    put(writer, b"\r\n", 2)
    return length


cdef void put_error_body(Writer* writer, int status) noexcept nogil:
    cdef const char* sentence = explanation(status)
    put_decimal(writer, <uint64_t>status)
    put(writer, b" ", 1)
    put_text(writer, reason_phrase(status))
    put(writer, b"\n", 1)
    if sentence[0] != 0:
        put_text(writer, sentence)
        put(writer, b"\n", 1)


cdef void put_two_digits(uint8_t* at, int64_t value) noexcept nogil:
    at[0] = <uint8_t>(c'0' + value // 10)
    at[1] = <uint8_t>(c'0' + value % 10)


cdef void format_http_date(int64_t seconds, uint8_t* text) noexcept nogil:
    # IMF-fixdate (RFC 9110 section 5.6.7). Days to civil date in eras of 400 years that begin on 1 March.
    cdef int64_t days = seconds // 86400
    cdef int64_t rest = seconds % 86400
    cdef int64_t era, day_of_era, year_of_era, day_of_year, month, year
    if rest < 0:
        rest += 86400
        days -= 1
    cdef int64_t weekday = (days + 4) % 7                  # 1 January 1970 was a Thursday
    if weekday < 0:
        weekday += 7
    days += 719468
    era = (days if days >= 0 else days - 146096) // 146097
    day_of_era = days - era * 146097
    year_of_era = (day_of_era - day_of_era // 1460 + day_of_era // 36524 - day_of_era // 146096) // 365
    day_of_year = day_of_era - (365 * year_of_era + year_of_era // 4 - year_of_era // 100)
    month = (5 * day_of_year + 2) // 153
    memcpy(text, WEEKDAYS + 3 * weekday, 3)
    memcpy(text + 3, b", ", 2)
    put_two_digits(text + 5, day_of_year - (153 * month + 2) // 5 + 1)
    month = month + 3 if month < 10 else month - 9
    year = year_of_era + era * 400 + (1 if month <= 2 else 0)
    text[7] = c' '
    memcpy(text + 8, MONTHS + 3 * (month - 1), 3)
    text[11] = c' '
    if year < 0 or year > 9999:
        year = 9999
    put_two_digits(text + 12, year // 100)
    put_two_digits(text + 14, year % 100)
    text[16] = c' '
    put_two_digits(text + 17, rest // 3600)
    text[19] = c':'
    put_two_digits(text + 20, rest // 60 % 60)
    text[22] = c':'
    put_two_digits(text + 23, rest % 60)
    memcpy(text + 25, b" GMT", 4)


cdef void refresh_date(DateCache* date) noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_REALTIME_COARSE, &now)
    if now.tv_sec != date.now_s:
        date.now_s = now.tv_sec
        format_http_date(now.tv_sec, date.text)


# --- for tests ------------------------------------------------------------------------------------------------------

def http_date(int64_t seconds):
    """The HTTP-date of a time in seconds since the epoch, as bytes."""
    cdef uint8_t[HTTP_DATE_BYTES] text
    format_http_date(seconds, text)
    return (<const char*>text)[:HTTP_DATE_BYTES]


def encoded_path(bytes path):
    """What put_encoded_path makes of ``path``."""
    cdef uint8_t[4096 * 3] buffer
    cdef Writer writer
    writer.position = buffer
    writer.end = buffer + sizeof(buffer)
    writer.overflow = False
    put_encoded_path(&writer, path, <uint32_t>len(path))
    assert not writer.overflow
    return (<const char*>buffer)[:writer.position - buffer]
