"""How the daemon ends and changes under way: drain, deadlines, reload. Nobody loses a byte that they need not lose."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
from interop.process_support import Connection, facts, pid_of
from support.certificates import Issued
from support.daemon import Daemon, control, serve
from support.waiting import DEADLINE_S, eventually

Serve = Callable[..., Daemon]
MIB = 1 << 20


def random_file(path: Path, size: int) -> str:
    """Fills the file with incompressible bytes; returns their SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for _ in range(size // MIB):
            block = os.urandom(MIB)
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


class Download:
    """A response read at the test's own pace."""

    def __init__(self, daemon: Daemon, path: str) -> None:
        self.connection = Connection(daemon)
        self.connection.socket.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        data = b""
        while b"\r\n\r\n" not in data:
            data += self.connection.socket.recv(4096)
        _, _, body = data.partition(b"\r\n\r\n")
        self.digest = hashlib.sha256(body)
        self.received = len(body)

    def read(self, size: int) -> None:
        """Until `size` bytes of the body are there. Raises OSError or EOFError."""
        buffer = bytearray(256 * 1024)
        while self.received < size:
            length = self.connection.socket.recv_into(buffer)
            if not length:
                raise EOFError(f"ended after {self.received} bytes")
            self.digest.update(memoryview(buffer)[:length])
            self.received += length


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "ctl drain"])
def test_a_200_mb_download_is_finished_before_the_end(site: Path, issued: Issued, how: str) -> None:
    size = 200 * MIB
    expected = random_file(site / "big.bin", size)
    with serve(site, "--workers", "2", issued=issued, ends_by_itself=True) as daemon:
        download = Download(daemon, "/big.bin")
        download.read(10 * MIB)
        with Connection(daemon) as idle:
            assert idle.works()
            if how == "ctl drain":
                assert control(daemon, "drain").returncode == 0
            else:
                daemon.signal(getattr(signal, how))
            assert idle.socket.recv(1) == b"", "a connection that waits for nothing is closed in an orderly way"

        def refused() -> bool:
            try:
                socket.create_connection(daemon.address, DEADLINE_S).close()
            except ConnectionRefusedError:
                return True
            except ConnectionResetError:
                pass  # it was in the queue of the socket as that was closed
            return False

        eventually(refused, "new connections are refused while the download goes on")
        download.read(size)
        assert download.digest.hexdigest() == expected
        download.connection.socket.close()
        assert daemon.wait() == 0
        daemon.assert_nothing_left()


def test_a_reader_that_stalls_is_cut_at_the_drain_deadline(site: Path, issued: Issued) -> None:
    random_file(site / "big.bin", 64 * MIB)
    with serve(site, "--workers", "2", "--drain-ms", "300", issued=issued, ends_by_itself=True) as daemon:
        download = Download(daemon, "/big.bin")
        daemon.stop(status=1)
        with pytest.raises((OSError, EOFError)):
            download.read(64 * MIB)
        assert b"cut by the drain deadline" in daemon.stderr


@pytest.mark.parametrize("how", ["second SIGTERM", "ctl stop"])
def test_the_impatient_end(site: Path, issued: Issued, how: str) -> None:
    random_file(site / "big.bin", 64 * MIB)
    with serve(site, "--workers", "2", issued=issued, ends_by_itself=True) as daemon:
        download = Download(daemon, "/big.bin")
        if how == "ctl stop":
            assert control(daemon, "stop").returncode == 0
        else:
            daemon.signal(signal.SIGTERM)
            eventually(lambda: b"draining" in daemon.stderr, "the first signal is taken")
            daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 1
        daemon.assert_nothing_left()
        download.connection.socket.close()


def test_ctl_stop_of_an_idle_daemon_exits_with_0(site: Path, issued: Issued) -> None:
    with serve(site, issued=issued, ends_by_itself=True) as daemon:
        assert control(daemon, "stop").returncode == 0
        assert daemon.wait() == 0
        daemon.assert_nothing_left()


def served_certificate(daemon: Daemon) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with (
        socket.create_connection(daemon.address, DEADLINE_S) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        certificate = connection.getpeercert(binary_form=True)
    assert certificate is not None
    return certificate


@pytest.mark.parametrize("how", ["SIGHUP", "ctl reload"])
def test_a_reload_changes_the_certificate_and_drops_nobody(
    kdaemon: Serve, make_issued: Callable[..., Issued], how: str
) -> None:
    issued, renewed = make_issued(), make_issued("rsa")
    daemon = kdaemon("--workers", "2", issued=issued)
    before, keymgr = served_certificate(daemon), pid_of(daemon, "keymgr")
    with Connection(daemon) as connection:
        assert connection.works()
        # Half of a renewal: the key does not match. Refused, and everything stays as it was
        renewed.certificate.replace(issued.certificate)
        reload(daemon, how, "does not belong to the certificate")
        eventually(lambda: b"does not belong to the certificate" in daemon.stderr, "the reload is refused")
        assert served_certificate(daemon) == before
        assert pid_of(daemon, "keymgr") == keymgr
        renewed.key.replace(issued.key)
        reload(daemon, how)
        eventually(lambda: pid_of(daemon, "keymgr") != keymgr, "another keymgr has the new key")
        for _ in range(8):
            assert served_certificate(daemon) != before
        assert connection.works()
    eventually(lambda: not Path(f"/proc/{keymgr}").exists() or keymgr not in daemon.pids, "the old keymgr is gone")


def reload(daemon: Daemon, how: str, problem: str = "") -> None:
    """`problem`: of which `ctl` tells."""
    if how == "SIGHUP":
        daemon.signal(signal.SIGHUP)
        return
    completed = control(daemon, "reload")
    assert completed.returncode == (1 if problem else 0)
    assert problem in completed.stderr


def test_a_reload_with_a_bad_file_changes_nothing(site: Path, issued: Issued, tmp_path: Path) -> None:
    file = tmp_path / "kdaemon.toml"
    file.write_text("[log]\nlevel = 'info'\n")
    with serve(site, "--config", str(file), issued=issued) as daemon:
        keymgr = pid_of(daemon, "keymgr")
        file.write_text("wokers = 1\n")
        completed = control(daemon, "reload")
        assert completed.returncode == 1
        assert "kdaemon.toml:1: wokers: unknown key" in completed.stderr
        daemon.signal(signal.SIGHUP)
        eventually(lambda: b"reload refused" in daemon.stderr, "the signal's failure is in the log")
        assert facts(daemon)["keymgr"]["pid"] == keymgr
        with Connection(daemon) as connection:
            assert connection.works()


def test_secrets_are_logged_only_when_asked(site: Path, issued: Issued, tmp_path: Path) -> None:
    file = tmp_path / "secrets"
    logs = b""
    for arguments in (["--log-level", "debug"], ["--log-level", "debug", "--keylog"]):
        with (
            serve(site, *arguments, issued=issued, extra_environment={"SSLKEYLOGFILE": str(file)}) as daemon,
            Connection(daemon) as connection,
        ):
            assert connection.works()
            logs += daemon.stderr
        assert file.exists() == ("--keylog" in arguments)
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.read_text().count("CLIENT_TRAFFIC_SECRET_0 ") == 1
    for line in file.read_text().splitlines():
        secret = line.split()[-1]
        assert secret.encode() not in logs
        assert repr(bytes.fromhex(secret))[2:-1].encode() not in logs


@pytest.mark.parametrize("silent", range(1, 9))
def test_silent_connections_do_not_delay_the_end(kdaemon: Serve, silent: int) -> None:
    """However the events of their end, and that of the drain, fall into the batches that a worker takes."""
    daemon = kdaemon("--workers", "1")
    for _ in range(silent):
        daemon.connect().close()
    daemon.stop()
