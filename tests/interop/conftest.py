"""One daemon for all bad input of a kind: it must still serve after each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.certificates import Issued
from support.clients import fetch
from support.content import pattern
from support.daemon import HANDSHAKE_DEADLINE_MS, Daemon, serve, status
from support.rings import Peer, worker
from support.waiting import eventually

from libtls import Lane


@pytest.fixture(scope="session")
def victim_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small.txt` (1 KiB) and `sparse.bin` (64 MiB of a hole, larger than any buffer on the way)."""
    directory = tmp_path_factory.mktemp("site")
    (directory / "small.txt").write_bytes(pattern(1024))
    with (directory / "sparse.bin").open("wb") as file:
        file.truncate(64 << 20)
    return directory


RECORD_LAYERS = ["off", pytest.param("require", marks=pytest.mark.guest)]


@pytest.fixture(scope="module", params=RECORD_LAYERS)
def victim(request: pytest.FixtureRequest, victim_site: Path, issued: Issued) -> Iterator[Daemon]:
    """A daemon with one worker, in user mode and, where the kernel has it, in kernel mode.

    At the end it must stop cleanly with every socket given back, as always.
    """
    with serve(victim_site, "--workers", "1", "--ktls", request.param, issued=issued) as daemon:
        yield daemon


@pytest.fixture(scope="module", params=RECORD_LAYERS)
def impatient(
    request: pytest.FixtureRequest, victim_site: Path, issued: Issued, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Daemon]:
    """The same with a handshake deadline of HANDSHAKE_DEADLINE_MS; it must serve at the end, too."""
    configuration = tmp_path_factory.mktemp("configuration") / "kdaemon.toml"
    configuration.write_text(f"[deadlines]\nhandshake_ms = {HANDSHAKE_DEADLINE_MS}\n")
    arguments = ("--workers", "1", "--ktls", request.param, "--config", str(configuration))
    with serve(victim_site, *arguments, issued=issued) as daemon:
        yield daemon
        assert fetch(daemon.address, daemon.ca).body == pattern(1024)


@pytest.fixture
def still_serves(victim: Daemon) -> Iterator[Callable[[], None]]:
    """Asserts that the daemon serves a whole file; does so at the end of the test in any case."""
    processes = victim.pids

    def check() -> None:
        response = fetch(victim.address, victim.ca)
        assert (response.status, response.body, response.truncated) == (200, pattern(1024), False)

    yield check
    check()
    assert victim.pids == processes, "a process of the daemon was replaced"


# For libtls; modules with needs of their own have fixtures of these names


@pytest.fixture(scope="module", params=["off", pytest.param("require", marks=pytest.mark.guest)])
def daemon(
    request: pytest.FixtureRequest, issued: Issued, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Daemon]:
    directory: Path = tmp_path_factory.mktemp("site")
    (directory / "index.html").write_bytes(b"<!doctype html><title>kdaemon</title>\n")
    (directory / "page").write_bytes(pattern(100_000))
    (directory / "large.bin").write_bytes(pattern(1 << 20))
    arguments = ("--workers", "1", "--ktls", request.param)
    with serve(directory, *arguments, issued=issued, ends_by_itself=True) as daemon:
        yield daemon
        daemon.stop()


@pytest.fixture
def lane(daemon: Daemon) -> Iterator[Lane]:
    lane = Lane.attach(daemon.socket_path)
    yield lane
    lane.close()
    eventually(lambda: not status(daemon)["clients"], "the client is detached")
    eventually(lambda: worker(daemon)["connections"] == 0, "its connections are closed")


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.listener.close()
