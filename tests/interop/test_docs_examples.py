"""The examples of docs/libtls.md: what the manual shows is what is run here."""

from __future__ import annotations

import os
import re
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.certificates import Issued
from support.content import pattern
from support.daemon import Daemon, serve
from support.waiting import DEADLINE_S, read_line

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = ROOT / "docs" / "examples"
MANUAL = (ROOT / "docs" / "libtls.md").read_text()


@pytest.fixture(scope="module")
def daemon(issued: Issued, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """The test's certificates are the system's for this daemon."""
    directory: Path = tmp_path_factory.mktemp("site")
    (directory / "index.html").write_bytes(b"<!doctype html><title>kdaemon</title>\n")
    (directory / "large.bin").write_bytes(pattern(1 << 20))
    system = {"SSL_CERT_FILE": str(issued.ca)}
    with serve(directory, "--workers", "1", issued=issued, extra_environment=system, ends_by_itself=True) as daemon:
        yield daemon
        daemon.stop()


def start(daemon: Daemon, example: str, *arguments: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "KDAEMON_SOCKET": daemon.socket_path,
        "SSL_CERT_FILE": str(daemon.ca),
        "REQUESTS_CA_BUNDLE": str(daemon.ca),
    }
    command = [sys.executable, str(EXAMPLES / example), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0, env=environment)


def run(daemon: Daemon, example: str, *arguments: str) -> bytes:
    with start(daemon, example, *arguments) as process:
        output, _ = process.communicate(timeout=DEADLINE_S * 4)
    assert process.returncode == 0
    return output


@pytest.mark.parametrize("example", sorted(EXAMPLES.iterdir()), ids=lambda path: path.name)
def test_the_manual_shows_the_file(example: Path) -> None:
    shown = re.findall(rf"\(examples/{example.name}\):\n\n```(?:python|toml)\n(.*?)```\n", MANUAL, re.DOTALL)
    assert shown == [example.read_text()]


def test_the_readme(site: Path, tmp_path: Path) -> None:
    """Its program, but for the port, with a daemon that made its own certificate."""
    [program] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert program.count("8443") == 1
    with serve(site, ends_by_itself=True) as daemon:
        state = daemon.stderr_path.parent
        (tmp_path / ".local").mkdir()
        (tmp_path / ".local" / "state").symlink_to(state / "state")
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "HOME": str(tmp_path),
            "KDAEMON_SOCKET": str(state / "kdaemon.sock"),
        }
        command = [sys.executable, "-c", program.replace("8443", str(daemon.port))]
        page = subprocess.run(command, env=environment, capture_output=True, timeout=DEADLINE_S, check=True).stdout
        daemon.stop()
    assert page.startswith(b"HTTP/1.1 200 OK")
    assert b"<title>kdaemon</title>" in page


def test_fetch(daemon: Daemon) -> None:
    for arguments in ((), (str(daemon.ca),)):
        answer = run(daemon, "fetch.py", "localhost", str(daemon.port), *arguments)
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert b"<title>kdaemon</title>" in answer


def test_echo_server(daemon: Daemon) -> None:
    with start(daemon, "echo_server.py", "0") as server:
        try:
            assert server.stdout is not None
            port = int(read_line(server.stdout, "it listens").split()[-1])
            context = ssl.create_default_context(cafile=str(daemon.ca))
            with (
                socket.create_connection(("127.0.0.1", port), DEADLINE_S) as plain,
                context.wrap_socket(plain, server_hostname="localhost") as peer,
            ):
                peer.sendall(b"hello")
                assert peer.recv(100) == b"hello"
        finally:
            server.kill()


def test_chat(daemon: Daemon) -> None:
    clients = 200 if os.environ.get("CI") is None else 1000
    said = run(daemon, "chat.py", str(clients), str(daemon.ca))
    assert said == b"%d clients, each heard {%d} of them\n" % (clients, clients // 100)


@pytest.mark.parametrize("example", ["download_httpx.py", "download_requests.py"])
def test_downloads(daemon: Daemon, tmp_path: Path, example: str) -> None:
    run(daemon, example, f"https://localhost:{daemon.port}/large.bin", str(tmp_path / "file"))
    assert (tmp_path / "file").read_bytes() == pattern(1 << 20)


@pytest.mark.parametrize("example", ["client.toml", "server.toml", "both.toml"])
def test_configurations(issued: Issued, tmp_path: Path, example: str) -> None:
    """`kdaemon check` accepts them, with this host's files in place of /etc/kdaemon."""
    text = (EXAMPLES / example).read_text()
    text = text.replace("/etc/kdaemon/example.org.pem", str(issued.certificate))
    text = text.replace("/etc/kdaemon/example.org.key", str(issued.key))
    configuration = tmp_path / example
    configuration.write_text(text)
    command = [sys.executable, "-m", "kdaemon", "check", str(configuration)]
    checked = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert checked.returncode == 0, checked.stderr
