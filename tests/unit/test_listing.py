"""Listings of directories."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.http import Folder, folder


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Folder]:
    (tmp_path / "Zebra").mkdir()
    (tmp_path / "apple.txt").write_bytes(b"x" * 1536)
    (tmp_path / "Banana.bin").write_bytes(b"x" * 12_345_678)
    (tmp_path / "<b> & 'q\".txt").write_bytes(b"")
    (tmp_path / "javascript:alert(1)").write_bytes(b"")
    (tmp_path / ".hidden").write_bytes(b"")
    (tmp_path / "link-out").symlink_to("/etc/passwd")
    (tmp_path / "link-to-nothing").symlink_to("nothing")
    (tmp_path / "link-to-folder").symlink_to("Zebra")
    (tmp_path / "Zebra" / "link-up").symlink_to("../apple.txt")
    os.mkfifo(tmp_path / "fifo")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff\n.txt")).write_bytes(b"")
    os.utime(tmp_path / "apple.txt", (784111777, 784111777))
    yield from folder(tmp_path, listing=True)


def test_html(site: Folder) -> None:
    response = site.get("/")
    page = response.body.decode("utf-8", "replace")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["vary"] == "Accept"
    assert "etag" not in response.headers
    names = re.findall(r'<a href="([^"]*)">', page)
    assert names == [
        "./link-to-folder/",
        "./Zebra/",
        "./%3Cb%3E%20%26%20%27q%22.txt",
        "./apple.txt",
        "./bad%FF%0A.txt",
        "./Banana.bin",
        "./javascript%3Aalert%281%29",
    ]
    assert "&lt;b&gt; &amp; 'q&quot;.txt</a>" in page
    assert "<td>1.5 kB</td><td>06 Nov 1994 08:49</td>" in page
    assert "<td>12 MB</td>" in page
    assert '<a href="../">../</a>' in site.get("/Zebra/").body.decode()


def test_the_way_up_is_linked_and_emptiness_said(site: Folder) -> None:
    (site.root / "Zebra" / "a & b" / "c").mkdir(parents=True)
    page = site.get("/Zebra/a%20&%20b/c/").body.decode()
    assert '<h1><a href="../../../">/</a><a href="../../">Zebra/</a><a href="../">a &amp; b/</a>c/</h1>' in page
    assert "<p>This folder is empty." in page
    assert b"empty" not in site.get("/").body


@pytest.mark.parametrize("accept", ["application/json", "Application/JSON;q=0.9, text/html;q=0.1"])
def test_json(site: Folder, accept: str) -> None:
    response = site.get("/", f"Accept: {accept}")
    assert response.headers["content-type"] == "application/json"
    rows = {row["name"]: row for row in json.loads(response.body)}
    assert rows["Zebra"]["type"] == "directory"
    assert rows["apple.txt"] == {
        "name": "apple.txt",
        "type": "file",
        "mtime": "Sun, 06 Nov 1994 08:49:37 GMT",
        "size": 1536,
    }
    assert "bad\ufffd\n.txt" in rows
    assert "<b> & 'q\".txt" in rows
    assert ".hidden" not in rows
    assert rows.keys().isdisjoint({"link-out", "link-to-nothing"})
    assert rows["link-to-folder"]["type"] == "directory"
    (linked,) = json.loads(site.get("/Zebra/", f"Accept: {accept}").body)
    assert (linked["name"], linked["type"], linked["size"]) == ("link-up", "file", 1536)


def test_a_browser_gets_html(site: Folder) -> None:
    response = site.get("/", "Accept: text/html,application/xhtml+xml,application/json;q=0.9,*/*;q=0.8")
    assert response.headers["content-type"].startswith("text/html")


def test_an_index_wins_and_off_is_403(site: Folder) -> None:
    (site.root / "Zebra" / "index.html").write_bytes(b"index")
    assert site.get("/Zebra/").body == b"index"
    assert site.get("/Zebra").status == 301
    without = Folder(site.root)
    assert without.get("/").status == 403
    without.close()


def test_long_listings_are_sent_whole_or_say_so(tmp_path: Path) -> None:
    for number in range(5100):
        (tmp_path / f"{number:06d}").touch()
    site = Folder(tmp_path, listing=True)
    response = site.get("/", output_bytes_max=8192)
    assert response.body.count(b"<tr>") == 5001
    assert b"There is more here" in response.body
    assert len(json.loads(site.get("/", "Accept: application/json").body)) == 5000
    site.close()


def test_changes_are_seen_after_a_second(site: Folder) -> None:
    connection = site.connection()
    request = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    assert b"./fresh" not in connection.exchange(request)
    (site.root / "fresh").touch()
    connection.advance(1000)
    assert b"./fresh" in connection.exchange(request)
    assert connection.requests == 2
