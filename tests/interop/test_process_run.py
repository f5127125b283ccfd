"""`kdaemon run --config`: several names with their own certificates and folders, logs, users, sockets from outside."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from interop.process_support import facts, run
from support.certificates import Issued
from support.daemon import Daemon, Ready, environment
from support.waiting import DEADLINE_S, eventually, read_line

MakeIssued = Callable[..., Issued]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user can read, unlike pytest's own."""
    path = Path(tempfile.mkdtemp(prefix="kd-run-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def write(folder: Path, text: str, *sites: str) -> Path:
    for site in sites:
        (folder / site).mkdir()
        (folder / site / "index.html").write_text(f"this is {site}\n")
    file = folder / "kdaemon.toml"
    file.write_text(f"workers = 2\n{text}\n[[listen]]\naddress = '127.0.0.1:0'\n")
    return file


def get(daemon: Daemon, ca: Path, name: str, path: str = "/") -> tuple[int, dict[str, str], str]:
    """Status, headers and body of one response, asked for under a name."""
    completed = subprocess.run(
        [
            *("curl", "-s", "-i", "--http1.1", "--max-time", str(DEADLINE_S), "--cacert", str(ca)),
            *("--resolve", f"{name}:{daemon.port}:127.0.0.1", f"https://{name}:{daemon.port}{path}"),
        ],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=True,
    )
    head, _, body = completed.stdout.partition("\n\n")
    lines = head.splitlines()
    return int(lines[0].split()[1]), dict(line.lower().split(": ", 1) for line in lines[1:]), body  # type: ignore[misc]


def test_each_name_has_its_certificate_and_its_folder(folder: Path, make_issued: MakeIssued) -> None:
    one, two = make_issued(names=("one.test",)), make_issued("rsa", names=("two.test", "*.two.test"))
    file = write(
        folder,
        f"""
        [[certificate]]
        chain = "{one.certificate}"
        key = "{one.key}"
        [[certificate]]
        chain = "{two.certificate}"
        key = "{two.key}"
        [[site]]
        root = "one"
        names = ["one.test"]
        [[site.header]]
        path = "/*"
        name = "X-Site"
        value = "first"
        [[site.redirect]]
        path = "/old/*"
        to = "/new/*"
        status = 308
        [[site]]
        root = "two"
        names = ["two.test", "*.two.test"]
        fallback = "/index.html"
        """,
        "one",
        "two",
    )
    with run(file) as daemon:
        status, headers, body = get(daemon, one.ca, "one.test")
        assert (status, headers["x-site"], body) == (200, "first", "this is one\n")
        status, headers, _ = get(daemon, one.ca, "one.test", "/old/a/b")
        assert (status, headers["location"]) == (308, "/new/a/b")
        assert get(daemon, one.ca, "one.test", "/none")[0] == 404
        for name in ("two.test", "www.two.test"):
            assert get(daemon, two.ca, name, "/no/such/page")[::2] == (200, "this is two\n")


def test_the_access_log_is_written_and_reopened(folder: Path, make_issued: MakeIssued) -> None:
    issued = make_issued()
    log = folder / "access.log"
    file = write(
        folder,
        f"""
        [log]
        format = "json"
        [access_log]
        path = "access.log"
        format = "json"
        [[certificate]]
        chain = "{issued.certificate}"
        key = "{issued.key}"
        [[site]]
        root = "site"
        """,
        "site",
    )
    with run(file) as daemon:
        get(daemon, issued.ca, "localhost", "/first")
        eventually(lambda: b"/first" in log.read_bytes(), "the first line is written")
        log.rename(folder / "access.log.1")
        daemon.signal(signal.SIGUSR1)
        eventually(log.exists, "the file is made anew")

        def second_is_in_the_new_file() -> bool:
            get(daemon, issued.ca, "localhost", "/second")
            return b"/second" in log.read_bytes()

        eventually(second_is_in_the_new_file, "lines go to the new file")
        get(daemon, issued.ca, "localhost", "/last")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert any("/last" in line["request"] for line in lines), "what was in memory at the end is written"
    assert b"/first" not in log.read_bytes()
    assert all(json.loads(line) for line in daemon.stderr.splitlines())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change to other users")
def test_started_as_root_nobody_of_them_stays_root(folder: Path, make_issued: MakeIssued) -> None:
    issued = make_issued()
    shutil.copy(issued.certificate, folder / "chain.pem")
    shutil.copy(issued.key, folder / "key.pem")
    (folder / "key.pem").chmod(0o600)  # root's: keymgr reads it before it gives up root
    file = write(
        folder,
        """
        [users]
        worker = "nobody"
        keymgr = "daemon"
        [[certificate]]
        chain = "chain.pem"
        key = "key.pem"
        [[site]]
        root = "site"
        """,
        "site",
    )

    def user(pid: int) -> str:
        return pwd.getpwuid(int(Path(f"/proc/{pid}/status").read_text().split("\nUid:\t")[1].split()[0])).pw_name

    with run(file) as daemon:
        assert get(daemon, issued.ca, "localhost")[0] == 200
        status = facts(daemon)
        assert user(status["keymgr"]["pid"]) == "daemon"
        assert user(status["zygote"]["pid"]) == "nobody"
        assert {user(worker["pid"]) for worker in status["workers"]} == {"nobody"}


def test_sockets_of_a_service_manager_are_used(folder: Path, make_issued: MakeIssued) -> None:
    issued = make_issued()
    (folder / "index.html").write_text("inherited\n")
    launcher = "import os, sys; os.environ['LISTEN_PID'] = str(os.getpid()); os.execv(sys.argv[1], sys.argv[1:])"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = [sys.executable, "-m", "kdaemon", "serve", str(folder), "--workers", "2", *issued.arguments]

        def at_three() -> None:
            os.dup2(listener.fileno(), 3)

        process = subprocess.Popen(
            [sys.executable, "-c", launcher, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=environment("inherited", folder) | {"LISTEN_FDS": "1"},
            pass_fds=(3,),
            preexec_fn=at_three,  # noqa: PLW1509 - no other thread runs here
        )
        try:
            assert process.stdout is not None
            ready = Ready.parse(read_line(process.stdout, "the ready line"))
            assert ready.port == listener.getsockname()[1]
            context = ssl.create_default_context(cafile=str(issued.ca))
            for _ in range(4):
                with (
                    socket.create_connection(("127.0.0.1", ready.port), DEADLINE_S) as plain,
                    context.wrap_socket(plain, server_hostname="localhost") as connection,
                ):
                    connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                    assert b"200 OK" in connection.recv(4096)
            process.terminate()
            assert process.wait(DEADLINE_S) == 0
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def test_a_bad_file_is_named_with_its_line(folder: Path) -> None:
    file = write(folder, "\n[[site]]\nroot = 'site'\nfallback = 'no-slash'\n", "site")
    completed = subprocess.run(
        [sys.executable, "-m", "kdaemon", "run", "--config", str(file)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        env=environment("bad", folder),
    )
    assert completed.returncode == 2
    assert completed.stderr.startswith(f"kdaemon: {file}:")
    assert "no-slash" in completed.stderr
