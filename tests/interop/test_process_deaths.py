"""kill -9 of every process of the daemon: what it costs, who notices, and that nothing stays behind."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from interop.process_support import Connection, facts, kill_and_wait, pid_of, restarted, stop_and_wait, workers
from support.daemon import Daemon, serve
from support.waiting import DEADLINE_S, eventually

Serve = Callable[..., Daemon]


@pytest.fixture
def daemon(kdaemon: Callable[..., Daemon]) -> Daemon:
    """Two workers, for each test anew (conftest's is one for all of a module, for libtls)."""
    return kdaemon("--workers", "2")


@pytest.fixture
def connections(daemon: Daemon) -> Iterator[list[Connection]]:
    """Sixteen connections that have been used, on both workers."""
    with ExitStack() as stack:
        made = [stack.enter_context(Connection(daemon)) for _ in range(16)]
        assert all(connection.works() for connection in made)
        yield made


def test_a_killed_worker_costs_only_its_own_connections(daemon: Daemon, connections: list[Connection]) -> None:
    first, second = workers(daemon)
    assert first["connections"] + second["connections"] == len(connections)
    kill_and_wait(first["pid"])
    assert sum(connection.works() for connection in connections) == second["connections"]
    restarted(daemon, "worker", first["pid"])
    for _ in range(8):  # both listening sockets have someone who accepts
        with Connection(daemon) as connection:
            assert connection.works()
    first, second = workers(daemon)
    assert (first["restarts"], second["restarts"]) == (1, 0)


def test_connections_queued_while_the_worker_is_replaced_are_served(kdaemon: Serve) -> None:
    daemon = kdaemon("--workers", "1")
    pid = pid_of(daemon, "worker")
    stop_and_wait(pid)
    with ExitStack() as stack:
        queued = [stack.enter_context(socket.create_connection(daemon.address, DEADLINE_S)) for _ in range(20)]
        kill_and_wait(pid)
        context = ssl.create_default_context(cafile=str(daemon.ca))
        refused = 0
        for plain in queued:
            try:
                stack.enter_context(context.wrap_socket(plain, server_hostname="localhost"))
            except OSError:
                refused += 1  # accepted by the uring of the stopped process, and lost with it
        restarted(daemon, "worker", pid)
        with Connection(daemon) as connection:
            assert connection.works()
        assert refused < len(queued), "the listening socket outlived the worker, but nobody in its queue was served"


def test_a_killed_zygote_costs_nothing_and_its_successor_forks(daemon: Daemon, connections: list[Connection]) -> None:
    before = pid_of(daemon, "zygote")
    kill_and_wait(before)
    assert all(connection.works() for connection in connections)
    restarted(daemon, "zygote", before)
    assert [worker["restarts"] for worker in workers(daemon)] == [0, 0]
    worker = pid_of(daemon, "worker")
    kill_and_wait(worker)
    restarted(daemon, "worker", worker)
    with Connection(daemon) as connection:
        assert connection.works()


def test_a_worker_that_dies_while_there_is_no_zygote_is_replaced_too(daemon: Daemon) -> None:
    zygote, worker = pid_of(daemon, "zygote"), pid_of(daemon, "worker")
    stop_and_wait(zygote)  # asked to fork, it never will
    kill_and_wait(worker)
    kill_and_wait(zygote)
    restarted(daemon, "worker", worker)


def test_a_killed_keymgr_costs_a_delay(daemon: Daemon, connections: list[Connection]) -> None:
    before = pid_of(daemon, "keymgr")
    stop_and_wait(before)
    results: list[bool] = []

    def connect() -> None:
        with Connection(daemon) as connection:
            results.append(connection.works())

    threads = [threading.Thread(target=connect) for _ in range(6)]
    for thread in threads:
        thread.start()
    # Their handshakes are under way: each worker has sent what it has to keymgr, which is stopped
    eventually(lambda: sum(worker["accepted"] for worker in workers(daemon)) == 22, "six more are accepted")
    assert all(connection.works() for connection in connections)
    kill_and_wait(before)
    for thread in threads:
        thread.join(DEADLINE_S)
    assert results == [True] * 6
    assert facts(daemon)["keymgr"]["restarts"] == 1
    assert [worker["restarts"] for worker in workers(daemon)] == [0, 0]


def test_tickets_are_good_at_every_worker_and_after_the_death_of_keymgr(daemon: Daemon) -> None:
    with Connection(daemon) as first:
        assert first.works()
        session, context = first.socket.session, first.context
    assert session is not None
    assert session.has_ticket

    def resumed() -> bool:
        plain = socket.create_connection(daemon.address, DEADLINE_S)
        with context.wrap_socket(plain, server_hostname="localhost", session=session) as connection:
            return bool(connection.session_reused)

    assert all(resumed() for _ in range(12))
    assert all(worker["handshakes"]["resumed"] for worker in workers(daemon)), "both workers resumed"
    before = pid_of(daemon, "keymgr")
    kill_and_wait(before)
    restarted(daemon, "keymgr", before)
    assert all(resumed() for _ in range(12))
    worker = pid_of(daemon, "worker")
    kill_and_wait(worker)
    restarted(daemon, "worker", worker)
    assert all(resumed() for _ in range(12)), "a new worker gets the same keys from the new keymgr"


def test_a_killed_supervisor_takes_all_with_it_and_frees_the_port(site: Path, issued: object) -> None:
    with serve(site, "--workers", "2", issued=issued, ends_by_itself=True) as daemon:  # type: ignore[arg-type]
        pids = daemon.pids
        assert len(pids) == 5
        with Connection(daemon) as connection:
            assert connection.works()
            daemon.process.kill()
            daemon.wait()
            daemon.assert_nothing_left()
            with pytest.raises((OSError, EOFError)):
                connection.get()
        address = f"127.0.0.1:{daemon.port}"
        # The same port, and the same control socket, whose file the dead one left behind
        environment = {"XDG_RUNTIME_DIR": str(daemon.stderr_path.parent)}
        with serve(site, issued=issued, listeners=(address,), extra_environment=environment) as again:  # type: ignore[arg-type]
            with Connection(again) as connection:
                assert connection.works()
            assert Path(daemon.socket_path).is_socket()
            assert b"another daemon" not in again.stderr


def test_a_worker_that_cannot_live_is_not_restarted_in_a_loop(daemon: Daemon) -> None:
    """Each short life doubles the pause before the next."""
    for expected in range(1, 4):
        pid = pid_of(daemon, "worker")
        kill_and_wait(pid)
        restarted(daemon, "worker", pid)
        assert workers(daemon)[0]["restarts"] == expected
    pauses = [
        line.split(b"replaced_in_s=")[1].split()[0] for line in daemon.stderr.splitlines() if b"replaced_in" in line
    ]
    assert pauses == [b"0.0", b"0.05", b"0.1"]


def test_when_memory_runs_out_the_kernel_takes_workers_first(daemon: Daemon) -> None:
    def score(pid: int) -> int:
        return int(Path(f"/proc/{pid}/oom_score_adj").read_text())

    supervisor, keymgr = score(daemon.process.pid), score(pid_of(daemon, "keymgr"))
    zygote, worker = score(pid_of(daemon, "zygote")), score(pid_of(daemon, "worker"))
    assert supervisor < keymgr < zygote == worker or supervisor == 1000
