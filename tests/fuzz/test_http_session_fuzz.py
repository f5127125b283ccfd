"""HTTP sessions on generated streams: however input is split and however small the output, the answers are the same."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kdaemon_pyx.http_config import Limits
from support.http import Folder, age, folder

requests = st.builds(
    lambda method, target, version, fields, body: (
        b" ".join([method, target, version])
        + b"\r\nHost: a\r\n"
        + b"".join(f + b"\r\n" for f in fields)
        + b"\r\n"
        + body
    ),
    st.sampled_from([b"GET"] * 6 + [b"HEAD", b"POST", b"OPTIONS", b"G T"]),
    st.sampled_from(
        [b"/small", b"/big", b"/dir", b"/dir/", b"/none", b"/../x", b"/%00", b"*", b"//small", b"/.hidden"]
    ),
    st.sampled_from([b"HTTP/1.1"] * 8 + [b"HTTP/1.0", b"HTTP/2.0"]),
    st.lists(
        st.sampled_from(
            [
                b"Range: bytes=0-4",
                b"Range: bytes=0-1,5-70000,-3",
                b"Range: bytes=999999999-",
                b"Connection: close",
                b"If-None-Match: *",
                b'If-Match: "x"',
                b"Accept-Encoding: gzip",
                b"X: \x01",
                b"Expect: 100-continue",
            ]
        ),
        max_size=3,
        unique=True,
    ),
    st.sampled_from([b""] * 6 + [b"junk", b"\r\n"]),
)
bodies = st.sampled_from(
    [
        b"GET /small HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody",
        b"POST /small HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n",
        b"GET /small HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbodyX",
    ]
)
streams = st.lists(st.one_of(requests, requests, bodies), min_size=1, max_size=6).map(b"".join)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folder]:
    root = tmp_path_factory.mktemp("site")
    (root / "dir").mkdir()
    (root / "small").write_bytes(b"small content")
    (root / "small.gz").write_bytes(b"pretend")
    (root / ".hidden").write_bytes(b"hidden")
    (root / "big").write_bytes(os.urandom(80_000))
    for path in root.iterdir():
        age(path)
    yield from folder(root, Limits(body_bytes_max=100), precompressed=True)


def without_what_may_differ(sent: bytes) -> bytes:
    """The time, the boundary of parts, and how often the client is told to go on may differ from run to run."""
    sent = re.sub(rb"\r\nDate: [^\r]+", b"", sent)
    sent = re.sub(rb"(boundary=|\r\n--)[0-9a-f]{16}", b"", sent)
    return sent.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stream=streams, step=st.integers(1, 50), room=st.sampled_from([4000, 9000, 200_000]))
def test_splits_and_room_change_nothing(site: Folder, stream: bytes, step: int, room: int) -> None:
    whole = site.connection(output_bytes_max=1 << 20)
    expected = whole.exchange(stream)
    split = site.connection(output_bytes_max=room)
    sent = b"".join(split.exchange(stream[i : i + step]) for i in range(0, len(stream), step))
    assert split.finished == whole.finished
    assert without_what_may_differ(sent) == without_what_may_differ(expected)
