"""The supervisor's children: what is not ready, or no longer answers, is killed; its end is told once."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from typing import Any

import pytest
from support.waiting import DEADLINE_S

from kdaemon import children
from kdaemon.channel import Channel
from kdaemon.children import Child

SILENT = "import signal; signal.pause()"
ANSWERS_TWICE = """
import signal, socket, sys
from kdaemon.channel import Channel
channel = Channel(socket.socket(fileno=int(sys.argv[1])))
channel.send({"type": "ready"})
for _ in range(2):
    channel.receive()
    channel.send({"type": "pong"})
signal.pause()
"""


class Log:
    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def error(self, event: str, **values: Any) -> None:
        self.lines.append((event, values))


async def life_of(program: str, log: Log, *, start_within_s: float) -> tuple[int, list[str]]:
    """Its wait status, and what it said; watched from its first word."""
    ours, theirs = Channel.pair()
    process = subprocess.Popen([sys.executable, "-c", program, str(theirs.fileno())], pass_fds=[theirs.fileno()])
    theirs.close()
    said: list[str] = []
    ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def says(child: Child, message: dict[str, Any], _: list[int]) -> None:
        said.append(message["type"])
        child.watch(log)

    child = Child("patient", process.pid, ours, says, lambda _, status: ended.set_result(status))
    child.start_within(start_within_s, log)
    try:
        async with asyncio.timeout(DEADLINE_S):
            return await ended, said
    finally:
        child.kill()
        process.returncode = 0  # waited for already


def test_one_that_is_not_ready_in_time_is_killed() -> None:
    log = Log()
    status, said = asyncio.run(life_of(SILENT, log, start_within_s=0.01))
    assert os.WTERMSIG(status) == signal.SIGKILL and said == []
    assert [(event, values["process"]) for event, values in log.lines] == [
        ("was not ready in time and is killed", "patient")
    ]


def test_one_that_stops_answering_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "PING_INTERVAL_S", 0.05)
    log = Log()
    status, said = asyncio.run(life_of(ANSWERS_TWICE, log, start_within_s=DEADLINE_S))
    assert os.WTERMSIG(status) == signal.SIGKILL and said == ["ready"]
    assert [event for event, _ in log.lines] == ["does not answer and is killed"]
