"""httpx's AsyncClient through the daemon: an asynchronous network backend for httpcore, under asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Iterable
from typing import Any

import httpcore
import httpx

from libtls import aio
from libtls.connection import WRITE_PIECE_SIZE, Connection
from libtls.errors import ArenaFull, Cancelled, DaemonGone, RingFull
from libtls.functions import current_lane, tls_connect, tls_start
from libtls.http import connect_error, tls_options
from libtls.operation import Lane, Operation
from libtls.sock import AHEAD_SIZE


class AsyncStream(httpcore.AsyncNetworkStream):
    """A connection of `AsyncBackend`, without TLS until `start_tls`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._ahead: Operation[bytes] | None = None  # a READ that `is_readable` posted
        self._rest = b""  # of one that brought more than was asked for

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        try:
            if not self._rest:
                ahead, self._ahead = self._ahead, None
                async with asyncio.timeout(timeout):
                    self._rest = await aio.wait(ahead or self._connection.read_operation(max_bytes))
        except TimeoutError as error:
            raise httpcore.ReadTimeout(str(error)) from error
        except OSError as error:
            raise httpcore.ReadError(str(error)) from error
        data, self._rest = self._rest[:max_bytes], self._rest[max_bytes:]
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        try:
            async with asyncio.timeout(timeout):
                for begin in range(0, len(buffer), WRITE_PIECE_SIZE):
                    await aio.wait(self._connection.write_operation(buffer[begin : begin + WRITE_PIECE_SIZE]))
        except TimeoutError as error:
            raise httpcore.WriteTimeout(str(error)) from error
        except OSError as error:
            raise httpcore.WriteError(str(error)) from error

    async def aclose(self) -> None:
        with contextlib.suppress(OSError):
            await aio.wait(self._connection.close_operation())

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> AsyncStream:
        """The context says whom to trust; everything else is the daemon's."""
        try:
            if (ahead := self._ahead) is not None:
                self._ahead = None
                ahead.cancel()
                with contextlib.suppress(Cancelled):
                    self._rest = await aio.wait(ahead)
            if self._rest:
                raise ConnectionError("the peer sent bytes before TLS that nobody has read")
            options = tls_options(ssl_context)
            await aio.wait(tls_start(self._connection, server_hostname or "", timeout=timeout, **options))
        except OSError as error:
            await self.aclose()
            raise connect_error(error) from error
        return self

    def get_extra_info(self, info: str) -> Any:
        if info != "is_readable":
            return None
        if self._rest:
            return True
        try:
            if self._ahead is None:
                self._ahead = self._connection.read_operation(AHEAD_SIZE)
        except DaemonGone:
            return True
        except (RingFull, ArenaFull):
            return False  # nobody knows
        return self._ahead.done


class AsyncBackend(httpcore.AsyncNetworkBackend):
    """For `httpcore.AsyncConnectionPool(network_backend=...)`, under asyncio."""

    def __init__(self, lane: Lane | None = None) -> None:
        self._lane = lane

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> AsyncStream:
        try:
            operation = tls_connect(host, port, timeout=timeout, lane=self._lane or current_lane())
            return AsyncStream(await aio.wait(operation))
        except OSError as error:
            raise connect_error(error) from error

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def httpx_async_transport(
    lane: Lane | None = None, verify: ssl.SSLContext | bool = True, proxy: str | None = None
) -> httpx.AsyncHTTPTransport:
    """For `httpx.AsyncClient(transport=...)`; otherwise as `libtls.http.httpx_transport`."""
    transport = httpx.AsyncHTTPTransport(verify=verify)
    context = transport._pool._ssl_context
    backend = AsyncBackend(lane)
    if proxy:
        transport._pool = httpcore.AsyncHTTPProxy(proxy, ssl_context=context, network_backend=backend)
    else:
        transport._pool = httpcore.AsyncConnectionPool(ssl_context=context, network_backend=backend)
    return transport
