"""libtls.aio's transports beside asyncio's own: the same protocols, told the same things in the same order."""

from __future__ import annotations

import array
import asyncio
import os
import ssl
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from support.certificates import Issued
from support.daemon import Daemon
from support.protocols import Recorder, Sipping
from support.rings import Peer, server_context, worker
from support.waiting import DEADLINE_S, eventually

from libtls import Lane, TlsError, aio
from libtls.functions import tls_connect
from libtls.tls_object import TlsObject

Main = Callable[[Recorder, Recorder], Awaitable[None]]
Meet = Callable[[Main], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def lane(daemon: Daemon) -> Iterator[Lane]:
    """One for all: to ask the daemon after each what it left behind would take longer than the tests."""
    lane = Lane.attach(daemon.socket_path)
    yield lane
    lane.close()
    eventually(lambda: worker(daemon)["connections"] == 0, "its connections are closed")


beside_asyncio = pytest.mark.parametrize(
    ("daemon", "kind"),
    [("off", "asyncio"), ("off", "tls"), ("off", "plain"), pytest.param("require", "tls", marks=pytest.mark.guest)],
    indirect=["daemon"],
    scope="module",
)


@pytest.fixture
def meet(kind: str, daemon: Daemon, lane: Lane) -> Meet:
    """Runs a test with both ends of a connection; what the loop's exception handler was told."""

    async def bounded(main: Main, told: list[dict[str, Any]]) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: told.append(context))
        ends: list[Recorder] = []

        def factory() -> Recorder:
            ends.append(Recorder())
            return ends[-1]

        async with asyncio.timeout(DEADLINE_S):
            if kind == "asyncio":
                server = await loop.create_server(factory, "127.0.0.1", 0)
                _, here = await loop.create_connection(Recorder, *server.sockets[0].getsockname())
            else:
                certificate: dict[str, Any] = {"certificate": "localhost"} if kind == "tls" else {"tls": False}
                trust: dict[str, Any] = {"cafile": daemon.ca} if kind == "tls" else {"tls": False}
                server = await aio.create_server(factory, lane=lane, **certificate)  # type: ignore[assignment]
                _, here = await aio.create_connection(Recorder, "127.0.0.1", server.port, lane=lane, **trust)  # type: ignore[attr-defined]
            assert isinstance(here, Recorder)
            while not ends or not ends[0].transport or not here.transport:
                await asyncio.sleep(0)
            await main(here, ends[0])
            for end in (here, ends[0]):
                end.transport.close()
            server.close()

    def run(main: Main) -> list[dict[str, Any]]:
        told: list[dict[str, Any]] = []
        asyncio.run(bounded(main, told))
        return told

    return run


@beside_asyncio
def test_a_close_sends_what_was_written(meet: Meet) -> None:
    async def main(here: Recorder, there: Recorder) -> None:
        data = os.urandom(2_000_000)
        here.transport.write(data)
        here.transport.close()
        here.transport.close()
        here.transport.write(b"ignored")
        assert here.transport.is_closing()
        assert not here.transport.is_reading()
        assert await here.lost is None
        assert await there.lost is None
        assert there.data == data
        assert there.calls == ["made", "eof", "lost"]
        assert [call for call in here.calls if call not in ("pause", "resume")] == ["made", "lost"]

    assert meet(main) == []


@beside_asyncio
def test_half_closed(meet: Meet) -> None:
    """eof_received() may keep the connection: the other direction goes on."""

    async def main(here: Recorder, there: Recorder) -> None:
        there.keeps_open = True
        assert here.transport.can_write_eof()
        here.transport.write(b"question")
        here.transport.write_eof()
        here.transport.write_eof()
        with pytest.raises(RuntimeError):
            here.transport.write(b"more")
        await there.until(lambda: "eof" in there.calls)
        assert there.data == b"question"
        assert not there.transport.is_closing()
        there.transport.write(b"answer")
        assert await here.has(6) == b"answer"
        there.transport.close()
        assert await there.lost is None
        assert await here.lost is None
        assert here.calls == ["made", "eof", "lost"]

    assert meet(main) == []


@beside_asyncio
def test_a_paused_transport_is_silent(meet: Meet) -> None:
    """Neither data nor their end come before it resumes: until then it can answer, whatever eof_received() would do."""

    async def main(here: Recorder, there: Recorder) -> None:
        there.transport.pause_reading()
        there.transport.pause_reading()
        assert not there.transport.is_reading()
        here.transport.write_eof()
        for size in range(1, 50):
            there.transport.write(b".")
            await here.has(size)
        assert there.calls == ["made"]
        there.transport.write(bytes(1_000_000))
        there.transport.resume_reading()
        there.transport.resume_reading()
        assert await there.lost is None
        assert await here.lost is None
        assert len(here.data) == 1_000_049

    assert meet(main) == []


@beside_asyncio
def test_back_pressure(meet: Meet) -> None:
    async def main(here: Recorder, there: Recorder) -> None:
        there.transport.pause_reading()
        low, high = here.transport.get_write_buffer_limits()
        assert 0 < low < high
        here.transport.set_write_buffer_limits(high=64 << 20)
        assert here.transport.get_write_buffer_limits() == (16 << 20, 64 << 20)
        data = bytes(12 << 20)
        here.transport.write(data)
        assert here.calls == ["made"]
        here.transport.set_write_buffer_limits(high=1000, low=100)
        assert here.calls == ["made", "pause"]
        assert here.transport.get_write_buffer_size() > 1000
        with pytest.raises(ValueError, match="high"):
            here.transport.set_write_buffer_limits(high=1, low=2)
        there.transport.resume_reading()
        await here.until(lambda: here.calls == ["made", "pause", "resume"])
        assert here.transport.get_write_buffer_size() <= 100
        await there.has(len(data))

    assert meet(main) == []


@beside_asyncio
def test_pausing_and_resuming_while_data_come(meet: Meet) -> None:
    async def main(here: Recorder, there: Recorder) -> None:
        def both() -> None:
            there.transport.pause_reading()
            there.transport.resume_reading()
            there.transport.resume_reading()

        there.on_data = both
        data = os.urandom(4 << 20)
        here.transport.write(data)
        here.transport.write_eof()
        await there.lost
        assert there.data == data

    assert meet(main) == []


@beside_asyncio
def test_what_can_be_written(meet: Meet) -> None:
    async def main(here: Recorder, there: Recorder) -> None:
        here.transport.write(b"")
        here.transport.write(bytearray(b"a"))
        here.transport.write(memoryview(b"xbx")[1:2])
        here.transport.write(memoryview(array.array("H", [0x6363])))  # two bytes that an `H` is
        here.transport.writelines([b"d", bytearray(b"e"), memoryview(b"f")])
        here.transport.writelines([])
        for wrong in ("text", None, 7):
            with pytest.raises(TypeError):
                here.transport.write(wrong)  # type: ignore[arg-type]
        buffer = bytearray(b"before")
        here.transport.write(buffer)
        buffer[:] = b"after!"
        assert await there.has(13) == b"abccdefbefore"

    assert meet(main) == []


@beside_asyncio
def test_abort(meet: Meet) -> None:
    async def main(here: Recorder, there: Recorder) -> None:
        there.transport.pause_reading()
        here.transport.write(bytes(16 << 20))
        here.transport.abort()
        here.transport.abort()
        assert here.transport.is_closing()
        here.transport.write(b"ignored")
        assert await here.lost is None
        assert here.calls[-1] == "lost"
        there.transport.resume_reading()
        await there.lost
        assert len(there.data) < 16 << 20

    assert meet(main) == []


@beside_asyncio
@pytest.mark.parametrize("method", ["data_received", "eof_received"])
def test_a_protocol_that_raises(meet: Meet, method: str) -> None:
    """Its connection ends with what it raised, and the loop is told."""
    error = ZeroDivisionError("the protocol's")

    async def main(here: Recorder, there: Recorder) -> None:
        def fail(*_: object) -> None:
            raise error

        setattr(there, method, fail)
        there.transport.set_protocol(there)  # looks the method up again
        here.transport.write(b"x")
        here.transport.write_eof()
        assert await there.lost is error
        assert await here.lost is None or isinstance(here.lost.result(), ConnectionError)

    [context] = meet(main)
    assert context["exception"] is error
    assert method in context["message"]
    assert isinstance(context["protocol"], Recorder)


@beside_asyncio
def test_a_buffered_protocol_that_hands_over(meet: Meet) -> None:
    async def main(here: Recorder, there: Recorder) -> None:
        sipping = Sipping(there, 5000)
        there.transport.set_protocol(sipping)
        assert there.transport.get_protocol() is sipping
        data = os.urandom(100_000)
        here.transport.write(data)
        here.transport.write_eof()
        assert await there.lost is None
        assert bytes(sipping.data + there.data) == data
        assert 5000 <= len(sipping.data) < 5010
        assert there.calls == ["made", "eof", "lost"]

    assert meet(main) == []


@beside_asyncio
def test_a_buffered_protocol_without_a_buffer(meet: Meet) -> None:
    async def main(here: Recorder, there: Recorder) -> None:
        sipping = Sipping(there, 1)
        sipping.buffer = bytearray()
        sipping.connection_lost = there.connection_lost  # type: ignore[method-assign]
        there.transport.set_protocol(sipping)
        here.transport.write(b"x")
        assert isinstance(await there.lost, RuntimeError)

    [context] = meet(main)
    assert "empty buffer" in str(context["exception"])


@beside_asyncio
def test_who_is_there(meet: Meet, kind: str) -> None:
    async def main(here: Recorder, there: Recorder) -> None:
        for one, other in ((here, there), (there, here)):
            host, port = one.transport.get_extra_info("sockname")
            assert host == "127.0.0.1"
            assert other.transport.get_extra_info("peername") == (host, port)
        assert here.transport.get_extra_info("nonsense", "default") == "default"
        assert (here.transport.get_extra_info("ssl_object") is not None) == (kind == "tls")
        assert here.transport.get_extra_info("sslcontext") is None

    assert meet(main) == []


# What asyncio's own cannot be compared with


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await main()

    asyncio.run(bounded())


def test_facts_of_tls(daemon: Daemon, lane: Lane, issued: Issued) -> None:
    async def main() -> None:
        async with await aio.create_server(Recorder, certificate="localhost", alpn=["x", "y"], lane=lane) as server:
            transport, _ = await aio.create_connection(
                Recorder, "localhost", server.port, cafile=daemon.ca, alpn=["y"], lane=lane
            )
            tls = transport.get_extra_info("ssl_object")
            assert isinstance(tls, TlsObject)
            assert (tls.version(), tls.selected_alpn_protocol(), tls.compression()) == ("TLSv1.3", "y", None)
            cipher, version, bits = transport.get_extra_info("cipher")
            assert cipher.startswith("TLS_")
            assert (version, bits) in (("TLSv1.3", 128), ("TLSv1.3", 256))
            pem = issued.certificate.read_text()
            end = "-----END CERTIFICATE-----\n"
            assert tls.getpeercert(binary_form=True) == ssl.PEM_cert_to_DER_cert(pem[: pem.index(end) + len(end)])
            assert ("DNS", "localhost") in transport.get_extra_info("peercert")["subjectAltName"]
            transport.close()

    run(main)


def test_asyncios_own_ssl_protocol_runs_over_it(daemon: Daemon, lane: Lane, issued: Issued) -> None:
    """TLS within TLS, by the loop's start_tls(): the most demanding protocol that asyncio has."""
    data = os.urandom(300_000)

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await writer.start_tls(server_context(issued))
        writer.write(await reader.readexactly(len(data)))
        await writer.drain()
        writer.close()

    async def main() -> None:
        async with await aio.start_server(echo, certificate="localhost", lane=lane) as server:
            reader, writer = await aio.open_connection("localhost", server.port, cafile=daemon.ca, lane=lane)
            await writer.start_tls(ssl.create_default_context(cafile=str(daemon.ca)), server_hostname="localhost")
            writer.write(data)
            assert await reader.read() == data
            writer.close()
            await writer.wait_closed()

    run(main)


def test_only_libtls_starts_the_first_tls(daemon: Daemon, lane: Lane, peer: Peer) -> None:
    async def main() -> None:
        transport, protocol = await aio.create_connection(Recorder, "127.0.0.1", peer.port, tls=False, lane=lane)
        with pytest.raises(TypeError, match="not supported"):
            await asyncio.get_running_loop().start_tls(transport, protocol, ssl.create_default_context())
        transport.close()

    run(main)


def test_a_connection_that_nobody_waits_for_any_more_is_closed(lane: Lane, peer: Peer) -> None:
    """The task is cancelled in the very moment in which the connection is there."""

    async def main() -> None:
        operation = tls_connect("127.0.0.1", peer.port, lane=lane)
        task = asyncio.ensure_future(aio.wait(operation))
        await asyncio.sleep(0)
        lane.ring.on_done(operation.raw, lambda _: task.cancel())
        with pytest.raises(asyncio.CancelledError):
            await task
        assert operation.value.handle > 0
        other, _ = peer.listener.accept()
        other.setblocking(False)
        assert await asyncio.get_running_loop().sock_recv(other, 1) == b""
        other.close()

    run(main)


def test_a_cancelled_open_ends(daemon: Daemon, lane: Lane, peer: Peer) -> None:
    async def main() -> None:
        task = asyncio.ensure_future(aio.open_connection("127.0.0.1", peer.port, lane=lane))
        peer.listener.setblocking(False)
        loop = asyncio.get_running_loop()
        other, _ = await loop.sock_accept(peer.listener)
        await loop.sock_recv(other, 1)  # it says hello, and nobody answers
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while await loop.sock_recv(other, 65536):
            pass
        other.close()

    run(main)


def test_detaching_behind_the_loop(daemon: Daemon, peer: Peer) -> None:
    lane = Lane.attach(daemon.socket_path)

    async def main() -> None:
        await aio.create_server(Recorder, certificate="localhost", lane=lane)
        transport, _ = await aio.create_connection(Recorder, "127.0.0.1", peer.port, tls=False, lane=lane)
        transport.write(b"x")

    run(main)
    lane.close()


def test_a_server_outlives_its_factorys_failures(daemon: Daemon, lane: Lane) -> None:
    failing = True

    def factory() -> Recorder:
        if failing:
            raise ZeroDivisionError
        return Recorder()

    async def main() -> None:
        nonlocal failing
        told: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        async with await aio.create_server(factory, tls=False, lane=lane) as server:
            for _ in range(aio.ACCEPTS_IN_FLIGHT + 1):
                reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
                assert await reader.read() == b""
                writer.close()
            failing = False
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write_eof()
            assert await reader.read() == b""
            writer.close()
        assert len(told) == aio.ACCEPTS_IN_FLIGHT + 1
        assert all(isinstance(context["exception"], ZeroDivisionError) for context in told)

    run(main)


def test_writes_during_start_tls_go_out_with_tls(daemon: Daemon, lane: Lane) -> None:
    async def session(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await aio.start_tls_streams(writer, server_side=True, certificate="localhost")
        writer.write(await reader.readexactly(6))
        writer.close()

    async def main() -> None:
        async with await aio.start_server(session, tls=False, lane=lane) as server:
            reader, writer = await aio.open_connection("127.0.0.1", server.port, tls=False, lane=lane)
            starting = asyncio.ensure_future(aio.start_tls_streams(writer, "localhost", cafile=daemon.ca))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            writer.write(b"sealed")
            with pytest.raises(RuntimeError, match="already"):
                await aio.start_tls(writer.transport, "localhost")
            await starting
            assert writer.get_extra_info("ssl_object").version() == "TLSv1.3"
            assert await reader.read() == b"sealed"
            writer.close()
            await writer.wait_closed()

    run(main)


def test_what_a_paused_transport_holds_does_not_pass_for_tls(lane: Lane, peer: Peer) -> None:
    """It comes before TLS starts, to whoever is paused."""

    async def main() -> None:
        transport, protocol = await aio.create_connection(Recorder, "127.0.0.1", peer.port, tls=False, lane=lane)
        assert isinstance(protocol, Recorder)
        await protocol.until(lambda: "made" in protocol.calls)
        await asyncio.sleep(0)  # the READ is posted
        transport.pause_reading()
        other, _ = peer.listener.accept()
        other.sendall(b"injected")
        while lane.ring.in_flight:
            await asyncio.sleep(0)
        assert protocol.data == b""
        starting = asyncio.ensure_future(aio.start_tls(transport, "localhost"))
        assert await protocol.has(8) == b"injected"
        other.close()
        with pytest.raises((ConnectionError, TlsError)):
            await starting
        assert protocol.data == b"injected"

    run(main)


def test_start_tls_of_what_has_ended(lane: Lane, peer: Peer) -> None:
    async def main() -> None:
        transport, protocol = await aio.create_connection(Recorder, "127.0.0.1", peer.port, tls=False, lane=lane)
        assert isinstance(protocol, Recorder)
        peer.listener.accept()[0].close()
        with pytest.raises((ConnectionError, TlsError)):
            await aio.start_tls(transport, "localhost")
        await protocol.lost
        assert protocol.calls.count("lost") == 1

    run(main)
