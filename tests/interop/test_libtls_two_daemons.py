"""The client role and the server role as two daemons, as docs/libtls.md has them: neither has a listener of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from support.certificates import Issued
from support.waiting import DEADLINE_S, eventually

from libtls import Lane, errors
from libtls.functions import tls_listen, tls_open


@contextmanager
def run(directory: Path, role: str, more: str = "") -> Iterator[str]:
    """`kdaemon run` with no listener and this role; its socket."""
    directory.mkdir()
    path = directory / "kdaemon.sock"
    configuration = directory / "kdaemon.toml"
    configuration.write_text(f'listen = []\nworkers = 1\nsocket = "{path}"\n{more}\n[clients]\nroles = ["{role}"]\n')
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        "XDG_STATE_HOME": str(directory),
    }
    command = [sys.executable, "-m", "kdaemon", "run", "--config", str(configuration)]
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        try:
            eventually(lambda: attaches(str(path)), "the daemon lets a program attach")
            yield str(path)
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


def test_one_program_two_daemons(issued: Issued, tmp_path: Path) -> None:
    certificate = f'[[certificate]]\nchain = "{issued.certificate}"\nkey = "{issued.key}"\n'
    with ExitStack() as stack:
        client = Lane.attach(stack.enter_context(run(tmp_path / "c", "client")))
        server = Lane.attach(stack.enter_context(run(tmp_path / "s", "server", certificate)))
        with pytest.raises(errors.NotAllowed):
            tls_listen(lane=client).wait(DEADLINE_S)
        listener = tls_listen(certificate="localhost", lane=server).wait(DEADLINE_S)
        accept = listener.accept_operation()
        here = tls_open("localhost", listener.port, cafile=issued.ca, lane=client).wait(DEADLINE_S)
        there = accept.wait(DEADLINE_S)
        here.write(b"from one daemon to the other")
        assert there.read() == b"from one daemon to the other"
        here.close()
        assert there.read() == b""
        there.close()
        for lane in (client, server):
            lane.close()
