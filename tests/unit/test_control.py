"""The daemon's UNIX socket: commands, strangers, stale files, a second daemon."""

import asyncio
import contextlib
import errno
import json
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from kdaemon import control
from kdaemon.control import ControlError, ControlServer

DEADLINE_S = 20


@contextlib.asynccontextmanager
async def server(path: str, attach: Any = None) -> AsyncIterator[ControlServer]:
    async def handle(message: dict[str, Any]) -> dict[str, Any]:
        if message.get("command") == "fail":
            raise ValueError("no such luck")
        return {"echo": message["command"]}

    running = ControlServer(path, handle, structlog.get_logger(), attach)
    try:
        yield running
    finally:
        running.close()


async def ask(command: str, path: str) -> dict[str, Any]:
    return await asyncio.to_thread(control.request, command, path)


def test_a_command_and_its_answer(tmp_path: Path) -> None:
    path = str(tmp_path / "kd.sock")

    async def run() -> None:
        async with server(path):
            assert (Path(path).stat().st_mode & 0o777) == 0o600
            assert await ask("status", path) == {"echo": "status"}
            with pytest.raises(ControlError, match="no such luck"):
                await ask("fail", path)
        assert not Path(path).exists()
        with pytest.raises(ControlError, match="no kdaemon listens there"):
            await ask("status", path)

    asyncio.run(run())


def test_a_stale_socket_is_replaced_and_a_living_one_is_not(tmp_path: Path) -> None:
    path = str(tmp_path / "kd.sock")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)

    async def run() -> None:
        async with server(path):
            assert await ask("status", path) == {"echo": "status"}
            with pytest.raises(ControlError, match="another kdaemon listens there"):
                async with server(path):
                    pass
            assert await ask("status", path) == {"echo": "status"}, "the second one did no harm"
        async with server(path):
            assert await ask("again", path) == {"echo": "again"}

    asyncio.run(run())


def test_on_the_default_path_a_second_daemon_steps_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KDAEMON_SOCKET", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))

    async def run() -> None:
        async with server("") as first, server("") as second:
            assert first.path == str(tmp_path / "kdaemon.sock")
            assert second.path == str(tmp_path / f"kdaemon-{os.getpid()}.sock")
            assert await ask("x", second.path) == {"echo": "x"}

    asyncio.run(run())


def test_what_is_no_command_is_handed_on_unread(tmp_path: Path) -> None:
    path = str(tmp_path / "kd.sock")
    attached: list[bytes] = []

    async def run() -> None:
        async with server(path, lambda connection: attached.append(connection.recv(64)) or True):
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(b"ltdk" + bytes(60))
            assert await reader.read() == b""
            writer.close()

    asyncio.run(run())
    assert attached == [b"ltdk" + bytes(60)]


def test_what_a_stranger_sends_is_never_received_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor closed with the descriptors in it, whose last close may wait for their owner: a worker gets it for that."""
    path = str(tmp_path / "kd.sock")
    monkeypatch.setattr(control, "_user", lambda connection: -1)
    handed_on: list[socket.socket] = []

    def attach(connection: socket.socket) -> bool:
        handed_on.append(connection.dup())
        return True

    async def run() -> None:
        async with server(path, attach):
            with socket.socket(socket.AF_UNIX) as stranger:
                stranger.connect(path)
                command = b'{"command": "status"}\n'
                socket.send_fds(stranger, [command], [stranger.fileno()])
                reader, writer = await asyncio.open_unix_connection(sock=stranger.dup())
                assert b"only root" in await asyncio.wait_for(reader.readline(), DEADLINE_S)
                writer.close()
            [unread] = handed_on
            data, descriptors, _, _ = socket.recv_fds(unread, 100, 1)
            assert (data, len(descriptors)) == (command, 1)
            unread.close()
            os.close(descriptors[0])

    asyncio.run(run())


@pytest.mark.parametrize("request_", [b"{}\n", b"{nonsense}\n", b"{" + b"x" * 8000 + b"\n", b"{\xff\n"])
def test_nonsense_is_answered_with_an_error_and_harms_nobody(tmp_path: Path, request_: bytes) -> None:
    path = str(tmp_path / "kd.sock")

    async def run() -> None:
        async with server(path):
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(request_)
            assert "error" in json.loads(await reader.read())
            writer.close()
            assert await ask("status", path) == {"echo": "status"}

    asyncio.run(run())


def test_a_path_that_is_too_long_or_nowhere_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    async def run() -> None:
        for path, why in (
            (f"/tmp/{'x' * 120}", "longer than the 107 bytes"),
            (f"{tmp_path}/file/kd.sock", "cannot be"),
        ):
            with pytest.raises(ControlError, match=why):
                async with server(path):
                    pass

    asyncio.run(run())


@pytest.mark.parametrize("said", [b"", b'{"command"'])
def test_who_does_not_finish_has_a_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    path = str(tmp_path / "kd.sock")
    monkeypatch.setattr(control, "REQUEST_DEADLINE_S", 0.05)

    async def run() -> None:
        async with server(path) as running:
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(said)
            assert await asyncio.wait_for(reader.read(), DEADLINE_S) == b""
            assert not running._serving
            writer.close()

    asyncio.run(run())


def test_a_silent_crowd_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its oldest connections make room; those of other users stay, and who comes now is served."""
    path = str(tmp_path / "kd.sock")
    monkeypatch.setattr(control, "CONNECTIONS_MAX", 8)
    users = iter([-1, -1, *[-2] * 50])
    monkeypatch.setattr(control, "_user", lambda connection: next(users, os.geteuid()))

    async def run() -> None:
        async with server(path) as running:
            slow = [await asyncio.open_unix_connection(path) for _ in range(2)]
            crowd = [await asyncio.open_unix_connection(path) for _ in range(50)]
            for reader, _ in crowd[:-6]:  # all places but two
                assert await asyncio.wait_for(reader.read(), DEADLINE_S) == b""
            assert sorted(running._serving.values()) == [-2] * 6 + [-1] * 2
            assert await ask("status", path) == {"echo": "status"}
            for reader, writer in slow:
                writer.write(b"{}\n")
                assert b"only root" in await asyncio.wait_for(reader.readline(), DEADLINE_S)
            for _, writer in slow + crowd:
                writer.close()

    asyncio.run(run())


def test_without_descriptors_it_does_not_spin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "kd.sock")
    monkeypatch.setattr(control, "_ACCEPT_PAUSE_S", 0.5)

    class Exhausted:
        """The first accept finds no descriptor."""

        def __init__(self, listener: socket.socket) -> None:
            self.listener = listener
            self.accepts = 0
            self.fileno, self.close = listener.fileno, listener.close

        def accept(self) -> tuple[socket.socket, object]:
            self.accepts += 1
            if self.accepts == 1:
                raise OSError(errno.EMFILE, "Too many open files")
            return self.listener.accept()

    async def run() -> None:
        async with server(path) as running:
            exhausted = Exhausted(running._socket)
            running._socket = exhausted  # type: ignore[assignment]
            asking = asyncio.ensure_future(ask("status", path))
            while not exhausted.accepts:
                await asyncio.sleep(0)
            for _ in range(20):
                await asyncio.sleep(0)
            assert not asking.done()
            assert exhausted.accepts == 1, "asked again at once"
            assert await asking == {"echo": "status"}

    asyncio.run(run())
