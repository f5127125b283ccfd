"""What a site can be told: names, header fields per path, redirects, fallback, pages for errors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from kdaemon_pyx.http_config import HeaderRule, Limits, RedirectRule, Site
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
    absolute = Loopback(context, site=0).exchange(b"GET https://two.test/ HTTP/1.1\r\nHost: one.test\r\n\r\n")
    assert read_responses(absolute)[0].status == 421
    os.close(root_fd)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HeaderRule("x", ()), "begins with"),
        (lambda: HeaderRule("/*/*", ()), "one '\\*'"),
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
        (lambda: FileContext([Site(0, headers=(HeaderRule("*", ()),) * 33)]), "32 at most"),
    ],
)
def test_wrong_settings_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
