"""Ends of a ring on the program's side: closed under waiting threads, forked, collected, called back into."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
import uvloop
from kdaemon_pyx import client_abi as abi
from kdaemon_pyx.client_ring import Operation
from kdaemon_pyx.client_stream import LaneReader
from test_client_ring import DEADLINE_S, ECHO, NEVER, Lane, wait_for

import libtls
from libtls import errors


@pytest.fixture
def lane() -> Iterator[Lane]:
    lane = Lane()
    lane.ring.spin_ns = 0
    yield lane
    lane.close()


def in_child(function: Callable[[], object]) -> int:
    """The exit status of a forked child that calls it: 0 if it raised RuntimeError."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
        except RuntimeError:
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_child_cannot_wait_for_its_parents_operations(lane: Lane) -> None:
    operation = lane.ring.post(abi.OPEN, parameters=NEVER)
    thread = threading.Thread(target=lane.ring.wait, args=(operation, DEADLINE_S))
    thread.start()  # the parent has a thread that sleeps on the doorbell, the child has not

    def wait() -> None:
        lane.ring.abandon()
        lane.ring.wait(operation)

    assert in_child(wait) == 0
    lane.ring.cancel(operation)
    thread.join(DEADLINE_S)
    assert operation.result == -errno.ECANCELED


def test_a_child_cannot_read_its_parents_data(lane: Lane) -> None:
    connection = lane.open()
    lane.run(abi.WRITE, connection, data=b"secret")
    read = lane.run(abi.READ, connection, length=10)
    view = memoryview(read)

    def look(how: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            lane.ring.abandon()
            how()

        return run

    def look_at_the_view() -> None:
        if bytes(view) == bytes(6):  # zeros in place of what was not inherited; no fault
            raise RuntimeError

    assert in_child(look(read.bytes)) == 0
    assert in_child(look(lambda: memoryview(read))) == 0
    assert in_child(look(look_at_the_view)) == 0
    assert bytes(view) == b"secret"


def test_close_wakes_who_waits(lane: Lane) -> None:
    """The thread that sleeps on the doorbell and those behind it; and the daemon sees the end at once."""
    operations = [lane.ring.post(abi.OPEN, parameters=NEVER) for _ in range(4)]
    threads = [threading.Thread(target=lane.ring.wait, args=(operation,), daemon=True) for operation in operations]
    for thread in threads:
        thread.start()
    lane.ring.close()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert not [thread for thread in threads if thread.is_alive()]
    assert {operation.result for operation in operations} == {-errno.ECONNRESET}
    wait_for(lambda: not lane.harness.clients.status())


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_an_event_loop_sees_the_end_of_the_attach_socket(
    lane: Lane, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """Though the doorbell is not rung; and an exported socket that waits there to be taken is no end."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        reader = LaneReader(lane.ring, loop)
        operation = lane.ring.post(abi.OPEN, parameters=NEVER)
        done = loop.create_future()
        lane.ring.on_done(operation, done.set_result)
        lane.daemon_ends[0].sendall(abi.pack_descriptor_message(abi.EXPORT, 1))
        nop = loop.create_future()
        lane.ring.on_done(lane.ring.post(abi.NOP), nop.set_result)
        await asyncio.wait_for(nop, DEADLINE_S)
        assert not lane.ring.is_dead
        lane.daemon_ends[0].shutdown(socket.SHUT_RDWR)
        await asyncio.wait_for(done, DEADLINE_S)
        assert operation.result == -errno.ECONNRESET
        assert lane.ring.is_dead
        reader.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main())


def test_who_was_woken_to_lead_and_had_enough_wakes_another(lane: Lane) -> None:
    """Many threads whose waits time out all the time: the one that waits on is never left asleep without a leader."""
    never = lane.ring.post(abi.OPEN, parameters=NEVER)
    done = threading.Event()

    def impatient() -> None:
        while not done.is_set():
            lane.ring.wait(never, 0.0005)

    threads = [threading.Thread(target=impatient, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    connection = lane.open()
    try:
        for _ in range(200):
            read = lane.ring.post(abi.READ, connection, length=1)
            lane.ring.post(abi.WRITE, connection, data=b"x")
            assert lane.ring.wait(read, DEADLINE_S)
    finally:
        done.set()
    for thread in threads:
        thread.join(DEADLINE_S)


def test_a_blocking_write_sends_all_or_raises(lane: Lane) -> None:
    """A short count is for those that asked for one: the echo takes 16384 bytes while nobody reads."""
    connection = libtls.Connection(libtls.Lane(lane.ring), lane.open())
    with pytest.raises(errors.DeadlinePassed):
        connection.write(bytes(40_000), timeout=0.05)
    got = 0
    while got < 16384:
        got += len(connection.read())
    assert connection.write(b"and on", timeout=DEADLINE_S) == 6


def test_close_calls_back(lane: Lane) -> None:
    operation = lane.ring.post(abi.OPEN, parameters=NEVER)
    results: list[int] = []
    lane.ring.on_done(operation, lambda done: results.append(done.result))
    lane.ring.on_done(operation, lambda done: results.append(1))  # a second one does not take the first one's place
    lane.ring.close()
    assert results == [-errno.ECONNRESET, 1]


def test_a_collected_cycle_gives_its_block_back(lane: Lane) -> None:
    connection = lane.open()
    lane.run(abi.WRITE, connection, data=b"x")
    read = lane.run(abi.READ, connection, length=1000)
    holder: list[object] = [read]
    read.context = holder
    assert lane.ring.arena_used == 1024
    del read, holder
    gc.collect()
    assert lane.ring.arena_used == 0


def test_a_destructor_that_reaps(lane: Lane) -> None:
    """What ends with a completion may run anything, the next reap included."""

    class Reaps:
        def __del__(self) -> None:
            lane.ring.reap()

    connection = lane.run(abi.OPEN, parameters=ECHO).result
    for _ in range(50):
        operations: list[Operation] = [lane.ring.post(abi.NOP, connection, context=Reaps()) for _ in range(20)]
        last = lane.ring.post(abi.NOP)
        operations.clear()
        assert lane.ring.wait(last, DEADLINE_S)
        wait_for(lambda: lane.ring.reap() or not lane.ring.in_flight)
    assert lane.ring.in_flight == 0
