"""HTTP sessions over memory: order, keep-alive, bodies, deadlines, the end of connections."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from kdaemon_pyx.http_config import Limits
from support.http import Folder, folder, read_responses

CLOSE_PEER, CLOSE_SERVICE, CLOSE_DEADLINE, CLOSE_DRAIN = 0, 1, 5, 10
BIG = os.urandom(300_000)
SMALL = b"small file\n"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Folder]:
    (tmp_path / "small.txt").write_bytes(SMALL)
    (tmp_path / "big.bin").write_bytes(BIG)
    (tmp_path / "empty").write_bytes(b"")
    yield from folder(tmp_path, Limits(body_bytes_max=1000, requests_per_connection_max=5))


def get(target: str, *headers: str, version: str = "1.1", method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {target} HTTP/{version}", "Host: a", *headers, "", ""]).encode()


def statuses(sent: bytes, methods: str = "") -> list[int]:
    return [response.status for response in read_responses(sent, methods)]


def test_keep_alive_and_pipelining_keep_the_order(site: Folder) -> None:
    connection = site.connection()
    sent = connection.exchange(get("/small.txt") + get("/big.bin") + get("/nothing") + get("/small.txt"))
    responses = read_responses(sent)
    assert [r.status for r in responses] == [200, 200, 404, 200]
    assert [r.body for r in responses[:2]] == [SMALL, BIG]
    assert responses[3].body == SMALL
    assert connection.finished is None
    assert connection.requests == 4


def test_nothing_more_is_read_while_a_file_goes_out(site: Folder) -> None:
    connection = site.connection()
    connection.feed(get("/big.bin") + get("/small.txt"))
    assert connection.unread == len(get("/small.txt"))
    assert statuses(connection.run()) == [200, 200]
    assert connection.unread == 0


@pytest.mark.parametrize("room", [4000, 5000, 20_000, 131_072])
def test_a_small_output_buffer_only_delays(site: Folder, room: int) -> None:
    connection = site.connection(output_bytes_max=room)
    sent = connection.exchange(
        get("/small.txt") + get("/big.bin", "Range: bytes=0-9,100000-150000,-1") + get("/nothing") + get("/big.bin")
    )
    responses = read_responses(sent)
    assert [r.status for r in responses] == [200, 206, 404, 200]
    assert responses[3].body == BIG


def test_head_has_no_body(site: Folder) -> None:
    sent = site.connection().exchange(
        get("/big.bin", method="HEAD") + get("/nothing", method="HEAD") + get("/small.txt")
    )
    responses = read_responses(sent, "HHG")
    assert [r.status for r in responses] == [200, 404, 200]
    assert responses[0].headers["content-length"] == str(len(BIG))


def test_connection_close(site: Folder) -> None:
    connection = site.connection()
    sent = connection.exchange(get("/big.bin", "Connection: close") + get("/small.txt"))
    responses = read_responses(sent)
    assert len(responses) == 1
    assert responses[0].headers["connection"] == "close"
    assert connection.finished == CLOSE_SERVICE


def test_http_1_0(site: Folder) -> None:
    connection = site.connection()
    kept = read_responses(connection.exchange(get("/small.txt", "Connection: keep-alive", version="1.0")))
    assert kept[0].headers["connection"] == "keep-alive"
    assert connection.finished is None
    closed = read_responses(connection.exchange(b"GET /small.txt HTTP/1.0\r\n\r\n"))
    assert closed[0].headers["connection"] == "close"
    assert connection.finished == CLOSE_SERVICE


def test_age_of_a_connection(tmp_path: Path) -> None:
    (tmp_path / "small.txt").write_bytes(SMALL)
    served = Folder(tmp_path, Limits(connection_age_ms_max=120_000))
    connection = served.connection()
    for expected in (None, None, "close"):
        (response,) = read_responses(connection.exchange(get("/small.txt")))
        assert response.headers.get("connection") == expected
        connection.advance(60_000)
    assert connection.finished == CLOSE_SERVICE
    served.close()


def test_requests_per_connection(site: Folder) -> None:
    connection = site.connection()
    responses = read_responses(connection.exchange(get("/small.txt") * 8))
    assert [r.headers.get("connection") for r in responses] == [None] * 4 + ["close"]
    assert connection.finished == CLOSE_SERVICE


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/3.0\r\nHost: a\r\n\r\n", 505),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n", 414),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 9000 + b"\r\n", 431),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1001\r\n\r\n", 413),
        (b"GET / HTTP/1.1\r\nHost: a\r\nExpect: tea\r\n\r\n", 417),
        (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
    ],
)
def test_refusals_close(site: Folder, request_bytes: bytes, status: int) -> None:
    connection = site.connection()
    responses = read_responses(connection.exchange(request_bytes + get("/small.txt")))
    assert [r.status for r in responses] == [status]
    assert responses[0].headers["connection"] == "close"
    assert responses[0].body.startswith(str(status).encode())
    assert connection.finished == CLOSE_SERVICE


def test_methods(site: Folder) -> None:
    connection = site.connection()
    sent = connection.exchange(
        get("/small.txt", method="TRACE") + get("/small.txt", method="DELETE") + get("*", method="OPTIONS")
    )
    responses = read_responses(sent)
    assert [r.status for r in responses] == [405, 405, 204]
    assert {r.headers["allow"] for r in responses} == {"GET, HEAD, OPTIONS"}
    assert connection.finished is None


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_bodies_are_skipped(site: Folder, step: int) -> None:
    stream = (
        get("/small.txt", "Content-Length: 15", method="POST")
        + b"GET / HTTP/1.1\n"
        + get("/small.txt", "Transfer-Encoding: chunked")
        + b"3\r\nabc\r\n0\r\nT: v\r\n\r\n"
        + get("/small.txt", "Content-Length: 0")
    )
    connection = site.connection()
    sent = b"".join(connection.exchange(stream[i : i + step]) for i in range(0, len(stream), step))
    assert statuses(sent) == [405, 200, 200]
    assert connection.finished is None


@pytest.mark.parametrize("step", [1, 100_000])
def test_a_malformed_or_endless_chunked_body_is_refused(site: Folder, step: int) -> None:
    for body, status in ((b"zz\r\n", 400), (b"fff\r\n", 413), (b"1\r\na\r\n" * 1000, 413), (b"1\r\nab\r\n", 400)):
        stream = get("/small.txt", "Transfer-Encoding: chunked") + body + get("/small.txt")
        connection = site.connection()
        sent = b"".join(connection.exchange(stream[i : i + step]) for i in range(0, len(stream), step))
        assert statuses(sent) == [status]
        assert connection.finished == CLOSE_SERVICE


def test_the_answer_waits_for_a_chunked_body(site: Folder) -> None:
    connection = site.connection()
    head = get("/small.txt", "Transfer-Encoding: chunked", "Connection: close")
    assert connection.exchange(head + b"1\r\na\r\n0\r\n") == b""
    connection.drain()
    assert connection.finished is None
    assert statuses(connection.exchange(b"\r\n")) == [200]
    assert connection.finished == CLOSE_SERVICE
    late = site.connection()
    late.exchange(head + b"1\r\n")
    late.advance(60_000)
    assert statuses(late.run()) == [408]
    assert late.finished == CLOSE_DEADLINE


def test_a_waiting_answer_without_room_comes_later(site: Folder) -> None:
    connection = site.connection(output_bytes_max=1000)
    connection.feed(
        get("/small.txt") + get("/small.txt", "Transfer-Encoding: chunked") + b"1\r\na\r\n0\r\n\r\n" + get("/none")
    )
    assert statuses(connection.run()) == [200, 200, 404]


def test_expect_continue(site: Folder) -> None:
    connection = site.connection()
    head = get("/small.txt", "Expect: 100-continue", "Content-Length: 3")
    assert statuses(connection.exchange(head)) == [100]
    assert statuses(connection.exchange(b"abc" + get("/small.txt"))) == [200, 200]
    posted = site.connection()
    responses = read_responses(
        posted.exchange(get("/small.txt", "Expect: 100-continue", "Content-Length: 3", method="POST"))
    )
    assert [r.status for r in responses] == [405]
    assert posted.finished == CLOSE_SERVICE


def test_header_deadline_is_of_the_whole_head(site: Folder) -> None:
    connection = site.connection()
    sent = b""
    for byte in get("/small.txt", "X: " + "y" * 80)[:-2]:
        sent += connection.exchange(bytes([byte]))
        connection.advance(1000)
        if connection.finished is not None:
            break
    sent += connection.run()
    assert statuses(sent) == [408]
    assert connection.finished == CLOSE_DEADLINE


def test_header_deadline_starts_anew_with_each_request(site: Folder) -> None:
    connection = site.connection()
    connection.exchange(get("/small.txt") + b"G")
    connection.advance(59_000)
    assert connection.finished is None
    assert statuses(connection.exchange(get("/small.txt")[1:] + b"GET /")) == [200]
    connection.advance(59_000)
    assert connection.finished is None
    connection.advance(1_000)
    assert statuses(connection.run()) == [408]


def test_silent_peers_are_closed_without_a_word(site: Folder) -> None:
    fresh = site.connection()
    fresh.advance(60_000)
    assert (fresh.run(), fresh.finished) == (b"", CLOSE_DEADLINE)
    idle = site.connection()
    idle.exchange(get("/small.txt"))
    idle.advance(73_000)
    idle.exchange(get("/small.txt"))
    idle.advance(74_000)
    assert idle.finished is None
    idle.advance(1_000)
    assert (idle.run(), idle.finished) == (b"", CLOSE_DEADLINE)


def test_body_deadline_is_between_pieces(site: Folder) -> None:
    connection = site.connection()
    connection.exchange(get("/small.txt", "Content-Length: 3"))
    connection.advance(59_000)
    connection.exchange(b"a")
    connection.advance(59_000)
    assert connection.finished is None
    connection.advance(1_000)
    assert connection.finished == CLOSE_DEADLINE


def test_no_deadline_of_ours_while_a_response_goes_out(site: Folder) -> None:
    connection = site.connection()
    connection.feed(get("/big.bin"))
    assert connection.deadline_ms is None
    connection.run()
    assert connection.deadline_ms == 75_000


def test_end_of_data_after_pipelined_requests(site: Folder) -> None:
    connection = site.connection()
    connection.feed(get("/big.bin") + get("/small.txt"))
    connection.end_of_data()
    assert connection.finished is None
    assert statuses(connection.run()) == [200, 200]
    assert connection.finished == CLOSE_PEER


def test_end_of_data_when_idle_or_in_a_head(site: Folder) -> None:
    for data in (b"", get("/small.txt"), b"GET /sma"):
        connection = site.connection()
        connection.exchange(data)
        connection.end_of_data()
        assert connection.finished == CLOSE_PEER


def test_drain(site: Folder) -> None:
    idle = site.connection()
    idle.exchange(get("/small.txt"))
    idle.drain()
    assert idle.finished == CLOSE_DRAIN
    sending = site.connection()
    sending.feed(get("/big.bin"))
    sending.drain()
    assert sending.finished is None
    assert statuses(sending.run()) == [200]
    assert sending.finished == CLOSE_DRAIN
    asking = site.connection()
    asking.feed(b"GET /small.txt HTTP/1.1\r\n")
    asking.drain()
    assert asking.finished is None
    responses = read_responses(asking.exchange(b"Host: a\r\n\r\n"))
    assert responses[0].headers["connection"] == "close"
    assert asking.finished == CLOSE_SERVICE


def test_empty_files(site: Folder) -> None:
    sent = site.connection().exchange(get("/empty") + get("/empty", "Range: bytes=0-") + get("/small.txt"))
    assert statuses(sent) == [200, 200, 200]
