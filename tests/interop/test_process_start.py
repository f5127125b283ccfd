"""How the daemon starts and refuses to start: ports, certificates, sockets, limits, and what it says about each."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from interop.process_support import Connection, facts, workers
from support.certificates import Issued
from support.daemon import Daemon, control, environment, serve
from support.waiting import DEADLINE_S, eventually

from libtls import Lane

Serve = Callable[..., Daemon]


@pytest.fixture
def daemon(kdaemon: Callable[..., Daemon]) -> Daemon:
    """Two workers, for each test anew (conftest's is one for all of a module, for libtls)."""
    return kdaemon("--workers", "2")


def refused(folder: Path, arguments: Sequence[str], prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """`kdaemon serve` with arguments it must refuse."""
    return subprocess.run(
        [*prefix, sys.executable, "-m", "kdaemon", "serve", str(folder), *arguments],
        env=environment("refused", folder),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def one_line(text: str) -> str:
    (line,) = text.splitlines()
    assert line.startswith("kdaemon: ")
    return line


def test_a_second_daemon_on_the_port_is_refused(daemon: Daemon, tmp_path: Path) -> None:
    completed = refused(tmp_path, ["--listen", f"127.0.0.1:{daemon.port}"])
    assert completed.returncode == 1
    assert f"cannot listen on 127.0.0.1:{daemon.port}: the port is already taken" in one_line(completed.stderr)
    assert completed.stdout == ""
    with Connection(daemon) as connection:
        assert connection.works()


def test_a_port_taken_by_a_stranger(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        completed = refused(tmp_path, ["--listen", f"127.0.0.1:{stranger.getsockname()[1]}"])
    assert completed.returncode == 1
    assert "already taken" in one_line(completed.stderr)


def test_a_key_of_another_certificate_is_a_configuration_error(
    tmp_path: Path, make_issued: Callable[..., Issued]
) -> None:
    one, other = make_issued(), make_issued()
    completed = refused(tmp_path, ["--listen", "127.0.0.1:0", "--cert", str(one.certificate), "--key", str(other.key)])
    assert completed.returncode == 2
    assert "does not belong to the certificate" in one_line(completed.stderr)


def test_an_expired_certificate_is_a_warning(kdaemon: Serve, make_issued: Callable[..., Issued]) -> None:
    daemon = kdaemon(issued=make_issued(expired=True))
    assert b"expired on" in daemon.stderr
    context = ssl.create_default_context(cafile=str(daemon.ca))
    with socket.create_connection(daemon.address, DEADLINE_S) as plain, pytest.raises(ssl.SSLCertVerificationError):
        context.wrap_socket(plain, server_hostname="localhost")


def test_the_self_signed_certificate_is_told_kept_and_enough_for_a_client(kdaemon: Serve) -> None:
    daemon = kdaemon(issued=None)
    folder = daemon.stderr_path.parent / "state" / "kdaemon"
    with Connection(daemon, ca=folder / "localhost.crt") as connection:
        assert connection.works()
        der = connection.socket.getpeercert(binary_form=True)
    assert facts(daemon)["certificates"][0]["sha256"].encode() in daemon.stderr
    assert der is not None


@pytest.mark.parametrize("listeners", [("127.0.0.1:0",), ("127.0.0.1:0", "127.0.0.1:0", "[::1]:0")])
def test_one_ready_line_for_each_address_and_nothing_else(
    site: Path, issued: Issued, listeners: tuple[str, ...]
) -> None:
    with serve(site, issued=issued, listeners=listeners) as daemon:
        assert len({ready.port for ready in daemon.ready}) == len(listeners)
        for ready in daemon.ready:
            assert ready.backend in ("kernel", "user")
            socket.create_connection((ready.host, ready.port), DEADLINE_S).close()
        daemon.stop()
        assert daemon.process.stdout is not None
        assert daemon.process.stdout.read() == b""


def test_two_daemons_of_one_user_run_side_by_side(site: Path, issued: Issued) -> None:
    with serve(site, issued=issued) as first:
        shared = {"XDG_RUNTIME_DIR": str(first.stderr_path.parent)}
        with serve(site, issued=issued, extra_environment=shared) as second:
            for daemon in (first, second):
                with Connection(daemon) as connection:
                    assert connection.works()
            assert b"another daemon" in second.stderr
            name = f"kdaemon-{second.process.pid}.sock"
            completed = control(first, "status", "--json", "--socket", str(first.stderr_path.parent / name))
            assert f'"pid": {second.process.pid}' in completed.stdout
        assert facts(first)["pid"] == first.process.pid


def test_the_same_command_can_be_run_again(site: Path, issued: Issued) -> None:
    with serve(site, issued=issued) as daemon:
        address = f"127.0.0.1:{daemon.port}"
        with Connection(daemon) as connection:
            assert connection.works()
    with serve(site, issued=issued, listeners=(address,)) as daemon, Connection(daemon) as connection:
        assert connection.works()


def test_the_folder_that_is_served_is_never_imported_from(site: Path, issued: Issued, tmp_path: Path) -> None:
    for name in ("socket.py", "json.py", "kdaemon.py"):
        (site / name).write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\n")
    command = ("env", "-C", str(site))
    path = os.pathsep.join(entry for entry in sys.path if entry)
    with serve(site, issued=issued, prefix=command, extra_environment={"PYTHONSAFEPATH": "1", "PYTHONPATH": path}):
        assert not (tmp_path / "imported").exists()


def test_status_has_what_the_contract_says(daemon: Daemon) -> None:
    with Connection(daemon) as connection:
        assert connection.works()
        status = facts(daemon)
    assert {"version", "kernel", "ktls", "workers", "clients"} <= set(status)
    assert {"mode", "available", "reason"} <= set(status["ktls"])
    assert status["kernel"] == os.uname().release
    assert len(status["workers"]) == 2
    for worker in status["workers"]:
        assert {"pid", "cpu", "connections", "accepted", "handshakes", "record_layer", "bytes_in", "bytes_out"} <= set(
            worker
        )
        assert set(worker["handshakes"]) == {"full", "resumed", "failed"}
        assert {"kernel", "user"} <= set(worker["record_layer"])
    total = {key: sum(worker[key] for worker in status["workers"]) for key in ("connections", "accepted", "bytes_out")}
    assert total["connections"] == total["accepted"] == 1
    assert total["bytes_out"] >= 1024
    assert sum(worker["handshakes"]["full"] for worker in status["workers"]) == 1
    assert sum(sum(worker["record_layer"].values()) for worker in status["workers"]) == 1
    completed = control(daemon, "status")
    assert completed.returncode == 0
    assert "worker 1: pid" in completed.stdout


def test_status_names_each_attached_program(daemon: Daemon) -> None:
    with closing(Lane.attach(daemon.socket_path)):
        (client,) = facts(daemon)["clients"]
    assert {"pid", "uid", "operations", "connections"} <= set(client)
    assert (client["pid"], client["uid"], client["connections"]) == (os.getpid(), os.getuid(), 0)


def test_the_reason_for_the_record_layer_is_counted_and_told_once_by_each_worker(kdaemon: Serve) -> None:
    daemon = kdaemon("--workers", "1", "--ktls", "off")
    for _ in range(5):
        with Connection(daemon) as connection:
            assert connection.works()
    (worker,) = workers(daemon)
    (counted,) = worker["record_layer_reasons"]
    assert (counted["backend"], counted["count"]) == ("user", 5)
    assert counted["reason"] == daemon.ready[0].reason
    assert daemon.stderr.count(b"record layer") == 1


def test_ctl_without_a_daemon_exits_with_1(tmp_path: Path) -> None:
    completed = subprocess.run(
        [sys.executable, "-m", "kdaemon", "ctl", "status", "--socket", str(tmp_path / "none.sock")],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        env=environment("none", tmp_path),
    )
    assert completed.returncode == 1
    assert "no kdaemon listens there" in one_line(completed.stderr)


def test_ktls_required_where_there_is_none_is_refused(daemon: Daemon, tmp_path: Path) -> None:
    if facts(daemon)["ktls"]["available"]:
        pytest.skip("this kernel has kTLS")
    completed = refused(tmp_path, ["--listen", "127.0.0.1:0", "--ktls", "require"])
    assert completed.returncode == 1
    assert "ktls is required and cannot be used" in one_line(completed.stderr)
    assert completed.stdout == ""


def test_with_1024_files_2000_clients_are_served_or_refused_and_the_daemon_recovers(kdaemon: Serve) -> None:
    daemon = kdaemon("--workers", "2", prefix=("prlimit", "--nofile=1024:1024"))
    with Connection(daemon) as early:
        assert early.works()
        with ExitStack() as stack:
            for _ in range(2000):
                stack.enter_context(socket.create_connection(daemon.address, DEADLINE_S))
            eventually(
                lambda: sum(worker["accepted"] for worker in workers(daemon)) > 1500,
                "they are accepted up to the limit",
            )
            # A connection from before is answered all the while, with 503 where a file cannot be opened again
            assert early.response()[0] in (200, 503)
        eventually(lambda: sum(worker["connections"] for worker in workers(daemon)) == 1, "all the others are gone")
        for _ in range(8):
            with Connection(daemon) as connection:
                assert connection.works()
        assert early.works()
    assert [worker["restarts"] for worker in workers(daemon)] == [0, 0]
