"""Files through a real daemon, with curl and Python's ssl: what the unit tests say of the session, seen on the wire."""

from __future__ import annotations

import hashlib
import os
import select
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.certificates import Issued
from support.clients import MemoryClient
from support.content import pattern
from support.curl import curl, exchange, get
from support.daemon import Daemon, serve
from support.http import read_responses
from support.waiting import eventually

LARGE = pattern((3 << 20) + 17)
HEADER_DEADLINE_MS = 1000


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("outer") / "site"
    (root / "sub").mkdir(parents=True)
    (root.parent / "outside.txt").write_text("secret")
    (root / "index.html").write_bytes(b"<p>index")
    (root / "sub" / "index.html").write_bytes(b"<p>sub")
    (root / "large.bin").write_bytes(LARGE)
    (root / "empty.txt").write_bytes(b"")
    (root / "ä b.txt").write_bytes(b"umlaut")
    (root / ".hidden").write_text("hidden")
    (root / "link-out").symlink_to("../outside.txt")
    (root / "link-in").symlink_to("sub/index.html")
    os.mkfifo(root / "fifo")
    (root / os.fsdecode(b"\xff\xfe.txt")).write_bytes(b"no utf-8")
    with (root / "huge.bin").open("wb") as huge:
        huge.truncate(5 << 30)
        huge.seek((5 << 30) - 4)
        huge.write(b"tail")
    return root


@pytest.fixture(scope="module")
def server(root: Path, issued: Issued) -> Iterator[Daemon]:
    with serve(root, "--workers", "2", issued=issued) as daemon:
        yield daemon


def test_whole_files(server: Daemon) -> None:
    assert curl(server, "/large.bin").body == LARGE
    assert curl(server, "/").body == b"<p>index"
    empty = curl(server, "/empty.txt")
    assert (empty.status, empty.body, empty.headers["content-type"]) == (200, b"", "text/plain")
    assert curl(server, "/%C3%A4%20b.txt").body == b"umlaut"
    assert curl(server, "/link-in").body == b"<p>sub"
    assert curl(server, "/%ff%fe.txt").body == b"no utf-8"
    for target in ("//sub/./index.html", "/sub/../index.html/../sub/", "/none/%2e%2e/sub/index.html"):
        assert curl(server, target).body == b"<p>sub"


def test_head_options_and_other_methods(server: Daemon) -> None:
    head = curl(server, "/large.bin", "--head")
    assert head.headers["content-length"] == str(len(LARGE))
    assert curl(server, "/large.bin", "-X", "OPTIONS").status == 204
    for method in ("TRACE", "DELETE", "PUT"):
        refused = curl(server, "/large.bin", "-X", method)
        assert (refused.status, refused.headers["allow"]) == (405, "GET, HEAD, OPTIONS")
    posted = curl(server, "/", "--data-binary", "x" * 5000)
    assert posted.status == 405


def test_directories(server: Daemon) -> None:
    moved = curl(server, "/sub?q=1")
    assert (moved.status, moved.headers["location"]) == (301, "/sub/?q=1")
    assert curl(server, "/sub", "--location").body == b"<p>sub"
    assert curl(server, "//sub").headers["location"] == "/sub/"
    assert curl(server, "/..%5Csub/").status == 404


def test_ranges(server: Daemon) -> None:
    for value, first, last in (("0-0", 0, 0), ("1000000-2000000", 1_000_000, 2_000_000), ("-5", len(LARGE) - 5, None)):
        part = curl(server, "/large.bin", "--range", value)
        assert part.status == 206
        assert part.body == LARGE[first : None if last is None else last + 1]
    assert curl(server, "/large.bin", "--range", f"{len(LARGE)}-").status == 416
    assert curl(server, "/huge.bin", "--range", f"{(5 << 30) - 6}-").body == b"\0\0tail"
    several = curl(server, "/large.bin", "--range", "0-9,500000-1500000,-3")
    assert several.headers["content-type"].startswith("multipart/byteranges; boundary=")
    for piece in (LARGE[:10], LARGE[500_000:1_500_001], LARGE[-3:]):
        assert b"\r\n\r\n" + piece + b"\r\n--" in several.body


def test_ranges_that_are_none(server: Daemon) -> None:
    for value in ("items=0-1", "bytes=5-2", "bytes=a-b", "bytes=", "bytes=0-9,", "bytes=" + ",".join(["0-0"] * 1000)):
        whole = curl(server, "/large.bin", "-H", f"Range: {value}")
        assert whole.status == (206 if value == "bytes=0-9," else 200), value
    for value in ("bytes=-0", "bytes=99999999999999999999-"):
        refused = curl(server, "/large.bin", "-H", f"Range: {value}")
        assert (refused.status, refused.headers["content-range"]) == (416, f"bytes */{len(LARGE)}")
    for value in ("0-", "0-5", "-1"):
        assert curl(server, "/empty.txt", "--range", value).status == 200
    assert curl(server, "/large.bin", "--head", "--range", "0-4").status == 200
    backwards = curl(server, "/large.bin", "--range", "9-9,3-4")
    assert backwards.body.index(LARGE[9:10] + b"\r\n--") < backwards.body.index(LARGE[3:5] + b"\r\n--")
    assert len(backwards.body) == int(backwards.headers["content-length"])


def test_conditions(server: Daemon) -> None:
    first = curl(server, "/large.bin", "--head").headers
    tag, date = first["etag"], first["last-modified"]
    past, junk = "Thu, 01 Jan 1970 00:00:00 GMT", "yesterday"
    for fields, status in {
        (f"If-None-Match: {tag}",): 304,
        (f'If-None-Match: "x", W/{tag}',): 304,
        ("If-None-Match: *",): 304,
        ('If-None-Match: "x"', f"If-Modified-Since: {date}"): 200,
        (f"If-None-Match: {tag}", f"If-Modified-Since: {past}"): 304,
        (f"If-Modified-Since: {date}",): 304,
        (f"If-Modified-Since: {past}",): 200,
        (f"If-Modified-Since: {junk}",): 200,
        ('If-Match: "other"',): 412,
        (f"If-Match: W/{tag}",): 412,
        (f'If-Match: "x", {tag}',): 200,
        ("If-Match: *",): 200,
        (f"If-Match: {tag}", f"If-Unmodified-Since: {past}"): 200,
        ('If-Match: "x"', f"If-None-Match: {tag}"): 412,
        (f"If-Match: {tag}", f"If-None-Match: {tag}"): 304,
        (f"If-Unmodified-Since: {date}",): 200,
        (f"If-Unmodified-Since: {past}",): 412,
        (f"If-Unmodified-Since: {junk}",): 200,
        ("Range: bytes=5-", f"If-Range: {tag}"): 206,
        ("Range: bytes=5-", f"If-Range: W/{tag}"): 200,
        ("Range: bytes=5-", f"If-Range: {date}"): 206,
        ("Range: bytes=5-", f"If-Range: {past}"): 200,
        ("Range: bytes=99999999-", 'If-Range: "x"'): 200,
        ("Range: bytes=5-", f"If-None-Match: {tag}"): 304,
        ("Range: bytes=99999999-", 'If-Match: "x"'): 412,
    }.items():
        response = curl(server, "/large.bin", *(part for field in fields for part in ("-H", field)))
        assert response.status == status, fields
        if status == 304:
            assert (response.headers["etag"], response.body) == (tag, b"")
            assert "content-type" not in response.headers
        if status == 206:
            assert response.body == LARGE[5:]
    assert curl(server, "/nothing", "-H", "If-None-Match: *").status == 404
    forms = (f"{past}", "Sunday, 06-Nov-94 08:49:37 GMT", "Thu Jan  1 00:00:00 1970")
    assert [curl(server, "/large.bin", "-H", f"If-Unmodified-Since: {form}").status for form in forms] == [412] * 3


@pytest.mark.parametrize(
    ("target", "statuses"),
    [
        ("/nothing", {404}),
        ("/.hidden", {404}),
        ("/../outside.txt", {403}),
        ("/%2e%2e/outside.txt", {403}),
        ("/..%2foutside.txt", {403}),
        ("/sub/../../outside.txt", {403}),
        ("/link-out", {403}),
        ("/%00", {400}),
        ("/%zz", {400}),
        ("/index.html/", {404}),
        ("/fifo", {403}),
        ("/" + "a" * 5000, {414}),
        ("/" + "a" * 9000, {414}),
    ],
)
def test_refused_targets(server: Daemon, target: str, statuses: set[int]) -> None:
    response = curl(server, target)
    assert response.status in statuses
    assert b"secret" not in response.body
    assert response.headers["content-type"].startswith("text/plain")


def test_expect_continue_and_bodies(server: Daemon, root: Path) -> None:
    expecting = curl(server, "/", "-X", "GET", "-H", "Expect: 100-continue", "--data-binary", "x" * 2000)
    assert expecting.status == 200
    chunked = curl(server, "/", "-X", "GET", "-H", "Transfer-Encoding: chunked", "--data-binary", "x" * 2000)
    assert chunked.status == 200
    assert curl(server, "/", "--http1.0").status == 200
    assert curl(server, "/", "--data-binary", "@" + str(Path(__file__))).status == 405
    chunks = ("-X", "GET", "-H", "Transfer-Encoding: chunked", "--data-binary", "@" + str(root / "large.bin"))
    assert curl(server, "/", *chunks).status == 413
    assert curl(server, "/", *chunks[:4], "-H", "Expect: tea", "--data-binary", "x").status == 417


def test_absolute_targets_and_old_versions(server: Daemon) -> None:
    assert curl(server, "/", "--request-target", "https://localhost/sub/").body == b"<p>sub"
    assert curl(server, "/", "--request-target", "*", "-X", "OPTIONS").status == 204
    assert curl(server, "/", "--request-target", "localhost:443", "-X", "CONNECT").status == 405
    kept = exchange(server, b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET / HTTP/1.0\r\n\r\n")
    assert [r.headers["connection"] for r in read_responses(kept)] == ["keep-alive", "close"]


def test_pipelined_requests_of_all_sizes(server: Daemon) -> None:
    stream = get("/large.bin") + get("/") + get("/nothing") + get("/large.bin") + get("/sub/", "Connection: close")
    responses = read_responses(exchange(server, stream))
    assert [r.status for r in responses] == [200, 200, 404, 200, 200]
    assert responses[0].body == responses[3].body == LARGE
    assert responses[4].headers["connection"] == "close"


def test_chunked_bodies_are_discarded(server: Daemon) -> None:
    chunked = get("/", "Transfer-Encoding: chunked") + b'3 ; a="b;c"\r\nabc\r\n00;d\r\nTrailer: x\r\n\r\n'
    responses = read_responses(exchange(server, chunked + chunked + get("/sub/", "Connection: close")))
    assert [r.body for r in responses] == [b"<p>index", b"<p>index", b"<p>sub"]


def test_many_requests_on_one_connection(server: Daemon) -> None:
    responses = read_responses(exchange(server, get("/") * 500 + get("/", "Connection: close")))
    assert [r.status for r in responses] == [200] * 501


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (get("/")[:-2] + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\nx", 400),
        (get("/")[:-2] + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (get("/")[:-2] + b"Transfer-Encoding : chunked\r\n\r\n", 400),
        (get("/")[:-2] + b"X: a\r\n b\r\n\r\n", 400),
        (get("/")[:-2] + b"X: a\rb\r\n\r\n", 400),
        (b"GET / HTTP/1.1\nHost: a\n\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
        (get("/")[:-2] + b"X: " + b"a" * 8200 + b"\r\n\r\n", 431),
        (get("/")[:-2] + (b"X: " + b"a" * 7000 + b"\r\n") * 5 + b"\r\n", 431),
        (get("/")[:-2] + b"X: a\r\n" * 101 + b"\r\n", 431),
        (get("/")[:-2] + b"Content-Length: 9999999\r\n\r\n", 413),
        (get("/")[:-2] + b"Transfer-Encoding: gzip\r\n\r\n", 501),
        (get("/")[:-2] + b"Transfer-Encoding: chunked, identity\r\n\r\n", 501),
        (get("/")[:-2] + b"Host: localhost\r\n\r\n", 400),
        (get("/")[:-2] + b"Content-Length: +1\r\n\r\nx", 400),
        (get("/")[:-2] + b"X: a\0b\r\n\r\n", 400),
        (get("/")[:-2] + b"X\xe4: a\r\n\r\n", 400),
        (get("/")[:-2] + b"X: a\nY: b\r\n\r\n", 400),
        (get("/", "Transfer-Encoding: chunked") + b"0x1\r\na\r\n0\r\n\r\n", 400),
        (get("/", "Transfer-Encoding: chunked") + b"1\r\nab\r\n0\r\n\r\n", 400),
        (get("/", "Transfer-Encoding: chunked") + b"1 \r\na\r\n0\r\n\r\n", 400),
        (get("/", "Transfer-Encoding: chunked") + b"1\na\n0\n\n", 400),
        (get("/", "Transfer-Encoding: chunked") + b"ffffffff\r\n", 413),
    ],
)
def test_what_is_refused_is_answered_and_closed(server: Daemon, request_bytes: bytes, status: int) -> None:
    responses = read_responses(exchange(server, request_bytes + get("/")))
    assert [r.status for r in responses] == [status]
    assert responses[0].headers["connection"] == "close"


def test_a_head_in_single_bytes(server: Daemon) -> None:
    with MemoryClient(server.address, server.ca) as client:
        client.handshake(send_finished=True)
        for byte in get("/sub/", "Connection: close"):
            client.tls.write(bytes([byte]))
            client.send()
        response = client.response()
    assert (response.status, response.body, response.truncated) == (200, b"<p>sub", False)


def test_a_slow_head_is_408(root: Path, issued: Issued, tmp_path: Path) -> None:
    config = tmp_path / "kdaemon.toml"
    config.write_text(f"[deadlines]\nheader_ms = {HEADER_DEADLINE_MS}\n")
    with (
        serve(root, "--workers", "1", "--config", str(config), issued=issued) as daemon,
        MemoryClient(daemon.address, daemon.ca) as client,
    ):
        client.handshake(send_finished=True)
        client.tls.write(b"GET / HTTP/1.1\r\n")
        client.send()
        response = client.response()
        assert (response.status, response.truncated) == (408, False)


def test_a_head_that_only_trickles_is_408(root: Path, issued: Issued, tmp_path: Path) -> None:
    """Single bytes do not renew the deadline: it counts from the head's first byte."""
    config = tmp_path / "kdaemon.toml"
    config.write_text(f"[deadlines]\nheader_ms = {HEADER_DEADLINE_MS}\n")
    head = get("/")[:-2] + b"X: " + b"a" * 200
    with (
        serve(root, "--workers", "1", "--config", str(config), issued=issued) as daemon,
        MemoryClient(daemon.address, daemon.ca) as client,
    ):
        client.handshake(send_finished=True)
        for byte in head:
            client.tls.write(bytes([byte]))
            client.send()
            if answered(client, HEADER_DEADLINE_MS / 1000 / 8):
                break
        else:
            pytest.fail("each byte renewed the deadline")


def answered(client: MemoryClient, wait_s: float) -> bool:
    """True if the response begins, and with 408, within this time; bytes without application data are taken in."""
    while select.select([client.socket], [], [], wait_s)[0]:
        assert client.receive(), "closed without an answer"
        try:
            start = client.tls.read(65536)
        except ssl.SSLWantReadError:
            continue
        assert start.startswith(b"HTTP/1.1 408 ")
        return True
    return False


def test_a_reader_that_stops_costs_no_memory_and_holds_nobody_up(server: Daemon) -> None:
    with MemoryClient(server.address, server.ca) as client:
        client.handshake(send_finished=True)
        client.tls.write(get("/huge.bin"))
        client.send()
        for _ in range(20):
            assert curl(server, "/sub/").body == b"<p>sub"


def first_plaintext(client: MemoryClient) -> bytes:
    """Receives until the response has begun: what comes before may be session tickets."""
    while client.receive():
        try:
            return client.tls.read(65536)
        except ssl.SSLWantReadError:
            continue
    raise AssertionError("the connection ended before the response began")


def changed_while_sent(daemon: Daemon, path: Path, change: str) -> tuple[bytes, bool]:
    """Asks for `path`, changes it once its first bytes have come, reads on: the body, and if its end was truncated."""
    with MemoryClient(daemon.address, daemon.ca) as client:
        client.handshake(send_finished=True)
        client.tls.write(get("/" + path.name, "Connection: close"))
        client.send()
        start = first_plaintext(client)
        if change == "truncate":
            os.truncate(path, 1 << 20)
        elif change == "rewrite":
            with path.open("r+b") as file:
                file.seek(-5, os.SEEK_END)
                file.write(b"XXXXX")
        else:
            path.with_suffix(".new").write_bytes(b"new")
            path.with_suffix(".new").rename(path)
        rest, truncated = client.read_to_end()
    return (start + rest).partition(b"\r\n\r\n")[2], truncated


@pytest.mark.parametrize("change", ["truncate", "rewrite", "replace"])
def test_a_file_that_changes_while_it_is_sent(server: Daemon, root: Path, change: str) -> None:
    path = root / f"changing-{change}.bin"
    content = pattern(24 << 20)
    path.write_bytes(content)
    body, truncated = changed_while_sent(server, path, change)
    if change == "replace":
        assert not truncated
        assert hashlib.sha256(body).digest() == hashlib.sha256(content).digest()
        eventually(lambda: curl(server, "/" + path.name).body == b"new", "the new file is served")
    else:
        assert truncated
        assert len(body) < len(content)
        assert content.startswith(body), "bytes that were never in the file"
        assert curl(server, "/sub/").status == 200
