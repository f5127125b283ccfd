"""Protocols for asyncio that write down what their transport tells them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Recorder(asyncio.Protocol):
    """Writes down what its transport tells it. Tests replace `on_data`."""

    keeps_open = False

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.data = bytearray()
        self.changed = asyncio.Event()
        self.lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport = None  # type: ignore[assignment]
        self.on_data: Callable[[], object] = lambda: None

    def note(self, call: str) -> None:
        self.calls.append(call)
        self.changed.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.note("made")

    def data_received(self, data: bytes) -> None:
        assert type(data) is bytes
        self.data += data
        self.changed.set()
        self.on_data()

    def eof_received(self) -> bool:
        self.note("eof")
        return self.keeps_open

    def connection_lost(self, exc: Exception | None) -> None:
        self.note("lost")
        self.lost.set_result(exc)

    def pause_writing(self) -> None:
        self.note("pause")

    def resume_writing(self) -> None:
        self.note("resume")

    async def until(self, question: Callable[[], object]) -> None:
        while not question():
            self.changed.clear()
            await self.changed.wait()

    async def has(self, size: int) -> bytes:
        await self.until(lambda: len(self.data) >= size)
        return bytes(self.data)


class Sipping(asyncio.BufferedProtocol):
    """Reads ten bytes at a time and pauses at each tenth time; hands over to another protocol at `until` bytes."""

    def __init__(self, successor: Recorder, until: int) -> None:
        self.buffer = bytearray(10)
        self.data = bytearray()
        self.successor = successor
        self.until = until
        self.paused = False
        self.updates = 0

    def get_buffer(self, sizehint: int) -> memoryview:
        return memoryview(self.buffer)

    def buffer_updated(self, nbytes: int) -> None:
        assert not self.paused
        transport = self.successor.transport
        self.data += self.buffer[:nbytes]
        self.updates += 1
        if len(self.data) >= self.until:
            transport.set_protocol(self.successor)
        elif self.updates % 10 == 0:
            self.paused = True
            transport.pause_reading()
            asyncio.get_running_loop().call_soon(self.resume)

    def resume(self) -> None:
        self.paused = False
        self.successor.transport.resume_reading()
