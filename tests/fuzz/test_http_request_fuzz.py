"""The request parser on generated heads: any split of the input gives the same answer, and nothing odd is accepted."""

import re

from hypothesis import example, given, settings
from hypothesis import strategies as st
from kdaemon_pyx import http_body, http_request

LIMITS = {"request_line_bytes_max": 60, "header_line_bytes_max": 50, "head_bytes_max": 200, "header_count_max": 6}

line_ends = st.sampled_from([b"\r\n"] * 12 + [b"\n", b"\r", b"\r\r\n", b""])
pieces = st.sampled_from(
    [
        b"GET",
        b"HEAD",
        b"POST",
        b" ",
        b" ",
        b"/",
        b"/a%20b",
        b"/%00",
        b"*",
        b"http://h/",
        b" HTTP/1.1",
        b" HTTP/1.0",
        b" HTTP/2.0",
        b"\t",
        b"\0",
        b"\r",
        b"\n",
        b"#",
        b"?q",
        b"\xff",
        b"a" * 70,
    ]
)
request_lines = st.one_of(
    st.just(b"GET / HTTP/1.1"),
    st.just(b"GET /x?y HTTP/1.0"),
    st.lists(pieces, max_size=6).map(b"".join),
    st.binary(max_size=20),
)
field_lines = st.one_of(
    st.sampled_from(
        [
            b"Host: a",
            b"Host: b:1",
            b"host:[::1]:2",
            b"Content-Length: 3",
            b"Content-Length: 03",
            b"Transfer-Encoding: chunked",
            b"Transfer-Encoding: gzip",
            b"Connection: close",
            b"Connection: keep-alive",
            b"X: y",
            b"X : y",
            b" folded",
            b"X:\x01",
            b"Range: bytes=0-",
            b"Expect: 100-continue",
            b"X: " + b"a" * 60,
        ]
    ),
    st.binary(max_size=20),
)


@st.composite
def heads(draw: st.DrawFn) -> bytes:
    data = draw(st.sampled_from([b"", b"\r\n", b"\r\n\r\n"])) if draw(st.booleans()) else b""
    data += draw(request_lines) + draw(line_ends)
    for line in draw(st.lists(field_lines, max_size=8)):
        data += line + draw(line_ends)
    return data + draw(line_ends) + draw(st.binary(max_size=8))


@settings(max_examples=1500, deadline=None)
@given(head=st.one_of(heads(), st.binary(max_size=300)), step=st.integers(1, 40))
@example(head=b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X" * 51 + b"\n", step=1)
@example(head=b"\r\n" * 3, step=1)
def test_any_split_gives_the_same_answer(head: bytes, step: int) -> None:
    whole = http_request.parse(head, **LIMITS)
    assert http_request.parse(head, step=1, **LIMITS) == whole
    assert http_request.parse(head, step=step, **LIMITS) == whole
    if whole is not None and whole["status"] == 0:
        assert_well_formed(head[: whole["head_length"]], whole)


def assert_well_formed(head: bytes, request: dict) -> None:
    """What was accepted, looked at again by a reader that works differently: whole lines and regular expressions."""
    lines = head.removeprefix(b"\r\n").split(b"\r\n")
    assert lines[-2:] == [b"", b""]
    for line in lines:
        assert not re.search(rb"[\x00-\x08\x0a-\x1f\x7f]", line)
    for line in lines[1:-2]:
        assert re.match(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:", line)
    names = [line.split(b":")[0].lower() for line in lines[1:-2]]
    assert names.count(b"content-length") + names.count(b"transfer-encoding") <= 1
    assert names.count(b"host") == 1 or (request["version"] == (1, 0) and b"host" not in names)
    assert b"\0" not in request["path"]


chunks = st.lists(
    st.one_of(
        st.binary(min_size=1, max_size=20).map(lambda data: b"%x\r\n%s\r\n" % (len(data), data)),
        st.sampled_from(
            [b"0\r\n\r\n", b"0\r\nT: x\r\n\r\n", b"1;e=f\r\na\r\n", b"2\r\na\r\n", b"\r\n", b"1\na\n", b"z"]
        ),
    ),
    max_size=8,
).map(b"".join)


@settings(max_examples=1000, deadline=None)
@given(body=st.one_of(chunks, st.binary(max_size=60)), step=st.integers(1, 9))
def test_any_split_of_a_chunked_body_gives_the_same_answer(body: bytes, step: int) -> None:
    whole = http_body.discard(body, body_bytes_max=64)
    assert http_body.discard(body, step=step, body_bytes_max=64) == whole
