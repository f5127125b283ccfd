"""What a site can be told: names, header fields per path, redirects, fallback, pages for errors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from kdaemon_pyx.http_config import SITE_BY_HOST, HeaderRule, Limits, RedirectRule, Site
from kdaemon_pyx.http_context import FileContext
from kdaemon_pyx.http_loopback import Loopback
from support.http import Folder, folder, read_responses


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "index.html").write_bytes(b"<p>index")
    (tmp_path / "app.js").write_bytes(b"app()")
    (tmp_path / "404.html").write_bytes(b"<p>own 404 page, longer than any buffer" + b"." * 70_000)
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "logo.svg").write_bytes(b"<svg/>")
    return tmp_path


@pytest.fixture
def rules(root: Path) -> Iterator[Folder]:
    yield from folder(
        root,
        headers=(
            HeaderRule("*", (("Strict-Transport-Security", "max-age=31536000"), ("X-Content-Type-Options", "nosniff"))),
            HeaderRule("/assets/*", (("Cache-Control", "public, max-age=3600"),)),
            HeaderRule("*.svg", (("Content-Security-Policy", "default-src 'none'"),)),
        ),
        redirects=(
            RedirectRule("/old", "https://example.test/new", 308),
            RedirectRule("/docs/*", "/manual/*", 302),
            RedirectRule("/up/*", "/*"),
        ),
        error_pages={404: "/404.html", 403: "/missing.html"},
    )


def test_headers_by_path_on_every_kind_of_response(rules: Folder) -> None:
    svg = rules.get("/assets/logo.svg")
    assert svg.headers["cache-control"] == "public, max-age=3600"
    assert svg.headers["content-security-policy"] == "default-src 'none'"
    for response in (
        svg,
        rules.get("/"),
        rules.get("/assets"),  # 301
        rules.get("/none"),
        rules.get("/assets/"),  # 403
        rules.get("/old"),
        rules.get("/app.js", "Range: bytes=0-0"),
        rules.get("/app.js", "Range: bytes=99-"),
        rules.get("/app.js", "If-None-Match: *"),
        rules.request("/", method="PUT"),
        rules.request("*", method="OPTIONS"),
    ):
        assert response.headers["strict-transport-security"] == "max-age=31536000", response.status
        assert response.headers["x-content-type-options"] == "nosniff"
    assert "cache-control" not in rules.get("/app.js").headers


def test_redirects(rules: Folder) -> None:
    moved = rules.get("/old?a=b")
    assert (moved.status, moved.headers["location"]) == (308, "https://example.test/new?a=b")
    docs = rules.get("/docs/a%20b/c")
    assert (docs.status, docs.headers["location"]) == (302, "/manual/a%20b/c")
    assert rules.get("/docs").status == 404


@pytest.mark.parametrize("target", ["/up//evil.test", "/up/%2Fevil.test", "/up///evil.test", "/up/%5Cevil.test"])
def test_a_redirect_does_not_turn_a_path_into_a_host(rules: Folder, target: str) -> None:
    location = rules.get(target).headers["location"]
    assert location.startswith("/")
    assert location[1] not in "/\\"


def test_own_error_pages(rules: Folder) -> None:
    missing = rules.get("/none")
    assert (missing.status, missing.body[:18]) == (404, b"<p>own 404 page, l")
    assert missing.headers["content-type"] == "text/html"
    assert len(missing.body) > 70_000
    head = rules.request("/none", method="HEAD")
    assert (head.status, head.headers["content-length"]) == (404, missing.headers["content-length"])
    assert rules.get("/none", "Range: bytes=0-1", "If-None-Match: *").status == 404
    assert rules.get("/assets/").body.startswith(b"403 Forbidden")  # its page is missing
    assert rules.get("/404.html").status == 200
    assert not {"etag", "last-modified", "accept-ranges"} & missing.headers.keys()


def test_own_pages_have_what_the_status_and_the_path_ask_for(root: Path) -> None:
    statuses = (400, 405, 408, 412, 413, 414, 416, 417, 421, 431, 501, 505)
    site = Folder(
        root,
        names=("example.test",),
        error_pages=dict.fromkeys(statuses, "/app.js"),
        headers=(HeaderRule("/assets/*", (("X-Path", "assets"),)), HeaderRule("*", (("X-All", "y"),))),
    )
    refused = site.request("/assets/logo.svg", method="POST")
    assert (refused.status, refused.headers["allow"], refused.body) == (405, "GET, HEAD, OPTIONS", b"app()")
    assert refused.headers["x-path"] == "assets"
    range_ = site.get("/assets/logo.svg", "Range: bytes=99-")
    assert (range_.status, range_.headers["content-range"], range_.body) == (416, "bytes */6", b"app()")
    assert site.get("/app.js", 'If-Match: "x"').body == b"app()"
    for status, sent in {
        400: b"GET / HTTP/1.1\r\n\r\n",
        413: b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 9999999\r\n\r\n",
        414: b"GET /" + b"a" * 9000,
        417: b"GET / HTTP/1.1\r\nHost: a\r\nExpect: tea\r\n\r\n",
        421: b"GET / HTTP/1.1\r\nHost: other.test\r\n\r\n",
        431: b"GET / HTTP/1.1\r\nHost: " + b"a" * 9000,
        501: b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n",
        505: b"GET / HTTP/2.0\r\nHost: a\r\n\r\n",
    }.items():
        (response,) = read_responses(site.connection().exchange(sent))
        assert (response.status, response.body, response.headers["x-all"]) == (status, b"app()", "y")
    late = site.connection()
    late.feed(b"GET / HT")
    late.advance(60_000)
    assert read_responses(late.run())[0].body == b"app()"
    site.close()


def test_the_last_rule_for_a_field_wins(root: Path) -> None:
    site = Folder(
        root,
        headers=(
            HeaderRule("*", (("Cache-Control", "no-cache"), ("X-Frame-Options", "DENY"))),
            HeaderRule("/assets/*", (("cache-control", "immutable"), ("X-Frame-Options", ""))),
        ),
    )
    assert site.get("/app.js").headers["cache-control"] == "no-cache"
    for response in (site.get("/assets/logo.svg"), site.get("/assets/none")):
        assert response.headers["cache-control"] == "immutable"
        assert "x-frame-options" not in response.headers
    assert site.get("//assets/./logo.svg").headers["cache-control"] == "immutable"
    site.close()


def test_redirects_keep_method_and_queries(root: Path) -> None:
    site = Folder(
        root, redirects=(RedirectRule("/a/*", "/b?path=*#there", 307), RedirectRule("/all", "https://x.test/#top", 308))
    )
    posted = site.request("/a/x", "Content-Length: 0", method="POST")
    assert (posted.status, posted.headers["location"]) == (307, "/b?path=x#there")
    assert site.get("/a/x?q=1&r").headers["location"] == "/b?path=x&q=1&r#there"
    assert site.get("/all?q").headers["location"] == "https://x.test/?q#top"
    assert site.get("/all").headers["location"] == "https://x.test/#top"
    site.close()
    everything = Folder(root, redirects=(RedirectRule("*", "https://new.test*"),))
    assert everything.request("*", method="OPTIONS").status == 204
    assert everything.get("/").headers["location"] == "https://new.test/"
    everything.close()


def test_a_folder_is_no_fallback(root: Path) -> None:
    site = Folder(root, fallback="/assets")
    assert site.get("/none").status == 404
    assert site.get("/assets").headers["location"] == "/assets/"
    site.close()


def test_fallback_for_single_page_applications(root: Path) -> None:
    site = Folder(root, fallback="/index.html")
    for target in ("/", "/any/where", "/none.js"):
        response = site.get(target)
        assert (response.status, response.body) == (200, b"<p>index")
    assert site.get("/app.js").body == b"app()"
    assert site.get("/assets/").status == 403
    assert site.get("/../x").status == 403
    site.close()
    without = Folder(root, fallback="/gone.html")
    assert without.get("/none").status == 404
    without.close()


def test_several_index_names(root: Path) -> None:
    (root / "assets" / "main.htm").write_bytes(b"main")
    (root / "deep" / "index.html").mkdir(parents=True)
    (root / "deep" / "main.htm").write_bytes(b"deep")
    site = Folder(root, index=("index.html", "main.htm"))
    assert site.get("/assets/").body == b"main"
    assert site.get("/deep/").body == b"deep"
    assert site.get("/").body == b"<p>index"
    site.close()


def test_sites_answer_for_their_names_alone(root: Path) -> None:
    root_fd = os.open(root, os.O_PATH)
    sites = [
        Site(root_fd, names=("One.test", "*.wild.test")),
        Site(root_fd, names=("two.test",)),
        Site(root_fd),
    ]
    context = FileContext(sites)

    def status(site: int, host: str) -> int:
        connection = Loopback(context, site=site)
        return read_responses(connection.exchange(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()))[0].status

    assert status(0, "one.test") == 200
    assert status(0, "ONE.TEST.:8443") == 200
    assert status(0, "a.wild.test") == 200
    assert status(0, "a.b.wild.test") == 421
    assert status(0, "wild.test") == 421
    assert status(0, ".wild.test") == 421
    assert status(0, "two.test") == 421
    assert status(1, "one.test") == 421
    assert status(1, "two.test:1") == 200
    assert status(2, "anything") == 200
    assert status(2, "one.test") == 421, "it has a site of its own"
    assert status(2, "a.wild.test") == 421
    assert status(2 | SITE_BY_HOST, "anything") == 200
    absolute = Loopback(context, site=0).exchange(b"GET https://two.test/ HTTP/1.1\r\nHost: one.test\r\n\r\n")
    assert read_responses(absolute)[0].status == 421
    os.close(root_fd)


def test_without_a_server_name_each_host_has_its_site(tmp_path: Path) -> None:
    roots = []
    for name in ("one", "wild", "exact", "none"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.html").write_text(name)
        roots.append(os.open(tmp_path / name, os.O_PATH))
    sites = [
        Site(roots[0], names=("one.test",)),
        Site(roots[1], names=("*.wild.test",)),
        Site(roots[2], names=("a.wild.test",)),
    ]
    for given, other in ((sites, 421), ([*sites, Site(roots[3])], 200)):
        context = FileContext(given)
        connection = Loopback(context, site=(len(given) - 1) | SITE_BY_HOST)
        hosts = ("one.test", "b.wild.test", "a.wild.test", "ONE.test:8", "other.test")
        sent = b"".join(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode() for host in hosts)
        responses = read_responses(connection.exchange(sent))
        assert [r.body for r in responses[:4]] == [b"one", b"wild", b"exact", b"one"]
        assert responses[4].status == other
    for fd in roots:
        os.close(fd)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HeaderRule("x", ()), "begins with"),
        (lambda: HeaderRule("/*/*", ()), "one '\\*'"),
        (lambda: HeaderRule("/a?b", ()), "no query"),
        (lambda: RedirectRule("/a%20b", "/"), "write '/a b'"),
        (lambda: HeaderRule("*", (("X", "a\r\nY: b"),)), "control"),
        (lambda: HeaderRule("*", (("X Y", "a"),)), "field name"),
        (lambda: RedirectRule("/a", "/b", 200), "status 200"),
        (lambda: RedirectRule("/a", "/b/*"), "needs one"),
        (lambda: Site(0, index=("a/b",)), "plain file name"),
        (lambda: Site(0, fallback="x"), "beginning with"),
        (lambda: Site(0, error_pages={200: "/x"}), "not an error"),
        (lambda: Limits(ranges_max=65), "64 at most"),
        (lambda: Limits(body_bytes_max=-1), "from 0"),
        (lambda: Limits(head_bytes_max=1), "from 16"),
        (lambda: FileContext([]), "one site"),
        (lambda: Site(0, headers=(HeaderRule("*", (("X", "y"),)),) * 33), "more than 32"),
        (lambda: HeaderRule("*", (("Content-Length", "5"),)), "written by the server"),
        (lambda: HeaderRule("*", (("content-type", "text/html"),)), "media_type"),
        (lambda: RedirectRule("/a", "b"), "begins with"),
        (lambda: RedirectRule("/a", "/b c"), "percent-encode"),
        (lambda: Site(0, names=("https://a.test",)), "not a host name"),
        (lambda: Site(0, names=("a.test:443",)), "not a host name"),
        (lambda: Site(0, names=("*",)), "not a host name"),
        (lambda: Site(0, names=("bücher.test",)), "xn--bcher-kva.test"),
    ],
)
def test_wrong_settings_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
