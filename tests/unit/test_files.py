"""The file table and what is answered from it: containment, validators, ranges, encodings, change under way."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from email.utils import parsedate_to_datetime as email_date
from pathlib import Path

import pytest
from kdaemon_pyx.http_config import Limits
from kdaemon_pyx.mime import MimeTable
from support.http import Folder, age, folder, read_responses

TEXT = b"0123456789" * 10
SECOND_MS = 1000


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Folder]:
    root = tmp_path / "root"
    root.mkdir()
    (root / "a.txt").write_bytes(TEXT)
    age(root / "a.txt")
    yield from folder(root)


def test_whole_file(site: Folder) -> None:
    response = site.get("/a.txt")
    assert (response.status, response.body) == (200, TEXT)
    assert response.headers["content-type"] == "text/plain"
    assert response.headers["content-length"] == "100"
    assert response.headers["accept-ranges"] == "bytes"
    assert response.headers["etag"].startswith('"')
    assert response.headers["last-modified"].endswith(" GMT")


def test_directories(site: Folder) -> None:
    (site.root / "sub dir").mkdir()
    (site.root / "sub dir" / "index.html").write_bytes(b"<p>sub")
    (site.root / "bare").mkdir()
    moved = site.get("/sub%20dir?x=1&y")
    assert (moved.status, moved.headers["location"]) == (301, "/sub%20dir/?x=1&y")
    index = site.get("/sub%20dir/")
    assert (index.status, index.body, index.headers["content-type"]) == (200, b"<p>sub", "text/html")
    assert site.get("/bare/").status == 403
    assert site.get("/").status == 403
    assert site.get("/none/").status == 404
    assert site.get("/a.txt/").status == 404
    assert site.get("/a.txt/x").status == 404


def test_redirect_of_a_directory_never_leaves_the_host(site: Folder) -> None:
    (site.root / "evil.test").mkdir()
    assert site.get("//evil.test").headers["location"] == "/evil.test/"
    assert site.get("/%5Cevil.test/..//evil.test").status in (301, 404)


@pytest.mark.parametrize(
    "target",
    [
        "/../outside.txt",
        "/../root/../outside.txt",
        "/%2e%2e/outside.txt",
        "/%2e%2e%2foutside.txt",
        "/..%2foutside.txt",
        "/sub/../../outside.txt",
        "//../outside.txt",
        "/link-out",
        "/link-out-dir/outside.txt",
        "/link-absolute",
        "/link-to-link",
        "/proc-link",
    ],
)
def test_nothing_outside_the_root(site: Folder, target: str) -> None:
    (site.root.parent / "outside.txt").write_text("secret")
    (site.root / "sub").mkdir()
    (site.root / "link-out").symlink_to("../outside.txt")
    (site.root / "link-out-dir").symlink_to("..")
    (site.root / "link-absolute").symlink_to(site.root / "a.txt")
    (site.root / "link-to-link").symlink_to("link-out")
    (site.root / "proc-link").symlink_to("/proc/self/root/etc/hostname")
    response = site.get(target)
    assert response.status in (403, 404)
    assert b"secret" not in response.body


def test_inside_the_root_dots_and_links_work(site: Folder) -> None:
    (site.root / "sub").mkdir()
    (site.root / "sub" / "link").symlink_to("../a.txt")
    for target in ("/sub/../a.txt", "/./a.txt", "/sub/%2e%2e/a.txt", "//a.txt", "/sub/link", "/sub//link"):
        assert site.get(target).body == TEXT
    assert site.get("/a.txt%00").status == 400


def test_dotfiles_are_hidden(site: Folder) -> None:
    for name in (".env", ".git/config", "sub/.htaccess", ".well-known/acme", "..name", ".well-knownx"):
        path = site.root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    for name in (".env", ".git/config", "sub/.htaccess", ".git/", ".git", "sub/%2ehtaccess", "..name", ".well-knownx"):
        assert site.get(f"/{name}").status == 404, name
    assert site.get("/.well-known/acme").status == 200
    shown = Folder(site.root, dotfiles=True)
    assert shown.get("/.env").status == 200
    shown.close()


def test_what_is_not_a_file(site: Folder) -> None:
    os.mkfifo(site.root / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(site.root / "socket"))
        assert site.get("/fifo").status == 403
        assert site.get("/socket").status == 403


def test_names(site: Folder) -> None:
    names = ["ä ö.txt", "日本.txt", "a%b.txt", "q?x.txt", "h#.txt", "new\nline.txt"]
    for name in names:
        (site.root / name).write_text(name)
    (Path(os.fsdecode(os.fsencode(site.root) + b"/\xff\xfe.txt"))).write_text("bytes")
    assert site.get("/%C3%A4%20%C3%B6.txt").body == "ä ö.txt".encode()
    assert site.get("/日本.txt").body == "日本.txt".encode()
    assert site.get("/a%25b.txt").status == 200
    assert site.get("/q%3Fx.txt").status == 200
    assert site.get("/h%23.txt").status == 200
    assert site.get("/new%0Aline.txt").status == 200
    assert site.get("/%FF%FE.txt").body == b"bytes"
    assert site.get("/" + "x" * 300).status == 404


def test_unreadable_file(site: Folder) -> None:
    (site.root / "secret").write_text("x")
    (site.root / "secret").chmod(0)
    user = os.geteuid()
    if user == 0:  # root reads everything
        os.seteuid(65534)
    try:
        assert site.get("/secret").status == 403
        assert site.get("/a.txt").status == 200
    finally:
        os.seteuid(user)


def test_conditions(site: Folder) -> None:
    first = site.get("/a.txt").headers
    etag, modified = first["etag"], first["last-modified"]
    old, future = "Sun, 06 Nov 1994 08:49:37 GMT", "Fri, 31 Dec 2100 00:00:00 GMT"
    rows = [
        ([f"If-None-Match: {etag}"], 304),
        ([f"If-None-Match: W/{etag}"], 304),
        (['If-None-Match: "x", ' + etag], 304),
        (["If-None-Match: *"], 304),
        (['If-None-Match: "x"'], 200),
        (['If-None-Match: "x"', f"If-None-Match: {etag}"], 304),
        ([f"If-None-Match: {etag[:-1]}"], 200),
        ([f"If-Modified-Since: {modified}"], 304),
        ([f"If-Modified-Since: {future}"], 304),
        ([f"If-Modified-Since: {old}"], 200),
        (["If-Modified-Since: yesterday"], 200),
        (['If-None-Match: "x"', f"If-Modified-Since: {future}"], 200),  # If-None-Match wins
        ([f"If-Match: {etag}"], 200),
        (["If-Match: *"], 200),
        ([f"If-Match: W/{etag}"], 412),
        (['If-Match: "x"'], 412),
        ([f"If-Unmodified-Since: {modified}"], 200),
        ([f"If-Unmodified-Since: {old}"], 412),
        ([f"If-Match: {etag}", f"If-Unmodified-Since: {old}"], 200),  # If-Match wins
        ([f"If-Match: {etag}", f"If-None-Match: {etag}"], 304),
        (['If-Match: "x"', f"If-None-Match: {etag}"], 412),
        ([f"If-None-Match: {etag}", "Range: bytes=0-1"], 304),
        (["Range: bytes=0-1", f"If-Range: {etag}"], 206),
        (["Range: bytes=0-1", 'If-Range: "x"'], 200),
        (["Range: bytes=0-1", f"If-Range: W/{etag}"], 200),
        (["Range: bytes=0-1", f"If-Range: {old}"], 200),
        (["Range: bytes=200-", 'If-Range: "x"'], 200),
        (["Range: bytes=200-", f"If-Range: {etag}"], 416),
        (["Range: bytes=0-1", 'If-Match: "x"'], 412),
    ]
    for headers, status in rows:
        assert site.get("/a.txt", *headers).status == status, headers
    not_modified = site.get("/a.txt", f"If-None-Match: {etag}")
    assert not_modified.headers["etag"] == etag
    assert not_modified.body == b""
    assert "content-length" not in not_modified.headers


def test_if_range_with_a_date(site: Folder) -> None:
    os.utime(site.root / "a.txt", (1_600_000_000, 1_600_000_000))
    modified = site.get("/a.txt").headers["last-modified"]
    assert site.get("/a.txt", "Range: bytes=0-1", f"If-Range: {modified}").status == 206


def test_a_file_from_the_future_was_modified_now(site: Folder) -> None:
    os.utime(site.root / "a.txt", (4_000_000_000, 4_000_000_000))
    headers = site.get("/a.txt").headers
    assert 0 <= (email_date(headers["date"]) - email_date(headers["last-modified"])).total_seconds() < 60
    assert site.get("/a.txt", f"If-Modified-Since: {headers['last-modified']}").status == 304
    assert site.get("/a.txt", "If-Modified-Since: Thu, 01 Jan 1998 00:00:00 GMT").status == 200


def test_ranges(site: Folder) -> None:
    part = site.get("/a.txt", "Range: bytes=3-7")
    assert (part.status, part.body) == (206, TEXT[3:8])
    assert part.headers["content-range"] == "bytes 3-7/100"
    assert site.get("/a.txt", "Range: bytes=-5").body == TEXT[-5:]
    outside = site.get("/a.txt", "Range: bytes=100-")
    assert (outside.status, outside.headers["content-range"]) == (416, "bytes */100")
    assert site.get("/a.txt", "Range: bytes=5-2").status == 200
    head = site.request("/a.txt", "Range: bytes=3-7", method="HEAD")
    assert (head.status, head.headers["content-length"]) == (200, "100")


def test_multipart_ranges(site: Folder) -> None:
    big = os.urandom(300_000)
    (site.root / "big.bin").write_bytes(big)
    for target, content in (("/a.txt", TEXT), ("/big.bin", big)):
        response = site.get(target, "Range: bytes=1-2, 50-89,-3")
        assert response.status == 206
        kind, boundary = response.headers["content-type"].split("; boundary=")
        assert kind == "multipart/byteranges"
        parts = response.body.split(b"\r\n--" + boundary.encode())
        assert parts[0] == b""
        assert parts[-1] == b"--\r\n"
        size = len(content)
        for part, (first, last) in zip(parts[1:-1], [(1, 2), (50, 89), (size - 3, size - 1)], strict=True):
            head, _, body = part.partition(b"\r\n\r\n")
            assert f"Content-Range: bytes {first}-{last}/{size}".encode() in head.split(b"\r\n")
            assert body == content[first : last + 1]


def test_files_over_4_gib(site: Folder) -> None:
    with (site.root / "huge").open("wb") as huge:
        huge.truncate((5 << 30) + 3)
        huge.seek((5 << 30) - 1)
        huge.write(b"tail")
    assert site.request("/huge", method="HEAD").headers["content-length"] == str((5 << 30) + 3)
    part = site.get("/huge", f"Range: bytes={(5 << 30) - 2}-")
    assert part.body == b"\0tail"
    assert part.headers["content-range"] == f"bytes {(5 << 30) - 2}-{(5 << 30) + 2}/{(5 << 30) + 3}"


def test_a_replaced_file_is_seen_after_a_second(site: Folder) -> None:
    connection = site.connection()
    request = b"GET /a.txt HTTP/1.1\r\nHost: a\r\n\r\n"
    before = connection.exchange(request)
    (site.root / "new").write_bytes(b"replaced")
    (site.root / "new").rename(site.root / "a.txt")
    connection.advance(SECOND_MS)
    after = connection.exchange(request)
    assert before.endswith(TEXT)
    assert after.endswith(b"replaced")


def test_a_change_is_seen_at_once_unless_the_path_is_hot(site: Folder) -> None:
    path = site.root / "a.txt"
    connection = site.connection()
    request = b"GET /a.txt HTTP/1.1\r\nHost: a\r\n\r\n"
    assert connection.exchange(request).endswith(TEXT)
    path.write_bytes(b"changed")
    age(path)
    connection.advance(10)
    assert connection.exchange(request).endswith(b"changed")
    opens = site.context.counters()["file_opens"]
    connection.exchange(request * 10)
    connection.advance(10)
    path.write_bytes(b"again")
    assert connection.exchange(request).endswith(b"changed")
    assert site.context.counters()["file_opens"] == opens
    connection.advance(990)
    assert connection.exchange(request).endswith(b"again")


def test_a_large_file_written_in_place_is_seen_at_once(site: Folder) -> None:
    path = site.root / "large"
    path.write_bytes(b"1" * 100_000)
    age(path)
    first = site.get("/large")
    path.write_bytes(b"2" * 100_001)
    second = site.get("/large")
    assert (first.body, second.body) == (b"1" * 100_000, b"2" * 100_001)
    assert first.headers["etag"] != second.headers["etag"]


def test_the_etag_changes_when_only_the_content_does(site: Folder) -> None:
    path = site.root / "a.txt"
    before = site.get("/a.txt").headers["etag"]
    times = path.stat()
    path.write_bytes(TEXT[::-1])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    age(path)
    fresh = Folder(site.root)
    assert fresh.get("/a.txt").headers["etag"] != before
    fresh.close()


def times_each_change(path: Path) -> bool:
    """Whether the file system gives each change a time of its own (since Linux 6.13)."""
    times = set()
    for _ in range(200):
        path.write_bytes(b"x")
        times.add(path.stat().st_ctime_ns)
    return len(times) == 200


def test_a_strong_etag_changes_with_every_change(site: Folder) -> None:
    """However soon, and though size and mtime are the same; where the file system does not tell, it is weak."""
    path = site.root / "now"
    each = times_each_change(path)
    connection = site.connection()
    contents: dict[bytes, bytes] = {}
    for number in range(300):
        path.write_bytes(b"%06d" % number)
        os.utime(path, (1, 1))
        (response,) = read_responses(connection.exchange(b"GET /now HTTP/1.1\r\nHost: a\r\n\r\n"))
        tag = response.headers["etag"].encode()
        assert each or tag.startswith(b"W/")
        assert tag.startswith(b"W/") or contents.setdefault(tag, response.body) == response.body
        connection.advance(10)
    assert len(contents) in (0, 300)
    age(path)
    connection.advance(1000)
    assert b'ETag: "' in connection.exchange(b"GET /now HTTP/1.1\r\nHost: a\r\n\r\n")


def test_missing_names_are_remembered_shortly(site: Folder) -> None:
    connection = site.connection()
    request = b"GET /late HTTP/1.1\r\nHost: a\r\n\r\n"
    assert b" 404 " in connection.exchange(request)
    (site.root / "late").write_bytes(b"here")
    connection.advance(SECOND_MS)
    assert b" 200 " in connection.exchange(request)


def test_the_table_is_bounded_and_closes_what_it_drops(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / str(number)).write_text(f"file {number}")
    site = Folder(tmp_path, Limits(entries_max=8, content_bytes_max=60))
    before = len(list(Path("/proc/self/fd").iterdir()))
    connection = site.connection()
    for number in [*range(50), *range(50)]:
        sent = connection.exchange(b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n" % number)
        assert sent.endswith(b"file %d" % number)
        connection.exchange(b"GET /none%d HTTP/1.1\r\nHost: a\r\n\r\n" % number)
    counters = site.context.counters()
    assert counters["file_entries"] == 8
    assert counters["file_names_missing"] == 8
    assert counters["file_content_bytes"] <= 60
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 8
    del connection
    site.close()


def test_files_nobody_asks_for_are_let_go(site: Folder) -> None:
    for number in range(5):
        (site.root / str(number)).write_text("x")
    connection = site.connection()
    for number in range(5):
        connection.exchange(b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n" % number)
    connection.advance(59 * SECOND_MS)
    connection.exchange(b"GET /0 HTTP/1.1\r\nHost: a\r\n\r\n")
    assert site.context.counters()["file_entries"] == 5
    connection.advance(2 * SECOND_MS)  # no request: the engine's timer alone
    assert site.context.counters()["file_entries"] == 1


def test_out_of_descriptors_is_503_and_passes(site: Folder) -> None:
    (site.root / "other").write_text("other")
    connection = site.connection()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    holes = [os.dup(site.root_fd) for _ in range(highest)]
    taken = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken, hard))
    try:
        refused = connection.exchange(b"GET /other HTTP/1.1\r\nHost: a\r\n\r\n")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in holes:
            os.close(fd)
    assert b" 503 " in refused
    assert connection.exchange(b"GET /other HTTP/1.1\r\nHost: a\r\n\r\n").endswith(b"other")


def test_kernel_layer_maps_what_it_sends(site: Folder) -> None:
    big = os.urandom(200_000)
    (site.root / "big").write_bytes(big)
    connection = site.connection(kernel_layer=True)
    assert connection.exchange(b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n").endswith(big)
    assert str(site.root / "big") in Path("/proc/self/maps").read_text()


@pytest.fixture
def encoded(tmp_path: Path) -> Iterator[Folder]:
    (tmp_path / "page.html").write_bytes(b"identity")
    for suffix in ("gz", "br", "zst"):
        (tmp_path / f"page.html.{suffix}").write_bytes(suffix.encode())
    (tmp_path / "only.css").write_bytes(b"identity")
    (tmp_path / "only.css.gz").write_bytes(b"gz")
    (tmp_path / "stale.js").write_bytes(b"identity")
    (tmp_path / "stale.js.gz").write_bytes(b"gz")
    os.utime(tmp_path / "stale.js.gz", (1, 1))
    for path in tmp_path.iterdir():
        age(path)
    yield from folder(tmp_path, precompressed=True)


@pytest.mark.parametrize(
    ("target", "accept", "body", "encoding"),
    [
        ("/page.html", None, b"identity", None),
        ("/page.html", "", b"identity", None),
        ("/page.html", "gzip", b"gz", "gzip"),
        ("/page.html", "x-gzip", b"gz", "gzip"),
        ("/page.html", "gzip, deflate, br, zstd", b"zst", "zstd"),
        ("/page.html", "gzip, br", b"br", "br"),
        ("/page.html", "GZIP;q=1, br;q=0.5", b"gz", "gzip"),
        ("/page.html", "gzip;q=0", b"identity", None),
        ("/page.html", "gzip; q=0.001", b"gz", "gzip"),
        ("/page.html", "*", b"zst", "zstd"),
        ("/page.html", "*;q=0.1, gzip;q=0.2", b"gz", "gzip"),
        ("/page.html", "identity, gzip;q=0.5", b"identity", None),
        ("/page.html", "identity;q=0.3, gzip;q=0.5", b"gz", "gzip"),
        ("/page.html", "deflate", b"identity", None),
        ("/page.html", ";;,gzip=1,,", b"gz", "gzip"),
        ("/only.css", "zstd, gzip", b"gz", "gzip"),
        ("/stale.js", "gzip", b"identity", None),
        ("/page.html.gz", "gzip", b"gz", None),
    ],
)
def test_precompressed_siblings(
    encoded: Folder, target: str, accept: str | None, body: bytes, encoding: str | None
) -> None:
    response = encoded.get(target, *([] if accept is None else [f"Accept-Encoding: {accept}"]))
    assert (response.body, response.headers.get("content-encoding")) == (body, encoding)
    if target in ("/page.html", "/only.css"):
        assert response.headers["vary"] == "Accept-Encoding"
        assert response.headers["content-type"] == ("text/html" if target == "/page.html" else "text/css")
    else:
        assert "vary" not in response.headers


def test_each_encoding_has_its_own_etag(encoded: Folder) -> None:
    tags = {
        encoded.get("/page.html", f"Accept-Encoding: {name}").headers["etag"] for name in ("", "gzip", "br", "zstd")
    }
    assert len(tags) == 4


def test_a_sibling_that_appears_and_goes(encoded: Folder) -> None:
    connection = encoded.connection()
    request = b"GET /new.js HTTP/1.1\r\nHost: a\r\nAccept-Encoding: br\r\n\r\n"
    path = encoded.root / "new.js"
    path.write_bytes(b"plain")
    age(path)
    assert b"Vary" not in connection.exchange(request)
    sibling = encoded.root / "new.js.br"
    sibling.write_bytes(b"brotli")
    age(sibling)
    connection.advance(SECOND_MS)
    assert b"Vary: Accept-Encoding" in connection.exchange(request)
    sibling.unlink()
    connection.advance(SECOND_MS)
    sent = connection.exchange(request)
    assert sent.endswith(b"plain")
    assert b"Vary" not in sent


def test_media_types() -> None:
    table = MimeTable({"weird": "application/x-weird", ".HTML": "text/html; charset=latin1"}, charset="utf-8")
    assert table.lookup(b"/a/b.weird") == b"application/x-weird"
    assert table.lookup(b"/a.html") == b"text/html; charset=latin1"
    assert table.lookup(b"/A.CSS") == b"text/css; charset=utf-8"
    assert table.lookup(b"/a.tar.gz") == b"application/gzip"
    for name in (b"/README", b"/a.b/c", b"/a.", b"/.", b"", b"/a.unknown"):
        assert table.lookup(name) == b"application/octet-stream"
    with pytest.raises(ValueError, match="not a media type"):
        MimeTable({"x": "nonsense"})
