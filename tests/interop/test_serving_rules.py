"""What a configuration says of a site, seen by curl: every row of docs/configuration.md that changes a response."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.certificates import Issued
from support.curl import curl, exchange, get
from support.daemon import Daemon, serve
from support.http import age, read_responses
from support.peers import program
from support.waiting import eventually

RULES = """
[[site]]
root = "app"
names = ["localhost", "*.app.test"]
precompressed = true
listing = true
[[site.error_page]]
status = 404
path = "/404.html"
[[site.error_page]]
status = 405
path = "/404.html"
[[site.error_page]]
status = 414
path = "/404.html"
[[site.header]]
name = "Strict-Transport-Security"
value = "max-age=31536000"
[[site.header]]
name = "Cache-Control"
value = "no-cache"
[[site.header]]
path = "/assets/*"
name = "Cache-Control"
value = "max-age=31536000, immutable"
[[site.redirect]]
path = "/old/*"
to = "/new/*?from=old"
status = 308
[[site.redirect]]
path = "/away/*"
to = "https://other.test/*"
status = 302

[[site]]
root = "single"
names = ["single.test"]
fallback = "/index.html"
index = ["main.html", "index.html"]
dotfiles = true

[[site]]
root = "default"

[[media_type]]
suffix = "weird"
type = "text/x-weird"

[http]
charset = "utf-8"
default_type = "application/x-unknown"

[access_log]
path = "access.log"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rules")
    for name, content in {
        "app/index.html": "app",
        "app/404.html": "own page",
        "app/assets/app.js": "script();" * 20,
        "app/assets/app.js.gz": "as gzip",
        "app/assets/app.js.br": "as brotli",
        "app/assets/app.js.zst": "as zstd",
        "app/stale.txt": "fresh",
        "app/stale.txt.gz": "stale",
        "app/a.weird": "weird",
        "app/b.unheard": "unheard",
        "app/list/<img src=x onerror=alert(1)>&\"'.txt": "",
        "app/list/Zebra/index.html": "zebra",
        "app/list/b.txt": "12345",
        "app/list/.hidden": "",
        "single/index.html": "single",
        "single/sub/main.html": "main",
        "single/sub/index.html": "not this",
        "single/.dot": "dot",
        "single/empty/.keep": "",
        "default/index.html": "default",
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (folder / "app/list" / os.fsdecode(b"\xff.bin")).write_text("")
    (folder / "app/list" / "ä b.txt").write_text("")
    (folder / "app/list" / "up").symlink_to("../assets")
    (folder / "app/list" / "out").symlink_to("/etc")
    os.utime(folder / "app/stale.txt.gz", (1, 1))
    (folder / "app/style.css").write_text("body { color: red }\n" * 100)
    (folder / "app/style.css.gz").write_bytes(gzip.compress((folder / "app/style.css").read_bytes()))
    (folder / "kdaemon.toml").write_text(RULES)
    age(folder / "default/index.html")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path, issued: Issued) -> Iterator[Daemon]:
    with serve(None, "--workers", "1", "--config", str(folder / "kdaemon.toml"), issued=issued) as daemon:
        yield daemon


def test_header_fields_by_path(server: Daemon) -> None:
    tag = curl(server, "/assets/app.js", "--head").headers["etag"]
    for target, status, arguments in (
        ("/assets/app.js", 200, ()),
        ("/assets/app.js", 304, ("-H", f"If-None-Match: {tag}")),
        ("/assets/app.js", 206, ("--range", "0-1")),
        ("/assets/app.js", 416, ("--range", "999-")),
        ("/assets/app.js", 412, ("-H", 'If-Match: "x"')),
        ("/assets/app.js", 405, ("-X", "PUT")),
        ("/assets/app.js", 204, ("-X", "OPTIONS")),
        ("/assets/none", 404, ()),
        ("/assets/../assets//app.js", 200, ()),
    ):
        response = curl(server, target, *arguments)
        assert response.status == status
        assert response.headers["strict-transport-security"] == "max-age=31536000"
        assert response.headers["cache-control"] == "max-age=31536000, immutable"
    assert curl(server, "/").headers["cache-control"] == "no-cache"
    assert "cache-control" not in curl(server, "/", name="single.test").headers


def test_own_error_pages(server: Daemon) -> None:
    missing = curl(server, "/none")
    assert (missing.status, missing.body, missing.headers["content-type"]) == (
        404,
        b"own page",
        "text/html; charset=utf-8",
    )
    assert "etag" not in missing.headers
    refused = curl(server, "/", "-X", "DELETE")
    assert (refused.status, refused.body, refused.headers["allow"]) == (405, b"own page", "GET, HEAD, OPTIONS")
    assert curl(server, "/none", "--head").headers["content-length"] == "8"
    (long,) = read_responses(exchange(server, get("/" + "a" * 9000)))
    assert (long.status, long.body) == (414, b"own page")


def test_precompressed_siblings(server: Daemon) -> None:
    identity = curl(server, "/assets/app.js")
    tags = {identity.headers["etag"]}
    for accepted, coding, body in (
        ("gzip", "gzip", b"as gzip"),
        ("gzip, br", "br", b"as brotli"),
        ("gzip, deflate, br, zstd", "zstd", b"as zstd"),
        ("gzip, br;q=0.5", "gzip", b"as gzip"),
        ("br;q=0, gzip;q=0, *", "zstd", b"as zstd"),
        ("identity, gzip;q=0.9", None, identity.body),
        ("gzip;q=0", None, identity.body),
        ("deflate", None, identity.body),
    ):
        response = curl(server, "/assets/app.js", "-H", f"Accept-Encoding: {accepted}")
        assert (response.headers.get("content-encoding"), response.body) == (coding, body), accepted
        assert response.headers["vary"] == "Accept-Encoding"
        assert response.headers["content-type"] == "text/javascript; charset=utf-8"
        tags.add(response.headers["etag"])
    assert len(tags) == 4
    accepting = ("-H", "Accept-Encoding: gzip")
    part = curl(server, "/assets/app.js", *accepting, "--range", "3-")
    assert (part.status, part.body, part.headers["content-encoding"]) == (206, b"gzip", "gzip")
    parts = curl(server, "/assets/app.js", *accepting, "--range", "0-1,3-5")
    assert "content-encoding" not in parts.headers
    assert parts.body.count(b"\r\nContent-Encoding: gzip\r\nContent-Range: bytes ") == 2
    assert len(parts.body) == int(parts.headers["content-length"])
    unchanged = curl(server, "/assets/app.js", *accepting, "-H", f"If-None-Match: {', '.join(tags)}")
    assert (unchanged.status, unchanged.headers["vary"]) == (304, "Accept-Encoding")
    assert curl(server, "/assets/app.js", *accepting, "-H", f"If-None-Match: {identity.headers['etag']}").status == 200
    assert curl(server, "/stale.txt", *accepting).body == b"fresh"


def test_curl_decodes_what_it_is_sent(server: Daemon, folder: Path) -> None:
    plain = (folder / "app/style.css").read_bytes()
    command = [
        program("curl"),
        "--silent",
        "--show-error",
        "--cacert",
        str(server.ca),
        "--write-out",
        "%{size_download}",
    ]
    for option, size in (
        ("--no-compressed", len(plain)),
        ("--compressed", (folder / "app/style.css.gz").stat().st_size),
    ):
        done = subprocess.run(
            [*command, option, f"https://localhost:{server.port}/style.css"], capture_output=True, check=True
        )
        assert done.stdout == plain + str(size).encode()


def test_listings(server: Daemon) -> None:
    page = curl(server, "/list/")
    assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert page.headers["vary"] == "Accept"
    assert b"<img" not in page.body
    assert b'href="./%3Cimg%20src%3Dx%20onerror%3Dalert%281%29%3E%26%22%27.txt"' in page.body
    assert b'href="./%FF.bin"' in page.body
    assert b".hidden" not in page.body
    listed = json.loads(curl(server, "/list/", "-H", "Accept: application/json").body)
    assert "out" not in [entry["name"] for entry in listed], "it leads out of the root"
    assert [entry["name"] for entry in listed][:5] == [
        "up",
        "Zebra",
        "<img src=x onerror=alert(1)>&\"'.txt",
        "b.txt",
        "ä b.txt",
    ]
    assert [entry["type"] for entry in listed][:3] == ["directory", "directory", "file"]
    assert listed[3]["size"] == 5
    for accept, kind in (
        ("text/html, application/json", "text/html"),
        ("application/json, text/html", "application/json"),
        ("application/json;q=0.5, text/html", "text/html"),
        ("text/html;q=0.1, application/json", "application/json"),
        ("application/json;q=0", "text/html"),
        ("*/*", "text/html"),
    ):
        assert curl(server, "/list/", "-H", f"Accept: {accept}").headers["content-type"].startswith(kind), accept
    assert curl(server, "/list/Zebra/").body == b"zebra"
    assert curl(server, "/sub/", name="default.test").status == 404


def test_redirects(server: Daemon) -> None:
    for target, status, location in (
        ("/old/a%20b", 308, "/new/a%20b?from=old"),
        ("/old/a?q=1", 308, "/new/a?from=old&q=1"),
        ("/away/x?q", 302, "https://other.test/x?q"),
        ("/away//evil.test/%0d%0aX:y", 302, "https://other.test/evil.test/%0D%0AX%3Ay"),
    ):
        moved = curl(server, target)
        assert (moved.status, moved.headers["location"]) == (status, location)
    assert curl(server, "/old/form", "--data", "a=b").status == 308


def test_a_fallback_for_single_page_applications(server: Daemon) -> None:
    for target in ("/any/where", "/none.js", "/any/where/"):
        response = curl(server, target, name="single.test")
        assert (response.status, response.body) == (200, b"single")
    assert curl(server, "/any", "-X", "POST", name="single.test").status == 405
    assert curl(server, "/empty/", name="single.test").status == 403
    assert curl(server, "/sub", name="single.test").headers["location"] == "/sub/"
    assert curl(server, "/sub/", name="single.test").body == b"main"
    assert curl(server, "/.dot", name="single.test").body == b"dot"


def test_sites_by_name(server: Daemon) -> None:
    assert curl(server, "/", name="SINGLE.test").body == b"single"
    assert curl(server, "/", name="a.app.test").body == b"app"
    assert curl(server, "/", name="a.b.app.test").body == b"default"
    assert curl(server, "/", "-H", "Host: single.test", name="a.app.test").status == 421
    assert curl(server, "/", "-H", "Host: single.test", name="unknown.test").status == 421
    assert curl(server, "/", "-H", "Host: Single.test.:1", name="single.test").body == b"single"
    assert curl(server, "/", "--request-target", "https://single.test/", name="a.app.test").status == 421
    # Without a server name the Host alone says which site it is.
    for host, body in (("single.test", b"single"), ("x.app.test:8443", b"app"), ("unknown.test", b"default")):
        assert curl(server, "/", "-H", f"Host: {host}", name="127.0.0.1").body == body
    assert curl(server, "/", "--http1.0", "-H", "Host:", name="127.0.0.1").body == b"default"


def test_media_types(server: Daemon) -> None:
    for target, kind in (
        ("/a.weird", "text/x-weird; charset=utf-8"),
        ("/b.unheard", "application/x-unknown"),
        ("/404.html", "text/html; charset=utf-8"),
    ):
        assert curl(server, target).headers["content-type"] == kind


def test_the_etag_changes_with_the_content_alone(server: Daemon, folder: Path) -> None:
    """Same size, same mtime to the nanosecond: the change of the inode tells."""
    path = folder / "app" / "changing.txt"
    path.write_text("first")
    age(path)
    times = path.stat().st_mtime_ns
    first = curl(server, "/changing.txt")
    path.write_text("other")
    os.utime(path, ns=(times, times))
    age(path)
    second = curl(server, "/changing.txt", "-H", f"If-None-Match: {first.headers['etag']}")
    assert (second.status, second.body) == (200, b"other")
    assert second.headers["etag"] != first.headers["etag"]
    assert not second.headers["etag"].startswith("W/")
    assert second.headers["last-modified"] == first.headers["last-modified"]


def test_the_combined_log(server: Daemon, folder: Path) -> None:
    curl(server, '/logged"x?q', "-A", 'agent "\\\t\xe4', "-e", "https://from.test/")
    curl(server, "/logged", "--head", "-H", "User-Agent:")
    exchange(server, get("/logged-bad", "X : y"))
    exchange(server, get("/logged" + "a" * 9000))

    def lines() -> list[str]:
        return [line for line in (folder / "access.log").read_text("ascii").splitlines() if "/logged" in line]

    eventually(lambda: len(lines()) == 4, "four lines are written")
    start = r"127\.0\.0\.1 - - \[\d\d/\w{3}/\d{4}:\d\d:\d\d:\d\d \+0000\] "
    for line, rest in zip(
        lines(),
        (
            r'"GET /logged\\x22x\?q HTTP/1\.1" 404 8 "https://from\.test/" "agent \\x22\\x5C\\x09\\xC3\\xA4"',
            r'"HEAD /logged HTTP/1\.1" 404 0 "-" "-"',
            r'"GET /logged-bad HTTP/1\.1" 400 \d+ "-" "-"',
            r'"GET /loggeda{2037}" 414 8 "-" "-"',
        ),
        strict=True,
    ):
        assert re.fullmatch(start + rest, line), line


def test_a_download_that_was_broken_off_is_logged_with_what_went_out(server: Daemon, folder: Path) -> None:
    size = 1 << 30
    with (folder / "app/broken-off.bin").open("wb") as file:
        file.truncate(size)
    command = [
        program("curl"), "--silent", "--cacert", str(server.ca), "--resolve", f"localhost:{server.port}:{server.host}",
        f"https://localhost:{server.port}/broken-off.bin",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE) as download:
        assert download.stdout is not None
        assert len(download.stdout.read(100_000)) == 100_000
        download.kill()

    def logged() -> list[int]:
        return [
            int(line.split()[9])
            for line in (folder / "access.log").read_text("ascii").splitlines()
            if "/broken-" in line
        ]

    eventually(lambda: len(logged()) == 1, "the line is written")
    assert 100_000 <= logged()[0] < size


def test_too_many_requests(folder: Path, issued: Issued) -> None:
    path = folder / "limited.toml"
    path.write_text('[http]\nrequests_per_second_per_address = 1\n[[site]]\nroot = "default"\n')
    with serve(None, "--workers", "1", "--config", str(path), issued=issued) as daemon:
        responses = read_responses(exchange(daemon, get("/") * 4 + get("/", "Connection: close")))
    assert [r.status for r in responses][:2] == [200, 429]
    assert responses[1].headers["retry-after"] == "1"


SMALL_LIMITS = """
[http]
request_line_bytes_max = 100
header_line_bytes_max = 200
head_bytes_max = 400
header_count_max = 8
body_bytes_max = 10
requests_per_connection_max = 2
ranges_max = 1
[deadlines]
header_ms = 400
body_ms = 400
idle_ms = 400
[[site]]
root = "default"
"""


def test_every_limit_is_configurable(folder: Path, issued: Issued) -> None:
    path = folder / "small.toml"
    path.write_text(SMALL_LIMITS)
    with serve(None, "--workers", "1", "--config", str(path), issued=issued) as daemon:
        for arguments, status in {
            ("-H", "X: " + "a" * 100): 200,
            ("-H", "X: " + "a" * 200): 431,
            ("-H", "X: " + "a" * 150, "-H", "Y: " + "a" * 150, "-H", "Z: " + "a" * 150): 431,
            tuple(part for number in range(4) for part in ("-H", f"X{number}: a")): 200,
            tuple(part for number in range(8) for part in ("-H", f"X{number}: a")): 431,
            ("-X", "GET", "--data", "a" * 10): 200,
            ("-X", "GET", "--data", "a" * 11): 413,
            ("-X", "GET", "--data", "a" * 11, "-H", "Transfer-Encoding: chunked"): 413,
            ("--range", "0-0"): 206,
            ("--range", "0-0,2-2"): 200,
        }.items():
            assert curl(daemon, "/", *arguments).status == status, arguments
        assert curl(daemon, "/?" + "a" * 100).status == 414
        both = read_responses(exchange(daemon, get("/") * 3))
        assert [response.headers.get("connection") for response in both] == [None, "close"]
        for unfinished, statuses in (
            (get("/")[:-2], [408]),
            (get("/", "Transfer-Encoding: chunked") + b"1\r\n", [408]),
            (get("/"), [200]),
            (get("/", "Content-Length: 1"), [200]),
        ):  # exchange() returns when the daemon has ended the connection
            assert [response.status for response in read_responses(exchange(daemon, unfinished))] == statuses
