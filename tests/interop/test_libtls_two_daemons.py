"""Client role and server role, in two daemons under different users and in one: the examples of docs/libtls.md, run."""

from __future__ import annotations

import json
import os
import pwd
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from support.certificates import Issued
from support.waiting import DEADLINE_S, eventually

from libtls import Lane, errors
from libtls.functions import tls_listen, tls_open

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = ROOT / "docs" / "examples"


def environment(directory: Path) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name != "KDAEMON_SOCKET"}
    return inherited | {
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        "XDG_STATE_HOME": str(directory),
        "XDG_RUNTIME_DIR": str(directory),
    }


@contextmanager
def run(example: str, issued: Issued) -> Iterator[tuple[Lane, str]]:
    """`kdaemon run` with this example, its paths replaced; a lane of it, and whose its worker is."""
    with tempfile.TemporaryDirectory(prefix="kd-") as name:
        directory = Path(name)
        path = directory / "kdaemon.sock"
        text = (EXAMPLES / example).read_text()
        text = text.replace("/run/kdaemon-client/kdaemon.sock", str(path))
        text = text.replace("/run/kdaemon-server/kdaemon.sock", str(path))
        text = text.replace("/etc/kdaemon/example.org.pem", str(issued.certificate))
        text = text.replace("/etc/kdaemon/example.org.key", str(issued.key))
        if os.geteuid() != 0:
            text = text.partition("[users]")[0]  # only root may change its processes' users
        configuration = directory / "kdaemon.toml"
        configuration.write_text("workers = 1\n" + text)
        command = [sys.executable, "-m", "kdaemon", "run", "--config", str(configuration)]
        with subprocess.Popen(command, env=environment(directory), start_new_session=True) as process:
            try:
                eventually(lambda: attaches(str(path)), "the daemon lets a program attach")
                lane = Lane.attach(str(path))
                yield lane, worker_user(directory)
                lane.close()
                process.send_signal(signal.SIGTERM)
                assert process.wait(DEADLINE_S) == 0
            finally:
                process.kill()


def attaches(path: str) -> bool:
    try:
        Lane.attach(path).close()
    except errors.DaemonError:
        return False
    return True


def talk(client: Lane, server: Lane, ca: Path) -> None:
    listener = tls_listen(certificate="localhost", lane=server).wait(DEADLINE_S)
    accept = listener.accept_operation()
    here = tls_open("localhost", listener.port, cafile=ca, lane=client).wait(DEADLINE_S)
    there = accept.wait(DEADLINE_S)
    here.write(b"from one role to the other")
    assert there.read() == b"from one role to the other"
    here.close()
    assert there.read() == b""
    there.close()


def worker_user(directory: Path) -> str:
    command = [sys.executable, "-m", "kdaemon", "ctl", "status", "--json"]
    status = subprocess.run(command, capture_output=True, env=environment(directory), check=True).stdout
    [worker] = json.loads(status)["workers"]
    return pwd.getpwuid(Path(f"/proc/{worker['pid']}").stat().st_uid).pw_name


def test_two_daemons(issued: Issued) -> None:
    """Each does its role and refuses the other one."""
    with ExitStack() as stack:
        client, client_user = stack.enter_context(run("client.toml", issued))
        server, server_user = stack.enter_context(run("server.toml", issued))
        talk(client, server, issued.ca)
        with pytest.raises(errors.NotAllowed):
            tls_listen(lane=client).wait(DEADLINE_S)
        with pytest.raises(errors.NotAllowed):
            tls_open("localhost", 443, lane=server).wait(DEADLINE_S)
        if os.geteuid() == 0:
            assert (client_user, server_user) == ("nobody", "www-data")


def test_one_daemon_with_both_roles(issued: Issued) -> None:
    with run("both.toml", issued) as (lane, _):
        talk(lane, lane, issued.ca)
