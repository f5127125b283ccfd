"""Dates and encoded paths as they appear in responses."""

from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st
from kdaemon_pyx import http_conditional, http_response

NOW_S = 1_700_000_000


@given(st.integers(-62_000_000_000, 253_402_300_799))
def test_dates_are_those_of_datetime(seconds: int) -> None:
    moment = datetime.fromtimestamp(seconds, UTC)
    expected = f"{moment:%a, %d %b} {moment.year:04d} {moment:%H:%M:%S} GMT".encode()
    assert http_response.http_date(seconds) == expected
    assert http_conditional.parse_date(expected, NOW_S) == seconds


def test_encoded_paths_cannot_name_another_host() -> None:
    assert http_response.encoded_path(b"//evil.test/x") == b"/evil.test/x"
    assert http_response.encoded_path(b"/\\evil.test") == b"/%5Cevil.test"
    assert http_response.encoded_path(b"/a b/\xc3\xa4?#\r\n") == b"/a%20b/%C3%A4%3F%23%0D%0A"
