"""The access log: lines, escaping, the ring, a full disk."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from kdaemon_pyx.http_config import Site
from kdaemon_pyx.http_context import FileContext
from kdaemon_pyx.http_log import AccessLog
from kdaemon_pyx.http_loopback import Loopback
from support.waiting import eventually

from kdaemon.access_log import AccessLogWriter


def serve(root: Path, log: AccessLog, *requests: bytes) -> FileContext:
    context = FileContext([Site(os.open(root, os.O_PATH))], log=log)
    for request in requests:
        Loopback(context).exchange(request)
    return context


def lines(log: AccessLog, path: Path) -> list[str]:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    log.drain(fd)
    assert log.drain(fd) == 0
    os.close(fd)
    return path.read_text("ascii").splitlines()


EVIL = b'GET /a"\\\xff HTTP/1.1\r\nHost: a\r\nReferer: "x"\t\r\nUser-Agent: a\tb\x80\r\n\r\n'


def test_combined(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"content")
    log = AccessLog()
    serve(
        tmp_path,
        log,
        b"GET /a.txt?q HTTP/1.1\r\nHost: a\r\nReferer: https://b/\r\nUser-Agent: curl/8\r\n\r\n",
        b"HEAD /a.txt HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /a.txt HTTP/1.1\r\nHost: a\r\nRange: bytes=0-2\r\n\r\n",
        b"GET /a.txt HTTP/1.1\r\nHost: a\r\nIf-None-Match: *\r\n\r\n",
        EVIL,
        b"nonsense\n",
        b"nonsense\r\n\r\n",
        b"GET /%b HTTP/1.1\r\n" % (b"a" * 9000),
        b"GET / HTTP/1.1\r\nHost: a\r\nUser-Agent:\r\n\r\n",
    )
    found = lines(log, tmp_path / "log")
    time = r"\[\d\d/[A-Z][a-z][a-z]/\d{4}:\d\d:\d\d:\d\d \+0000\]"
    assert re.fullmatch(rf'192\.0\.2\.1 - - {time} "GET /a\.txt\?q HTTP/1\.1" 200 7 "https://b/" "curl/8"', found[0])
    assert [line.split('" ')[1].split(" ")[:2] for line in found[1:4]] == [["200", "0"], ["206", "3"], ["304", "0"]]
    assert r'"GET /a\x22\x5C\xFF HTTP/1.1" 404' in found[4]
    assert found[4].endswith(r'"\x22x\x22" "a\x09b\x80"')
    assert '"nonsense" 400' in found[5]
    assert '"nonsense" 400' in found[6]
    assert re.search(r'"GET /a{2043}" 414 \d+ "-" "-"$', found[7])
    assert found[8].endswith('"-" ""')
    assert len(found) == 9


def test_the_line_of_a_transfer_waits_for_its_end(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_bytes(bytes(50_000))  # in memory
    (tmp_path / "file.bin").write_bytes(bytes(200_000))  # by the connection's file range
    log = AccessLog()
    context = FileContext([Site(os.open(tmp_path, os.O_PATH))], log=log)
    several = b"Range: bytes=0-9,1000-100999,-1\r\n"

    def bytes_logged() -> list[int]:
        found = [int(line.split()[9]) for line in lines(log, tmp_path / "log")]
        (tmp_path / "log").unlink()
        return found

    def begin(target: bytes, more: bytes = b"", flushes: int = 0) -> Loopback:
        connection = Loopback(context, output_bytes_max=4096)
        connection.feed(b"GET %b HTTP/1.1\r\nHost: a\r\n%b\r\n" % (target, more))
        for _ in range(flushes):
            assert connection.flush()
        assert bytes_logged() == []
        return connection

    for target, more, size in (
        (b"/kept.txt", b"", 50_000),
        (b"/file.bin", b"", 200_000),
        (b"/file.bin", b"Range: bytes=5-\r\n", 199_995),
    ):
        begin(target, more).run()
        assert bytes_logged() == [size]
    begin(b"/file.bin", several).run()
    (whole,) = bytes_logged()
    assert whole > 100_011  # with the heads of the parts
    connection = begin(b"/kept.txt", flushes=2)
    del connection
    (part,) = bytes_logged()
    assert 4096 < part < 3 * 4096
    connection = begin(b"/file.bin", several, flushes=1)  # the first part is out, the second one just queued
    del connection
    assert bytes_logged() == [10]
    connection = begin(b"/file.bin")
    del connection
    assert bytes_logged() == [0]


def test_json(tmp_path: Path) -> None:
    log = AccessLog("json")
    serve(tmp_path, log, EVIL)
    (line,) = lines(log, tmp_path / "log")
    entry = json.loads(line)
    assert entry["client"] == "192.0.2.1"
    assert entry["request"] == 'GET /a"\\\xff HTTP/1.1'
    assert entry["user_agent"] == "a\tb\x80"
    assert (entry["status"], entry["host"]) == (404, "a")
    assert entry["time"] > 1_700_000_000


def test_json_keeps_utf_8(tmp_path: Path) -> None:
    log = AccessLog("json")
    agent = "\U0001f600 ä\u2028".encode() + b"\xc3\xed\xa0\x80\xf0\x9f\x98"
    serve(tmp_path, log, b"GET / HTTP/1.1\r\nHost: a\r\nUser-Agent: " + agent + b"\r\n\r\n")
    fd = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    log.drain(fd)
    os.close(fd)
    entry = json.loads((tmp_path / "log").read_bytes())
    assert entry["user_agent"] == "\U0001f600 ä\u2028\xc3\xed\xa0\x80\xf0\x9f\x98"


def test_long_fields_are_cut_not_dropped(tmp_path: Path) -> None:
    log = AccessLog()
    serve(
        tmp_path,
        log,
        b"GET /" + b"\xff" * 4000 + b" HTTP/1.1\r\nHost: a\r\nUser-Agent: " + b"\xff" * 8000 + b"\r\n\r\n",
    )
    (line,) = lines(log, tmp_path / "log")
    assert " 404 " in line
    assert line.endswith('"')


def test_a_full_ring_drops_lines_and_the_order_wraps(tmp_path: Path) -> None:
    log = AccessLog(ring_bytes=4096)
    context = serve(tmp_path, log)
    connection = Loopback(context)
    path = tmp_path / "log"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in range(300):
        connection.exchange(b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n" % number)
        if number % 20 == 19:
            log.wait(0)
            log.drain(fd)
    os.close(fd)
    assert log.counters() == {"log_lines": 300, "log_dropped": 0}
    assert [int(n) for n in re.findall(r'"GET /(\d+) ', path.read_text())] == list(range(300))
    for number in range(200):
        connection.exchange(b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n" % number)
    counters = log.counters()
    assert counters["log_dropped"] > 100
    assert counters["log_lines"] + counters["log_dropped"] == 500


def test_waiting_ends_when_the_ring_is_half_full(tmp_path: Path) -> None:
    log = AccessLog(ring_bytes=4096)
    serve(tmp_path, log, *[b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"] * 30)
    log.wait(60.0)
    log.wake()
    log.wait(60.0)


def test_a_full_disk_is_an_error_and_passes(tmp_path: Path) -> None:
    log = AccessLog()
    serve(tmp_path, log, b"GET /one HTTP/1.1\r\nHost: a\r\n\r\n")
    full = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(OSError, match="No space"):
        log.drain(full)
    os.close(full)
    (line,) = lines(log, tmp_path / "log")
    assert '"GET /one HTTP/1.1"' in line


class Messages:
    """A log that remembers the level and the fields of each message."""

    def __init__(self) -> None:
        self.said: list[tuple[str, dict[str, object]]] = []

    def error(self, _event: str, **fields: object) -> None:
        self.said.append(("error", fields))

    def info(self, _event: str, **fields: object) -> None:
        self.said.append(("info", fields))


def test_the_writer_tells_once_that_it_cannot_write_and_when_it_can_again(tmp_path: Path) -> None:
    ring, messages = AccessLog(), Messages()
    writer = AccessLogWriter(ring, "/var/log/access.log", messages)
    path = tmp_path / "log"
    try:
        writer.use(os.open("/dev/full", os.O_WRONLY))
        serve(tmp_path, ring, b"GET /one HTTP/1.1\r\nHost: a\r\n\r\n")
        ring.wake()
        eventually(lambda: messages.said, "the writer has tried")
        writer.use(os.open("/dev/full", os.O_WRONLY))  # tries again before it lets go of the old one
        writer.use(os.open(path, os.O_WRONLY | os.O_CREAT))
        ring.wake()
        eventually(lambda: len(messages.said) > 1, "the writer has written")
    finally:
        writer.close()
    (level, failure), (then, success) = messages.said
    assert (level, failure["path"], failure["problem"]) == ("error", "/var/log/access.log", "No space left on device")
    assert (then, success) == ("info", {"path": "/var/log/access.log", "dropped": 0})
    assert '"GET /one HTTP/1.1"' in path.read_text("ascii")


def test_a_line_cut_by_a_full_disk_ends_where_it_was_cut(tmp_path: Path) -> None:
    log = AccessLog()
    serve(tmp_path, log, *[b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n" % number for number in range(100)])
    reader, writer = os.pipe2(os.O_NONBLOCK)
    filler = os.write(writer, b"x" * (1 << 20))
    os.read(reader, 4096)
    assert log.drain(writer) == 4096
    os.read(reader, filler - 4096)
    start = os.read(reader, 4096)
    os.close(reader)
    os.close(writer)
    rest = lines(log, tmp_path / "log")
    assert rest[0] == ""
    whole = start.decode().splitlines()
    assert [
        int(n) for n in re.findall(r'"GET /(\d+) ', "\n".join([*whole[:-1], whole[-1] + rest[1], *rest[2:]]))
    ] == list(range(100))
