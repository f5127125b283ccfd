"""The request parser against RFC 9112 and against the shapes requests are smuggled in."""

import pytest
from kdaemon_pyx import http_body, http_request

HOST = b"Host: example.test\r\n"


def parse(head: bytes, **limits: int) -> dict:
    """Parses whole and byte by byte; both must say the same."""
    whole = http_request.parse(head, **limits)
    assert http_request.parse(head, step=1, **limits) == whole
    return whole


def test_plain_request() -> None:
    head = b"GET /a%20b/c.txt?x=1 HTTP/1.1\r\nHost: example.test:8443\r\nUser-Agent:  curl \r\n"
    head += b"Accept-Encoding: gzip\r\n\r\n"
    request = parse(head + b"GET /next HTTP/1.1\r\n")
    assert request["status"] == 0
    assert request["head_length"] == len(head)
    assert (request["method"], request["version"], request["keep_alive"]) == ("GET", (1, 1), True)
    assert (request["path"], request["target"], request["query"]) == (b"/a b/c.txt", b"/a%20b/c.txt", b"?x=1")
    assert (request["host"], request["user_agent"], request["accept_encoding"]) == (b"example.test", b"curl", b"gzip")
    assert request["range"] is None


def test_incomplete_head_is_not_an_error() -> None:
    head = b"GET / HTTP/1.1\r\n" + HOST + b"\r\n"
    for cut in range(len(head)):
        assert parse(head[:cut]) is None
    assert parse(head)["status"] == 0


def test_one_empty_line_before_the_request_line() -> None:
    head = b"\r\nGET / HTTP/1.1\r\n" + HOST + b"\r\n"
    assert parse(head)["head_length"] == len(head)
    assert parse(b"\r\n" + head)["status"] == 400


@pytest.mark.parametrize(
    ("target", "path", "host"),
    [
        (b"/", b"/", b"example.test"),
        (b"http://other.test/x", b"/x", b"other.test"),
        (b"HTTPS://other.test:444/x?q", b"/x", b"other.test"),
        (b"https://other.test", b"/", b"other.test"),
        (b"https://other.test?q", b"/", b"other.test"),
        (b"https://[::1]:8443/x", b"/x", b"[::1]"),
        (b"/\xc3\xa4", b"/\xc3\xa4", b"example.test"),
        (b"/%C3%a4", b"/\xc3\xa4", b"example.test"),
        (b"/a/%2e%2e/%2E", b"/", b"example.test"),
        (b"//a///b/./c/../d//", b"/a/b/d/", b"example.test"),
        (b"/a/..", b"/", b"example.test"),
        (b"/a/b/.", b"/a/b/", b"example.test"),
        (b"/a%2f..%2f%2fb", b"/b", b"example.test"),
        (b"/.../..a/.b/a..", b"/.../..a/.b/a..", b"example.test"),
        (b"/a/../../b", b"/..", b"example.test"),
        (b"/%2e%2e", b"/..", b"example.test"),
        (b"/a?b?c%00", b"/a", b"example.test"),
    ],
)
def test_targets(target: bytes, path: bytes, host: bytes) -> None:
    request = parse(b"GET " + target + b" HTTP/1.1\r\n" + HOST + b"\r\n")
    assert (request["status"], request["path"], request["host"]) == (0, path, host)


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"GET / HTTP/2.0", 505),
        (b"PRI * HTTP/2.0", 505),
        (b"GET / HTTP/0.9", 505),
        (b"GET /", 400),
        (b"GET", 400),
        (b"GET  / HTTP/1.1", 400),
        (b"GET /  HTTP/1.1", 400),
        (b" GET / HTTP/1.1", 400),
        (b"GET / HTTP/1.1 ", 400),
        (b"GET\t/ HTTP/1.1", 400),
        (b"GET / http/1.1", 400),
        (b"GET / HTTP/1.", 400),
        (b"GET / HTTP/11.1", 400),
        (b"G(T / HTTP/1.1", 400),
        (b"GET /%00 HTTP/1.1", 400),
        (b"GET /%2 HTTP/1.1", 400),
        (b"GET /%zz HTTP/1.1", 400),
        (b"GET /a#b HTTP/1.1", 400),
        (b"GET /a\x00b HTTP/1.1", 400),
        (b"GET /a\rb HTTP/1.1", 400),
        (b"GET /a\x7fb HTTP/1.1", 400),
        (b"GET * HTTP/1.1", 400),
        (b"GET a HTTP/1.1", 400),
        (b"GET ftp://x/ HTTP/1.1", 400),
        (b"GET http:///x HTTP/1.1", 400),
        (b"GET http://us@er/x HTTP/1.1", 400),
        (b"GET https://[::1/x HTTP/1.1", 400),
        (b"CONNECT example.test:443 HTTP/1.1", 405),
        (b"GET /" + b"a" * 4096 + b" HTTP/1.1", 414),
        (b"GET /" + b"a" * 8200 + b" HTTP/1.1", 414),
    ],
)
def test_refused_request_lines(line: bytes, status: int) -> None:
    assert parse(line + b"\r\n" + HOST + b"\r\n")["status"] == status


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        (b"", 400),  # no Host
        (HOST + HOST, 400),
        (b"Host: a b\r\n", 400),
        (b"Host: a/b\r\n", 400),
        (b"Host: a:8x\r\n", 400),
        (HOST + b"X : 1\r\n", 400),  # space before the colon
        (HOST + b"X\t: 1\r\n", 400),
        (HOST + b" X: 1\r\n", 400),
        (HOST + b"X: 1\r\n folded\r\n", 400),  # obs-fold
        (HOST + b"X: 1\r\n\tfolded\r\n", 400),
        (b" " + HOST, 400),
        (HOST + b"X: a\rb\r\n", 400),  # bare CR
        (HOST + b"X: a\r\r\n", 400),
        (HOST + b"X: a\n", 400),  # bare LF
        (HOST + b"X: a\0b\r\n", 400),
        (HOST + b"X: a\x0bb\r\n", 400),
        (HOST + b": a\r\n", 400),
        (HOST + b"X\r\n", 400),
        (HOST + b"X(: a\r\n", 400),
        (HOST + b"Content-Length: 5\r\nContent-Length: 5\r\n", 400),
        (HOST + b"Content-Length: 5\r\nContent-Length: 6\r\n", 400),
        (HOST + b"Content-Length: 5, 5\r\n", 400),
        (HOST + b"Content-Length: +5\r\n", 400),
        (HOST + b"Content-Length: -5\r\n", 400),
        (HOST + b"Content-Length: 0x5\r\n", 400),
        (HOST + b"Content-Length: 5 5\r\n", 400),
        (HOST + b"Content-Length:\r\n", 400),
        (HOST + b"Content-Length: 9999999999999999999999\r\n", 400),
        (HOST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", 400),
        (HOST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", 400),
        (HOST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", 400),
        (HOST + b"Transfer-Encoding: gzip, chunked\r\n", 501),
        (HOST + b"Transfer-Encoding: chunked, identity\r\n", 501),
        (HOST + b"Transfer-Encoding: xchunked\r\n", 501),
        (HOST + b"Transfer-Encoding: \x0bchunked\r\n", 400),
        (HOST + b"Transfer-Encoding : chunked\r\n", 400),
        (HOST + b"X: " + b"a" * 8200 + b"\r\n", 431),
        (HOST + (b"X: " + b"a" * 8000 + b"\r\n") * 5, 431),
        (HOST + b"X: 1\r\n" * 100, 431),
    ],
)
def test_refused_fields(fields: bytes, status: int) -> None:
    assert parse(b"GET / HTTP/1.1\r\n" + fields + b"\r\n")["status"] == status


def test_http_1_0() -> None:
    assert parse(b"GET / HTTP/1.0\r\n\r\n")["keep_alive"] is False
    assert parse(b"GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n")["keep_alive"] is True
    assert parse(b"GET / HTTP/1.0\r\nConnection: keep-alive, close\r\n\r\n")["keep_alive"] is False
    assert parse(b"GET / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n")["status"] == 400


def test_connection_close_and_higher_minor_version() -> None:
    assert parse(b"GET / HTTP/1.1\r\n" + HOST + b"Connection: foo ,\tCLOSE\r\n\r\n")["keep_alive"] is False
    assert parse(b"GET / HTTP/1.1\r\n" + HOST + b"Connection: closed\r\n\r\n")["keep_alive"] is True
    assert parse(b"GET / HTTP/1.9\r\n" + HOST + b"\r\n")["version"] == (1, 1)


def test_repeated_single_fields_are_invalid() -> None:
    request = parse(b"GET / HTTP/1.1\r\n" + HOST + b"Range: bytes=0-1\r\nRange: bytes=2-3\r\n\r\n")
    assert request["range"] == b""


def test_limits_are_exact() -> None:
    line = b"GET /" + b"a" * 50 + b" HTTP/1.1"
    head = line + b"\r\n" + HOST + b"\r\n"
    assert parse(head, request_line_bytes_max=len(line))["status"] == 0
    assert parse(head, request_line_bytes_max=len(line) - 1)["status"] == 414
    assert parse(head, head_bytes_max=len(head))["status"] == 0
    assert parse(head, head_bytes_max=len(head) - 1)["status"] == 431
    assert parse(head, header_line_bytes_max=len(HOST) - 2)["status"] == 0
    assert parse(head, header_line_bytes_max=len(HOST) - 3)["status"] == 431
    assert parse(head, header_count_max=1)["status"] == 0
    assert parse(head, header_count_max=0)["status"] == 431


def discard(body: bytes, **limits: int) -> tuple[int, bool]:
    whole = http_body.discard(body, **limits)
    bytewise = http_body.discard(body, step=1, **limits)
    assert bytewise == whole
    return whole


@pytest.mark.parametrize(
    ("body", "consumed"),
    [
        (b"0\r\n\r\n", 5),
        (b"5\r\nhello\r\n0\r\n\r\n", 15),
        (b'5;a=b;c="d"\r\nhello\r\n000\r\nTrailer: x\r\nOther: y\r\n\r\n', 49),
        (b"A\r\n0123456789\r\n0\r\n\r\nGET / HTTP/1.1\r\n", 20),
    ],
)
def test_chunked_bodies(body: bytes, consumed: int) -> None:
    assert discard(body) == (consumed, True)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"\r\n", 400),
        (b"g\r\n", 400),
        (b" 5\r\nhello\r\n", 400),
        (b"5 \r\nhello\r\n", 400),
        (b"5\nhello\r\n", 400),
        (b"5\r\nhello0\r\n\r\n", 400),
        (b"5\r\nhello\n0\r\n\r\n", 400),
        (b"-1\r\n", 400),
        (b"0x5\r\n", 400),
        (b"ffffffffffffffffffff\r\n", 400),
        (b"5;\n\r\nhello\r\n", 400),
        (b"0\r\nX: a\nb\r\n\r\n", 400),
        (b"0\r\n" + b"X: " + b"a" * 2000 + b"\r\n\r\n", 400),
        (b"5;" + b"a" * 2000 + b"\r\nhello", 400),
        (b"fffffff\r\n", 413),
        (b"1\r\na\r\n" * 100, 413),
    ],
)
def test_refused_chunked_bodies(body: bytes, status: int) -> None:
    assert discard(body, body_bytes_max=99) == (-status, False)
