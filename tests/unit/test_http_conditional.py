"""HTTP-dates and byte ranges of RFC 9110; how they are used is tested through the file service."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kdaemon_pyx import http_conditional

NOW_S = 1_700_000_000  # November 2023


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (b"Sun, 06 Nov 1994 08:49:37 GMT", 784111777),
        (b"Sunday, 06-Nov-94 08:49:37 GMT", 784111777),
        (b"Sun Nov  6 08:49:37 1994", 784111777),
        (b"Sun Nov 16 08:49:37 1994", 784975777),
        (b"Thursday, 01-Jan-70 00:00:00 GMT", 3155760000),
        (b"Thursday, 01-Jan-73 00:00:00 GMT", 3250454400),  # 50 years ahead at most
        (b"Friday, 01-Jan-74 00:00:00 GMT", 126230400),
        (b"Sun, 06 Nov 1994 08:49:37 UTC", None),
        (b"Sun, 06 Nov 1994 08:49:37 GMT ", None),
        (b"Sun, 06 Nov 1994 24:49:37 GMT", None),
        (b"Sun, 06 Nox 1994 08:49:37 GMT", None),
        (b"Sun, 6 Nov 1994 08:49:37 GMT", None),
        (b"784111777", None),
        (b"", None),
        (b"Sun", None),
        (b"Sun,", None),
    ],
)
def test_dates(text: bytes, seconds: int | None) -> None:
    assert http_conditional.parse_date(text, NOW_S) == seconds


@given(st.binary(max_size=40))
def test_any_bytes_are_a_date_or_not(text: bytes) -> None:
    seconds = http_conditional.parse_date(text, NOW_S)
    assert seconds is None or isinstance(seconds, int)


WHOLE: list[tuple[int, int]] = []


@pytest.mark.parametrize(
    ("field", "size", "expected"),
    [
        (b"bytes=0-0", 10, [(0, 1)]),
        (b"bytes=0-", 10, [(0, 10)]),
        (b"bytes=3-7", 10, [(3, 5)]),
        (b"bytes=3-99", 10, [(3, 7)]),
        (b"bytes=3-99999999999999999999999", 10, [(3, 7)]),
        (b"bytes=-3", 10, [(7, 3)]),
        (b"bytes=-30", 10, [(0, 10)]),
        (b"BYTES=1-2", 10, [(1, 2)]),
        (b"bytes= 1-2 ,\t4-5 ,", 10, [(1, 2), (4, 2)]),
        (b"bytes=5-6,1-2", 10, [(5, 2), (1, 2)]),
        (b"bytes=1-2,10-", 10, [(1, 2)]),
        (b"bytes=4294967296-4294967297", 1 << 33, [(4294967296, 2)]),
        (b"bytes=10-", 10, None),
        (b"bytes=10-12,20-30", 10, None),
        (b"bytes=-0", 10, None),
        (b"bytes=0-", 0, None),
        (b"bytes=-1", 0, None),
        (b"bytes=0-,0-", 10, WHOLE),  # more than the whole
        (b"bytes=2-1", 10, WHOLE),
        (b"bytes=", 10, WHOLE),
        (b"bytes=,", 10, WHOLE),
        (b"bytes=a-b", 10, WHOLE),
        (b"bytes=1", 10, WHOLE),
        (b"bytes=1-2-3", 10, WHOLE),
        (b"bytes=-", 10, WHOLE),
        (b"bytes=--1", 10, WHOLE),
        (b"bytes=1-2;3-4", 10, WHOLE),
        (b"bytes 1-2", 10, WHOLE),
        (b"lines=1-2", 10, WHOLE),
        (b"", 10, WHOLE),
        (b"bytes=" + b"0-0," * 17, 100, WHOLE),  # more than ranges_max
    ],
)
def test_ranges(field: bytes, size: int, expected: list[tuple[int, int]] | None) -> None:
    assert http_conditional.ranges(field, size) == expected


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)).map(lambda r: b"%d-%d" % r), max_size=5)
    .map(b",".join)
    .map(b"bytes=".__add__),
    st.integers(0, 25),
)
def test_ranges_lie_in_the_file(field: bytes, size: int) -> None:
    found = http_conditional.ranges(field, size)
    for first, length in found or []:
        assert length > 0
        assert first + length <= size
