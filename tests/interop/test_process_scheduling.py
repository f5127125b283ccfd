"""How a worker's engine thread is scheduled beside its control thread."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from interop.process_support import Connection, pid_of
from support.certificates import Issued
from support.clients import client_hello
from support.daemon import serve
from support.waiting import DEADLINE_S, eventually


def engine_policy(worker: int) -> int:
    """The engine is the thread that does not have the process's id."""
    (engine,) = (int(task.name) for task in Path(f"/proc/{worker}/task").iterdir() if int(task.name) != worker)
    return os.sched_getscheduler(engine)


def test_the_engine_does_not_interrupt_handshakes(site: Path, issued: Issued) -> None:
    with serve(site, "--workers", "1", issued=issued) as daemon:
        worker = pid_of(daemon, "worker")
        with Connection(daemon) as connection:
            assert connection.works()
            eventually(lambda: engine_policy(worker) == os.SCHED_OTHER, "no handshake is under way")
            with socket.create_connection(daemon.address, DEADLINE_S) as half:
                half.sendall(client_hello())
                assert half.recv(1)
                eventually(lambda: engine_policy(worker) == os.SCHED_BATCH, "a handshake is under way")
                assert connection.works()
            eventually(lambda: engine_policy(worker) == os.SCHED_OTHER, "its client has left")
            assert connection.works()
        assert os.sched_getscheduler(worker) == os.SCHED_OTHER


def test_a_policy_that_was_chosen_stays(site: Path, issued: Issued) -> None:
    with serve(site, "--workers", "1", issued=issued, prefix=("chrt", "--batch", "0")) as daemon:
        worker = pid_of(daemon, "worker")
        with Connection(daemon) as connection:
            assert connection.works()
            with Connection(daemon) as another:  # whose handshake the worker has forgotten when it answers
                assert another.works()
            assert engine_policy(worker) == os.SCHED_BATCH
