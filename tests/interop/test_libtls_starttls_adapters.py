"""STARTTLS under asyncio, and HTTP through CONNECT proxies, synchronous and not."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import httpx
import pytest
import requests
from support.certificates import Issued
from support.content import pattern
from support.daemon import Daemon, serve
from support.protocols import Recorder
from support.waiting import DEADLINE_S

from libtls import Lane, TlsError, aio
from libtls.http import RequestsAdapter, httpx_transport
from libtls.http_async import httpx_async_transport


@pytest.fixture(scope="module", params=["off", pytest.param("require", marks=pytest.mark.guest)])
def daemon(
    request: pytest.FixtureRequest, issued: Issued, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Daemon]:
    directory: Path = tmp_path_factory.mktemp("site")
    (directory / "large.bin").write_bytes(pattern(1 << 20))
    arguments = ("--workers", "1", "--ktls", request.param)
    with serve(directory, *arguments, issued=issued, ends_by_itself=True) as daemon:
        yield daemon
        daemon.stop()


@contextlib.contextmanager
def lane_of(daemon: Daemon) -> Iterator[Lane]:
    lane = Lane.attach(daemon.socket_path)
    try:
        yield lane
    finally:
        lane.close()


def run(daemon: Daemon, main: Callable[[Lane], Awaitable[None]]) -> None:
    async def bounded() -> None:
        with lane_of(daemon) as lane:
            async with asyncio.timeout(DEADLINE_S):
                await main(lane)

    asyncio.run(bounded())


# asyncio


async def starttls_session(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A server: one plain line each way, then TLS and an echo."""
    writer.write(b"220 ready\r\n")
    assert await reader.readline() == b"STARTTLS\r\n"
    writer.write(b"220 go ahead\r\n")
    await aio.start_tls_streams(writer, server_side=True, certificate="localhost")
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


def test_streams_start_tls_on_both_ends(daemon: Daemon) -> None:
    async def main(lane: Lane) -> None:
        async with await aio.start_server(starttls_session, tls=False, lane=lane) as server:
            reader, writer = await aio.open_connection("127.0.0.1", server.port, tls=False, lane=lane)
            assert await reader.readline() == b"220 ready\r\n"
            writer.write(b"STARTTLS\r\n")
            assert await reader.readline() == b"220 go ahead\r\n"
            await aio.start_tls_streams(writer, "localhost", cafile=daemon.ca)
            data = os.urandom(1_000_000)
            writer.write(data)
            writer.write_eof()
            assert await reader.read() == data
            writer.close()
            await writer.wait_closed()

    run(daemon, main)


def test_a_python_client_and_a_libtls_server(daemon: Daemon) -> None:
    """asyncio's own start_tls on the other side."""

    async def main(lane: Lane) -> None:
        async with await aio.start_server(starttls_session, tls=False, lane=lane) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            assert await reader.readline() == b"220 ready\r\n"
            writer.write(b"STARTTLS\r\n")
            assert await reader.readline() == b"220 go ahead\r\n"
            await writer.start_tls(ssl.create_default_context(cafile=str(daemon.ca)), server_hostname="localhost")
            writer.write(b"sealed")
            assert await reader.readexactly(6) == b"sealed"
            writer.close()

    run(daemon, main)


def test_bytes_that_the_reader_holds_stop_start_tls(daemon: Daemon) -> None:
    """Text glued to the answer has been read with it: it must not pass for text of the TLS connection."""

    async def inject(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 go ahead\r\n250 injected\r\n")
        await reader.read()
        writer.close()

    async def main(lane: Lane) -> None:
        async with await asyncio.start_server(inject, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            reader, writer = await aio.open_connection("127.0.0.1", port, tls=False, lane=lane)
            assert await reader.readline() == b"220 go ahead\r\n"
            with pytest.raises(TlsError, match="before TLS"):
                await aio.start_tls_streams(writer, "localhost", cafile=daemon.ca)
            assert await reader.readline() == b"250 injected\r\n"  # as plain text: nothing has changed
            writer.close()
            await writer.wait_closed()

    run(daemon, main)


def test_a_protocol_sees_one_connection_across_start_tls(daemon: Daemon) -> None:
    async def main(lane: Lane) -> None:
        async with await aio.start_server(starttls_session, tls=False, lane=lane) as server:
            plain, protocol = await aio.create_connection(Recorder, "127.0.0.1", server.port, tls=False, lane=lane)
            assert isinstance(protocol, Recorder)
            await protocol.until(lambda: protocol.data)
            plain.write(b"STARTTLS\r\n")
            await protocol.until(lambda: protocol.data.endswith(b"ahead\r\n"))
            transport = await aio.start_tls(plain, "localhost", cafile=daemon.ca)
            with pytest.raises(TypeError):
                await aio.start_tls(transport, "localhost")
            protocol.data.clear()
            transport.write(b"sealed")
            assert await protocol.has(6) == b"sealed"
            transport.close()
            assert await protocol.lost is None
            assert protocol.calls == ["made", "lost"]

    run(daemon, main)


def test_a_failed_start_tls_closes_the_connection(daemon: Daemon) -> None:
    async def main(lane: Lane) -> None:
        async def serve_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(TlsError):
                await aio.start_tls_streams(writer, server_side=True, certificate="localhost")

        async with await aio.start_server(serve_once, tls=False, lane=lane) as server:
            plain, protocol = await aio.create_connection(Recorder, "127.0.0.1", server.port, tls=False, lane=lane)
            assert isinstance(protocol, Recorder)
            with pytest.raises(TlsError):
                await aio.start_tls(plain, "wrong.example", cafile=daemon.ca)
            assert isinstance(await protocol.lost, TlsError)
            assert protocol.calls == ["made", "lost"]

    run(daemon, main)


def test_a_plain_transport_keeps_asyncios_rules(daemon: Daemon) -> None:
    """Pauses in pairs, a whole stream in order, half-close, and connection_lost once."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def main(lane: Lane) -> None:
        async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            reader, writer = await aio.open_connection("127.0.0.1", port, tls=False, lane=lane)
            data = os.urandom(3_000_000)

            async def send() -> None:
                for begin in range(0, len(data), 70_000):
                    writer.write(data[begin : begin + 70_000])
                    await writer.drain()
                writer.write_eof()

            sending = asyncio.create_task(send())
            assert await reader.read() == data
            await sending
            with pytest.raises(RuntimeError):
                writer.write(b"x")
            writer.close()
            await writer.wait_closed()

    run(daemon, main)


# CONNECT proxies


class Proxy:
    """An HTTP proxy that knows CONNECT alone. `extra` is sent behind the head of its answer."""

    def __init__(self, extra: bytes = b"") -> None:
        self.asked: list[bytes] = []
        self._extra = extra
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += client.recv(1)
        self.asked.append(head.split(b"\r\n")[0])
        host, port = head.split(b" ")[1].rsplit(b":", 1)
        server = socket.create_connection((host.decode(), int(port)), DEADLINE_S)
        client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n" + self._extra)
        threads = [
            threading.Thread(target=self._copy, args=ends, daemon=True) for ends in ((client, server), (server, client))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        client.close()
        server.close()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(DEADLINE_S)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    proxy = Proxy()
    yield proxy
    proxy.close()


def test_httpx_through_a_proxy(daemon: Daemon, proxy: Proxy) -> None:
    context = ssl.create_default_context(cafile=str(daemon.ca))
    url = f"https://localhost:{daemon.port}/large.bin"
    with (
        lane_of(daemon) as lane,
        httpx.Client(transport=httpx_transport(lane, verify=context, proxy=proxy.url)) as client,
    ):
        for _ in range(3):
            assert client.get(url).content == pattern(1 << 20)
    assert proxy.asked == [b"CONNECT localhost:%d HTTP/1.1" % daemon.port]


def test_requests_through_a_proxy(daemon: Daemon, proxy: Proxy) -> None:
    with lane_of(daemon) as lane, requests.Session() as session:
        session.mount("https://", RequestsAdapter(lane))
        session.trust_env = False  # REQUESTS_CA_BUNDLE would win over what is set here
        session.verify = str(daemon.ca)
        session.proxies = {"https": proxy.url}
        url = f"https://localhost:{daemon.port}/large.bin"
        for _ in range(3):
            assert session.get(url, timeout=DEADLINE_S).content == pattern(1 << 20)
        with pytest.raises(requests.exceptions.ProxyError, match="TLS within TLS"):
            session.get(url, timeout=DEADLINE_S, proxies={"https": proxy.url.replace("http:", "https:")})
        session.verify = True
        session.close()
        with pytest.raises(requests.exceptions.SSLError, match="trusted authority"):
            session.get(url, timeout=DEADLINE_S)
    assert [line.rpartition(b" ")[0] for line in proxy.asked] == [b"CONNECT localhost:%d" % daemon.port] * 2


def test_httpx_without_tls(daemon: Daemon) -> None:
    """http: URLs are connections that never start TLS."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            with listener.accept()[0] as client:
                client.recv(65536)
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nplain")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with lane_of(daemon) as lane, httpx.Client(transport=httpx_transport(lane)) as client:
            assert client.get(f"http://127.0.0.1:{listener.getsockname()[1]}/").text == "plain"
        thread.join(DEADLINE_S)


def test_a_proxy_that_speaks_for_the_server(daemon: Daemon) -> None:
    """What it puts behind its answer is not a response of the server's."""
    liar = Proxy(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nlies")
    context = ssl.create_default_context(cafile=str(daemon.ca))
    with (
        lane_of(daemon) as lane,
        httpx.Client(transport=httpx_transport(lane, verify=context, proxy=liar.url)) as client,
    ):
        try:
            body = client.get(f"https://localhost:{daemon.port}/large.bin").content
        except httpx.TransportError:
            body = b""
    assert body in (b"", pattern(1 << 20))
    liar.close()


@pytest.mark.parametrize("through", [False, True], ids=["direct", "proxy"])
def test_httpx_async(daemon: Daemon, proxy: Proxy, through: bool) -> None:
    context = ssl.create_default_context(cafile=str(daemon.ca))

    async def main(lane: Lane) -> None:
        transport = httpx_async_transport(lane, verify=context, proxy=proxy.url if through else None)
        url = f"https://localhost:{daemon.port}/large.bin"
        async with httpx.AsyncClient(transport=transport) as client:
            responses = await asyncio.gather(*(client.get(url) for _ in range(8)))
            assert all(response.content == pattern(1 << 20) for response in responses)
            assert (await client.get(url)).content == pattern(1 << 20)  # on a connection that was idle

    run(daemon, main)
    assert bool(proxy.asked) == through


def test_httpx_async_errors(daemon: Daemon) -> None:
    async def main(lane: Lane) -> None:
        async with httpx.AsyncClient(transport=httpx_async_transport(lane)) as client:
            with pytest.raises(httpx.ConnectError, match="trusted authority"):
                await client.get(f"https://localhost:{daemon.port}/")
        with socket.create_server(("127.0.0.1", 0)) as silent:
            async with httpx.AsyncClient(transport=httpx_async_transport(lane), timeout=0.3) as client:
                with pytest.raises(httpx.ReadTimeout):
                    await client.get(f"http://127.0.0.1:{silent.getsockname()[1]}/")

    run(daemon, main)
