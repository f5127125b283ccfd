"""The daemon's UNIX socket: commands, strangers, stale files, a second daemon."""

import asyncio
import contextlib
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
        async with server(path, lambda connection: attached.append(connection.recv(64))):
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(b"ltdk" + bytes(60))
            assert await reader.read() == b""
            writer.close()

    asyncio.run(run())
    assert attached == [b"ltdk" + bytes(60)]


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
