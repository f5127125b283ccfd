"""Listening sockets: one owner of a port, members for every worker, and errors that a person understands."""

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from kdaemon import listeners
from kdaemon.listeners import Listener, ListenError, open_listener, open_listeners


@pytest.fixture
def three() -> Iterator[Listener]:
    listener = open_listener("127.0.0.1:0", 3)
    yield listener
    listener.close()


def test_all_members_share_the_port_and_get_connections(three: Listener) -> None:
    ports = {sock.getsockname() for sock in three.sockets}
    assert ports == {("127.0.0.1", three.port)}
    assert three.address == f"127.0.0.1:{three.port}"
    clients = [socket.create_connection(("127.0.0.1", three.port)) for _ in range(60)]
    accepted = []
    for sock in three.sockets:
        got = 0
        while True:
            try:
                sock.accept()[0].close()
            except BlockingIOError:
                break
            got += 1
        accepted.append(got)
    for client in clients:
        client.close()
    assert sum(accepted) == 60
    assert all(accepted), f"a member got nothing: {accepted}"


def test_a_second_owner_is_refused_and_told_why(three: Listener) -> None:
    with pytest.raises(ListenError, match="already taken") as caught:
        open_listener(f"127.0.0.1:{three.port}", 2)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EADDRINUSE


def test_the_port_is_free_again_at_once() -> None:
    listener = open_listener("127.0.0.1:0", 2)
    client = socket.create_connection(("127.0.0.1", listener.port))
    listener.close()
    client.close()
    open_listener(f"127.0.0.1:{listener.port}", 2).close()


def test_ipv6_loopback_that_is_not_there_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_ipv6(address: str, workers: int) -> Listener:
        if address.startswith("["):
            raise ListenError(f"cannot listen on {address}") from OSError(errno.EADDRNOTAVAIL, "not available")
        return open_listener(address, workers)

    monkeypatch.setattr(listeners, "open_listener", without_ipv6)
    opened, warnings = open_listeners(["127.0.0.1:0", "[::1]:0"], 1)
    assert len(opened) == 1
    assert "going on without it" in warnings[0]
    opened[0].close()
    with pytest.raises(ListenError):
        open_listeners(["[::1]:0"], 1)
    with pytest.raises(ListenError):
        open_listeners(["127.0.0.1:0", "[2001:db8::1]:0"], 1)


@pytest.mark.parametrize(
    ("address", "why"), [("192.0.2.1:0", "does not have the address"), ("[fe80::1%none]:0", "not an IP address")]
)
def test_addresses_that_cannot_be_had(address: str, why: str) -> None:
    with pytest.raises(ListenError, match=why):
        open_listener(address, 1)


def run_with_listen_fds(fd: int, pid: str) -> str:
    """Asks inherited_listeners() of a process that was given `fd` as its descriptor 3."""
    program = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3)\n"
        "os.environ.update(LISTEN_FDS='1', LISTEN_PID=sys.argv[2] or str(os.getpid()))\n"
        "from kdaemon.listeners import *\n"
        "try: print([x.address for x in inherited_listeners()], 'LISTEN_FDS' in os.environ)\n"
        "except ListenError as e: print(e)"
    )
    return subprocess.run(
        [sys.executable, "-c", program, str(fd), pid],
        pass_fds=(fd,),
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ).stdout


def test_sockets_of_a_service_manager(three: Listener) -> None:
    fd = three.sockets[0].fileno()
    assert run_with_listen_fds(fd, "") == f"['{three.address}'] False\n"
    assert run_with_listen_fds(fd, "1") == "[] False\n", "meant for another process"
    with socket.socket() as plain:
        assert "not a listening TCP socket" in run_with_listen_fds(plain.fileno(), "")
    reader, writer = os.pipe()
    assert "is no socket" in run_with_listen_fds(reader, "")
    os.close(reader)
    os.close(writer)
