"""Preconditions and ranges (RFC 9110 sections 13 and 14), decided from the request's fields and one set of validators."""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcmp, memset

from kdaemon_pyx.http_conditional cimport MTIME_NONE, RANGES_BOUND, ByteRange, Validators
from kdaemon_pyx.http_grammar cimport equals_ignoring_case
from kdaemon_pyx.http_request cimport HttpRequest, Slice, next_field

cdef const char* MONTHS = b"JanFebMarAprMayJunJulAugSepOctNovDec"


cdef inline uint32_t skip_spaces(Slice text, uint32_t i) noexcept nogil:
    while i < text.length and (text.data[i] == c' ' or text.data[i] == c'\t'):
        i += 1
    return i


cdef bint etag_list_matches(Slice value, const Validators* validators, bint strong) noexcept nogil:
    # "*" or #entity-tag (section 13.1.1, 13.1.2). A malformed list matches nothing.
    cdef uint32_t i = skip_spaces(value, 0)
    cdef uint32_t start
    cdef bint weak
    if value.length == i + 1 and value.data[i] == c'*':
        return True
    while i < value.length:
        while i < value.length and (value.data[i] == c',' or value.data[i] == c' ' or value.data[i] == c'\t'):
            i += 1
        weak = value.length - i >= 2 and value.data[i] == c'W' and value.data[i + 1] == c'/'
        if weak:
            i += 2
        if i >= value.length or value.data[i] != c'"':
            return False
        start = i
        i += 1
        while i < value.length and value.data[i] != c'"':
            i += 1
        if i == value.length:
            return False
        i += 1
        if (
            i - start == validators.etag.length
            and memcmp(value.data + start, validators.etag.data, validators.etag.length) == 0
            and not (strong and (weak or validators.etag_weak))
        ):
            return True
    return False


cdef bint field_matches(
    const HttpRequest* request, Slice value, bint repeated, const char* name, uint32_t name_length,
    const Validators* validators, bint strong
) noexcept nogil:
    cdef uint32_t cursor = 0
    if not repeated:
        return etag_list_matches(value, validators, strong)
    while next_field(&request.fields, name, name_length, &cursor, &value):
        if etag_list_matches(value, validators, strong):
            return True
    return False


cdef int evaluate_preconditions(const HttpRequest* request, const Validators* validators) noexcept nogil:
    cdef int64_t seconds
    if request.if_match.data != NULL:
        if not field_matches(
            request, request.if_match, request.if_match_repeated, b"if-match", 8, validators, True
        ):
            return 412
    elif request.if_unmodified_since.data != NULL:
        if (
            parse_http_date(request.if_unmodified_since, validators.now_s, &seconds)
            and validators.mtime_s > seconds
        ):
            return 412
    if request.if_none_match.data != NULL:
        if field_matches(
            request, request.if_none_match, request.if_none_match_repeated, b"if-none-match", 13, validators, False
        ):
            return 304
    elif request.if_modified_since.data != NULL:
        if (
            parse_http_date(request.if_modified_since, validators.now_s, &seconds)
            and validators.mtime_s <= seconds and validators.mtime_s != MTIME_NONE
        ):
            return 304
    return 0


cdef bint if_range_holds(Slice value, const Validators* validators) noexcept nogil:
    # Section 13.1.5: strong comparison, for dates too.
    cdef int64_t seconds
    if value.length != 0 and (value.data[0] == c'"' or value.data[0] == c'W'):
        return (
            not validators.etag_weak and value.length == validators.etag.length
            and memcmp(value.data, validators.etag.data, value.length) == 0
        )
    return (
        parse_http_date(value, validators.now_s, &seconds)
        and seconds == validators.mtime_s and validators.mtime_s < validators.now_s
    )


cdef bint parse_digits(Slice text, uint32_t* i, uint64_t* value) noexcept nogil:
    # False: no digit here. Numbers that do not fit are taken as the largest: they lie behind every end.
    cdef uint32_t start = i[0]
    cdef uint64_t total = 0
    while i[0] < text.length and text.data[i[0]] >= c'0' and text.data[i[0]] <= c'9':
        if total > <uint64_t>922337203685477579:
            total = <uint64_t>922337203685477579
        total = total * 10 + (text.data[i[0]] - c'0')
        i[0] += 1
    value[0] = total
    return i[0] != start


cdef int select_ranges(
    const HttpRequest* request, const Validators* validators, uint64_t size, uint32_t ranges_max, ByteRange* ranges
) noexcept nogil:
    cdef Slice text = request.range
    cdef uint32_t i = 6
    cdef uint32_t count = 0
    cdef bint any_spec = False
    cdef uint64_t first, last
    cdef uint64_t total = 0
    if text.data == NULL or text.length < 6 or not equals_ignoring_case(text.data, 6, b"bytes=", 6):
        return 0
    if request.if_range.data != NULL and not if_range_holds(request.if_range, validators):
        return 0
    if ranges_max > RANGES_BOUND:
        ranges_max = RANGES_BOUND
    while True:
        while i < text.length and (text.data[i] == c',' or text.data[i] == c' ' or text.data[i] == c'\t'):
            i += 1
        if i == text.length:
            break
        any_spec = True
        if parse_digits(text, &i, &first):                 # int-range
            if i == text.length or text.data[i] != c'-':
                return 0
            i += 1
            if parse_digits(text, &i, &last):
                if last < first:
                    return 0
            else:
                last = size
            if last >= size:
                last = size - 1                            # not used when size is 0: first >= size then
        else:                                              # suffix-range
            if text.data[i] != c'-':
                return 0
            i += 1
            if not parse_digits(text, &i, &last):
                return 0
            first = size if last == 0 else (size - last if last < size else 0)
            last = size - 1
        i = skip_spaces(text, i)
        if i < text.length and text.data[i] != c',':
            return 0
        if first >= size:
            continue
        if count == ranges_max:
            return 0
        ranges[count].first = first
        ranges[count].length = last - first + 1
        total += ranges[count].length
        count += 1
    if not any_spec:
        return 0
    if count == 0:
        return -416
    if count > 1 and total > size:                         # section 14.2: overlapping ranges cost more than the whole
        return 0
    return <int>count


cdef bint take_number(Slice text, uint32_t* i, uint32_t digits, int64_t* value) noexcept nogil:
    cdef uint32_t _n
    if text.length - i[0] < digits:
        return False
    value[0] = 0
    for _n in range(digits):
        if text.data[i[0]] < c'0' or text.data[i[0]] > c'9':
            return False
        value[0] = value[0] * 10 + (text.data[i[0]] - c'0')
        i[0] += 1
    return True


cdef bint take_literal(Slice text, uint32_t* i, const char* literal, uint32_t length) noexcept nogil:
    if text.length - i[0] < length or memcmp(text.data + i[0], literal, length) != 0:
        return False
    i[0] += length
    return True


cdef bint take_month(Slice text, uint32_t* i, int64_t* month) noexcept nogil:
    cdef int m
    if text.length - i[0] < 3:
        return False
    for m in range(12):
        if memcmp(text.data + i[0], MONTHS + 3 * m, 3) == 0:
            month[0] = m + 1
            i[0] += 3
            return True
    return False


cdef bint take_time(Slice text, uint32_t* i, int64_t* seconds) noexcept nogil:
    cdef int64_t hour, minute, second
    if not (
        take_number(text, i, 2, &hour) and take_literal(text, i, b":", 1)
        and take_number(text, i, 2, &minute) and take_literal(text, i, b":", 1)
        and take_number(text, i, 2, &second)
    ):
        return False
    if hour > 23 or minute > 59 or second > 60:
        return False
    seconds[0] = hour * 3600 + minute * 60 + second
    return True


cdef int64_t days_from_civil(int64_t year, int64_t month, int64_t day) noexcept nogil:
    cdef int64_t era, year_of_era, day_of_year
    if month <= 2:
        year -= 1
    era = year // 400                                       # years here are 0 to 9999
    year_of_era = year - era * 400
    day_of_year = (153 * (month - 3 if month > 2 else month + 9) + 2) // 5 + day - 1
    return era * 146097 + year_of_era * 365 + year_of_era // 4 - year_of_era // 100 + day_of_year - 719468


cdef bint parse_http_date(Slice text, int64_t now_s, int64_t* seconds) noexcept nogil:
    cdef uint32_t i = 0
    cdef int64_t day = 0, month = 0, year = 0, time_of_day = 0
    cdef bint ok
    while i < text.length and ((text.data[i] | 0x20) >= c'a' and (text.data[i] | 0x20) <= c'z'):
        i += 1                                             # the day's name says nothing new
    if i < 3:
        return False
    if i == 3 and take_literal(text, &i, b", ", 2):        # Sun, 06 Nov 1994 08:49:37 GMT
        ok = (
            take_number(text, &i, 2, &day) and take_literal(text, &i, b" ", 1) and take_month(text, &i, &month)
            and take_literal(text, &i, b" ", 1) and take_number(text, &i, 4, &year)
            and take_literal(text, &i, b" ", 1) and take_time(text, &i, &time_of_day)
            and take_literal(text, &i, b" GMT", 4)
        )
    elif i > 3 and take_literal(text, &i, b", ", 2):       # Sunday, 06-Nov-94 08:49:37 GMT
        ok = (
            take_number(text, &i, 2, &day) and take_literal(text, &i, b"-", 1) and take_month(text, &i, &month)
            and take_literal(text, &i, b"-", 1) and take_number(text, &i, 2, &year)
            and take_literal(text, &i, b" ", 1) and take_time(text, &i, &time_of_day)
            and take_literal(text, &i, b" GMT", 4)
        )
        # A year that seems more than 50 years ahead is the last one past with those digits.
        year += 1970 + now_s // 31556952 - (1970 + now_s // 31556952) % 100
        if year > 1970 + now_s // 31556952 + 50:
            year -= 100
    else:                                                  # Sun Nov  6 08:49:37 1994
        ok = (
            i == 3 and take_literal(text, &i, b" ", 1) and take_month(text, &i, &month)
            and take_literal(text, &i, b" ", 1)
            and (
                take_number(text, &i, 1, &day) if take_literal(text, &i, b" ", 1) else take_number(text, &i, 2, &day)
            )
            and take_literal(text, &i, b" ", 1) and take_time(text, &i, &time_of_day)
            and take_literal(text, &i, b" ", 1) and take_number(text, &i, 4, &year)
        )
    if not ok or i != text.length or day < 1 or day > 31:
        return False
    seconds[0] = days_from_civil(year, month, day) * 86400 + time_of_day
    return True


# --- for tests ------------------------------------------------------------------------------------------------------

def parse_date(bytes text, int64_t now_s):
    """The HTTP-date ``text`` in seconds since the epoch; None: not a date."""
    cdef Slice slice
    cdef int64_t seconds
    slice.data = text
    slice.length = <uint32_t>len(text)
    return seconds if parse_http_date(slice, now_s, &seconds) else None


def ranges(bytes field, uint64_t size, uint32_t ranges_max=16):
    """The ranges of a Range field: a list of (first, length); [] for the whole; None for 416."""
    cdef HttpRequest request
    cdef Validators validators
    cdef ByteRange[RANGES_BOUND] found
    cdef int count
    memset(&request, 0, sizeof(request))
    memset(&validators, 0, sizeof(validators))
    request.range.data = field
    request.range.length = <uint32_t>len(field)
    count = select_ranges(&request, &validators, size, ranges_max, found)
    return None if count < 0 else [(found[i].first, found[i].length) for i in range(count)]
