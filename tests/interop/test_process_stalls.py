"""Processes that stand still without dying: every wait on them has a deadline, and the daemon says who it is."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from interop.process_support import Connection, facts, pid_of, stop_and_wait, workers
from support.certificates import Issued
from support.daemon import Daemon, control, serve
from support.waiting import DEADLINE_S, eventually

Serve = Callable[..., Daemon]


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process stands still inside the block."""
    stop_and_wait(pid)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_status_is_answered_while_a_worker_stands_still(daemon: Daemon) -> None:
    with stopped(pid_of(daemon, "worker")):
        first, second = workers(daemon)
        assert (first["responding"], second["responding"]) == (False, True)
        assert "worker 0: pid" in control(daemon, "status").stdout
        assert "does not respond" in control(daemon, "status").stdout
    eventually(lambda: workers(daemon)[0]["responding"], "it answers again")


def test_a_keymgr_that_stands_still_costs_handshakes_at_the_signing_deadline(
    site: Path, issued: Issued, tmp_path: Path
) -> None:
    file = tmp_path / "kdaemon.toml"
    file.write_text("[deadlines]\nsigning_ms = 300\nhandshake_ms = 60000\n")
    with serve(site, "--config", str(file), "--workers", "1", issued=issued) as daemon, Connection(daemon) as early:
        assert early.works()
        context = ssl.create_default_context(cafile=str(daemon.ca))
        with stopped(pid_of(daemon, "keymgr")):
            began = time.monotonic()
            with (
                socket.create_connection(daemon.address, DEADLINE_S) as plain,
                pytest.raises(ssl.SSLError, match=r"(?i)internal.error"),
            ):
                context.wrap_socket(plain, server_hostname="localhost")
            assert time.monotonic() - began < DEADLINE_S
            assert early.works(), "established connections need no keymgr"
            assert facts(daemon)["workers"][0]["handshake_failures"] == {"InternalError": 1}
        with Connection(daemon) as connection:
            assert connection.works()


def test_a_worker_that_stands_still_does_not_keep_the_daemon_from_its_end(site: Path, issued: Issued) -> None:
    """It is killed some seconds after the drain deadline; the exit status says that connections were cut."""
    with serve(site, "--workers", "2", "--drain-ms", "100", issued=issued, ends_by_itself=True) as daemon:
        stop_and_wait(pid_of(daemon, "worker"))
        daemon.stop(status=1)
        assert b"did not leave in time" in daemon.stderr
