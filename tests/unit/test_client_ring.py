"""Both sides of the client rings in one process: order, barriers, cancel, deadlines, limits, detach, threads."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from kdaemon_pyx import client_abi as abi
from kdaemon_pyx.client_harness import Harness
from kdaemon_pyx.client_ring import ClientRing, Operation

DEADLINE_S = 20
NEVER = {"host": b"never", "port": 1}  # the harness leaves an OPEN to an odd port under way
ECHO = {"host": b"echo", "port": 2}


class Lane:
    """A harness that runs in a thread and one client of it."""

    def __init__(self, *, spin_ns: int = 0, slots: int = 32, arena: int = 1 << 20, connections: int = 8) -> None:
        self.harness = Harness(spin_ns=spin_ns)
        self.thread = threading.Thread(target=self.harness.run, daemon=True)
        self.thread.start()
        self.slots, self.arena, self.connections = slots, arena, connections
        self.daemon_ends: list[socket.socket] = []
        self.ring = self.attach()

    def attach(self) -> ClientRing:
        _, memory, doorbell, _ = self.harness.clients.attach(
            submission_entries=self.slots,
            completion_entries=self.slots,
            slot_count=self.slots,
            arena_size=self.arena,
            connections_max=self.connections,
        )
        daemon_end, program_end = socket.socketpair()
        self.daemon_ends.append(daemon_end)
        return ClientRing(memory, doorbell, program_end.detach())

    def run(self, *arguments: object, **keywords: object) -> Operation:
        operation = self.ring.post(*arguments, **keywords)  # type: ignore[arg-type]
        assert self.ring.wait(operation, DEADLINE_S)
        return operation

    def open(self) -> int:
        operation = self.run(abi.OPEN, parameters=ECHO)
        assert operation.result > 0
        return operation.result

    def close(self) -> None:
        self.ring.close()
        for end in self.daemon_ends:
            end.close()
        self.harness.stop()
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive()


@pytest.fixture(params=[0, 50_000], ids=["sleeping", "spinning"])
def lane(request: pytest.FixtureRequest) -> Iterator[Lane]:
    lane = Lane(spin_ns=request.param)
    lane.ring.spin_ns = request.param
    yield lane
    lane.close()
    wait_for(lambda: not lane.harness.clients.status())


def wait_for(condition) -> None:  # type: ignore[no-untyped-def]
    event = threading.Event()
    for _ in range(DEADLINE_S * 1000):
        if condition():
            return
        event.wait(0.001)
    raise AssertionError("deadline passed")


def test_nop_in_bulk(lane: Lane) -> None:
    for _ in range(50):
        operations = [lane.ring.post(abi.NOP) for _ in range(lane.ring.slot_count)]
        assert all(lane.ring.wait(operation, DEADLINE_S) and operation.result == 0 for operation in operations)
    assert lane.ring.in_flight == 0


def test_full_ring_is_an_error_not_a_hang(lane: Lane) -> None:
    operations = [lane.ring.post(abi.OPEN, parameters=NEVER) for _ in range(4)]
    connection = lane.open()
    while lane.ring.in_flight < lane.ring.slot_count:
        operations.append(lane.ring.post(abi.READ, connection, length=1))
    with pytest.raises(BlockingIOError, match="in flight"):
        lane.ring.post(abi.NOP)
    lane.ring.close()
    assert {operation.result for operation in operations} == {-errno.ECONNRESET}


def test_full_arena(lane: Lane) -> None:
    connection = lane.open()
    held = lane.ring.post(abi.READ, connection, length=1 << 20)
    with pytest.raises(OSError, match="arena") as failure:
        lane.ring.post(abi.WRITE, connection, data=b"x")
    assert failure.value.errno == errno.ENOBUFS
    lane.ring.wait(lane.ring.cancel(held), DEADLINE_S)
    assert lane.ring.wait(held, DEADLINE_S)
    held.release()
    assert lane.run(abi.WRITE, connection, data=b"x").result == 1
    assert lane.ring.arena_used == 0


def test_echo_of_many_sizes_in_order(lane: Lane) -> None:
    connection = lane.open()
    sent, received = hashlib.sha256(), hashlib.sha256()
    for size in (1, 255, 256, 257, 16384, 65537, 300_000):
        data = os.urandom(size)
        sent.update(data)
        write = lane.ring.post(abi.WRITE, connection, data=data)
        left = size
        while left:
            read = lane.run(abi.READ, connection, length=min(left, 40_000))
            assert 1 <= read.result <= left
            received.update(memoryview(read))
            left -= read.result
        assert lane.ring.wait(write, DEADLINE_S)
        assert write.result == size
    assert sent.digest() == received.digest()


def test_reads_are_answered_first_in_first_out(lane: Lane) -> None:
    connection = lane.open()
    reads = [lane.ring.post(abi.READ, connection, length=3) for _ in range(5)]
    lane.run(abi.WRITE, connection, data=b"aaabbbcccdddeee")
    for read, expected in zip(reads, [b"aaa", b"bbb", b"ccc", b"ddd", b"eee"], strict=True):
        assert lane.ring.wait(read, DEADLINE_S)
        assert read.bytes() == expected


def test_barrier_orders_reads_and_writes_of_one_connection(lane: Lane) -> None:
    connection, other = lane.open(), lane.open()
    read = lane.ring.post(abi.READ, connection, length=1)
    barrier = lane.ring.post(abi.BARRIER, connection)
    write = lane.ring.post(abi.WRITE, connection, data=b"x")
    assert lane.run(abi.NOP, other).result == 0  # other connections go on
    assert not barrier.done
    assert not write.done
    assert lane.run(abi.CANCEL, target=read).result == 0
    assert lane.ring.wait(write, DEADLINE_S)
    assert (read.result, barrier.result, write.result) == (-errno.ECANCELED, 0, 1)


def test_cancelled_barrier_lets_go_of_what_it_held(lane: Lane) -> None:
    connection = lane.open()
    read = lane.ring.post(abi.READ, connection, length=1)
    barrier = lane.ring.post(abi.BARRIER, connection)
    write = lane.ring.post(abi.WRITE, connection, data=b"x")
    assert lane.run(abi.CANCEL, target=barrier).result == 0
    assert lane.ring.wait(read, DEADLINE_S)
    assert lane.ring.wait(write, DEADLINE_S)
    assert (barrier.result, read.bytes(), write.result) == (-errno.ECANCELED, b"x", 1)


def test_short_write_when_cancelled_midway_and_nothing_behind_it(lane: Lane) -> None:
    connection = lane.open()
    first = lane.ring.post(abi.WRITE, connection, data=bytes(40_000))
    second = lane.ring.post(abi.WRITE, connection, data=b"behind")
    assert lane.run(abi.CANCEL, target=first).result == 0
    assert lane.ring.wait(second, DEADLINE_S)
    assert 0 < first.result < 40_000
    assert second.result == -errno.ECANCELED
    left = first.result
    while left:
        left -= lane.run(abi.READ, connection, length=left).result


def test_cancel_of_what_is_finished(lane: Lane) -> None:
    done = lane.run(abi.NOP)
    assert lane.run(abi.CANCEL, target=done).result == -errno.ENOENT


def test_cancel_races_to_exactly_one_answer(lane: Lane) -> None:
    connection = lane.open()
    for _ in range(300):
        read = lane.ring.post(abi.READ, connection, length=4)
        write = lane.ring.post(abi.WRITE, connection, data=b"data")
        cancel = lane.ring.cancel(read)
        for operation in (read, write, cancel):
            assert lane.ring.wait(operation, DEADLINE_S)
        assert write.result == 4
        assert (cancel.result, read.result) in [(0, -errno.ECANCELED), (-errno.ENOENT, 4)]
        if read.result < 0:
            assert lane.run(abi.READ, connection, length=4).bytes() == b"data"
    assert lane.ring.in_flight == 0


def test_cancel_of_an_open_that_is_under_way(lane: Lane) -> None:
    operation = lane.ring.post(abi.OPEN, parameters=NEVER)
    assert lane.run(abi.CANCEL, target=operation).result == 0
    assert lane.ring.wait(operation, DEADLINE_S)
    assert operation.result == -errno.ECANCELED


def test_deadlines(lane: Lane) -> None:
    connection, full = lane.open(), lane.open()
    listener = lane.run(abi.LISTEN, parameters={"host": b"127.0.0.1", "port": 8}).result
    lane.ring.post(abi.READ, connection, length=1)
    lane.ring.post(abi.WRITE, full, data=bytes(40_000))
    for opcode, handle, options in (
        (abi.OPEN, 0, {"parameters": NEVER}),
        (abi.READ, connection, {"length": 1}),
        (abi.BARRIER, connection, {}),
        (abi.ACCEPT, listener, {}),
        (abi.WRITE, full, {"data": b"x"}),
        (abi.SHUTDOWN, full, {"argument": abi.SHUTDOWN_WRITE}),
        (abi.CLOSE, full, {}),
    ):
        operation = lane.run(opcode, handle, timeout_ns=1_000_000, **options)
        assert operation.result == -errno.ETIMEDOUT, operation


def test_wait_with_a_timeout_leaves_the_operation_alone(lane: Lane) -> None:
    connection = lane.open()
    read = lane.ring.post(abi.READ, connection, length=1)
    assert not lane.ring.wait(read, 0)
    assert not lane.ring.wait(read, 0.01)
    lane.run(abi.WRITE, connection, data=b"x")
    assert lane.ring.wait(read, DEADLINE_S)
    assert read.bytes() == b"x"


def test_shutdown_then_end_of_data_then_close(lane: Lane) -> None:
    connection = lane.open()
    lane.run(abi.WRITE, connection, data=b"last")
    assert lane.run(abi.SHUTDOWN, connection, argument=abi.SHUTDOWN_WRITE).result == 0
    assert lane.run(abi.WRITE, connection, data=b"x").result == -errno.EPIPE
    assert lane.run(abi.READ, connection, length=10).bytes() == b"last"
    assert lane.run(abi.READ, connection, length=10).result == 0
    assert lane.run(abi.CLOSE, connection).result == 0
    assert lane.run(abi.CLOSE, connection).result == -errno.EBADF
    assert lane.run(abi.READ, connection, length=1).result == -errno.EBADF


def test_close_ends_the_reads_that_wait(lane: Lane) -> None:
    connection = lane.open()
    reads = [lane.ring.post(abi.READ, connection, length=1) for _ in range(3)]
    assert lane.run(abi.CLOSE, connection).result == 0
    assert all(lane.ring.wait(read, DEADLINE_S) and read.result == -errno.ECANCELED for read in reads)


def test_foreign_handles(lane: Lane) -> None:
    connection = lane.open()
    lane.daemon_ends.append(socket.socket())
    stranger = lane.attach()
    for handle in (connection, connection + 1, 1, 1 << 32, 0xFFFF_FFFF_FFFF_FFFF):
        operation = stranger.post(abi.READ, handle, length=1)
        assert stranger.wait(operation, DEADLINE_S)
        assert operation.result == -errno.EBADF
    stranger.close()
    assert lane.run(abi.WRITE, connection, data=b"x").result == 1


def test_listen_and_accept(lane: Lane) -> None:
    listener = lane.run(abi.LISTEN, parameters={"port": 3}).result
    accepted = [lane.run(abi.ACCEPT, listener).result for _ in range(3)]
    assert len(set(accepted)) == 3
    waiting = lane.ring.post(abi.ACCEPT, listener)
    assert lane.run(abi.READ, listener, length=1).result == -errno.EINVAL
    assert lane.run(abi.CLOSE, listener).result == 0
    assert lane.ring.wait(waiting, DEADLINE_S)
    assert waiting.result == -errno.ECANCELED
    assert lane.run(abi.WRITE, accepted[0], data=b"x").result == 1


def test_bytes_before_tls_and_start_tls(lane: Lane) -> None:
    connection = lane.run(abi.CONNECT, parameters=ECHO).result
    assert lane.run(abi.WRITE, connection, data=b"plain").result == 5
    assert lane.run(abi.READ, connection, length=100).bytes() == b"plain"
    info = abi.unpack_info(lane.run(abi.INFO, connection, length=1000).bytes())
    assert (info["tls_version"], info["record_layer"]) == (0, 0)
    assert lane.run(abi.EXPORT, connection).result == -errno.EINVAL
    assert lane.run(abi.START_TLS, connection, parameters={}).result == 0
    assert lane.run(abi.START_TLS, connection, parameters={}).result == -errno.EINVAL
    assert lane.run(abi.WRITE, connection, data=b"x").result == 1


def test_start_tls_while_something_is_in_flight_is_refused_and_changes_nothing(lane: Lane) -> None:
    connection = lane.run(abi.CONNECT, parameters=ECHO).result
    read = lane.ring.post(abi.READ, connection, length=100)
    assert lane.run(abi.START_TLS, connection, parameters={}).result == -errno.EBUSY
    assert lane.run(abi.WRITE, connection, data=b"still plain").result == 11
    assert lane.ring.wait(read, DEADLINE_S)
    assert read.bytes() == b"still plain"
    assert lane.run(abi.START_TLS, connection, parameters={}).result == 0


def test_a_failed_start_tls_ends_the_connection(lane: Lane) -> None:
    connection = lane.run(abi.CONNECT, parameters=ECHO).result
    assert lane.run(abi.START_TLS, connection, parameters={"port": 1}).result == -errno.EPROTO
    assert lane.run(abi.READ, connection, length=1).result == -errno.EPROTO
    assert lane.run(abi.WRITE, connection, data=b"x").result == -errno.EPROTO
    assert lane.run(abi.START_TLS, connection, parameters={}).result == -errno.EPROTO
    assert lane.run(abi.CLOSE, connection).result == 0


def test_start_tls_after_an_end_of_one_direction(lane: Lane) -> None:
    for argument in (abi.SHUTDOWN_READ, abi.SHUTDOWN_WRITE):
        connection = lane.run(abi.CONNECT, parameters=ECHO).result
        assert lane.run(abi.SHUTDOWN, connection, argument=argument).result == 0
        assert lane.run(abi.START_TLS, connection, parameters={}).result == -errno.EPIPE
        assert lane.run(abi.CLOSE, connection).result == 0


def test_export_ends_the_handle_or_is_refused(lane: Lane) -> None:
    """The harness refuses it when its user_data, which counts the operations, is odd."""
    connection = lane.open()
    while lane.run(abi.NOP).user_data & 1:
        pass
    assert lane.run(abi.EXPORT, connection).result == -errno.EOPNOTSUPP
    assert lane.run(abi.WRITE, connection, data=b"x").result == 1  # it goes on
    assert lane.run(abi.READ, connection, length=1).result == 1
    while not lane.run(abi.NOP).user_data & 1:
        pass
    assert lane.run(abi.EXPORT, connection).result == 0
    assert lane.run(abi.READ, connection, length=1).result == -errno.EBADF
    assert lane.run(abi.CLOSE, connection).result == -errno.EBADF


def test_export_with_a_read_in_flight(lane: Lane) -> None:
    connection = lane.open()
    read = lane.ring.post(abi.READ, connection, length=1)
    assert lane.run(abi.EXPORT, connection).result == -errno.EBUSY
    assert lane.run(abi.WRITE, connection, data=b"x").result == 1
    assert lane.ring.wait(read, DEADLINE_S)


def test_listen_without_tls(lane: Lane) -> None:
    listener = lane.run(abi.LISTEN, parameters={"host": b"127.0.0.1", "port": 2, "flags": abi.PARAMETER_PLAIN}).result
    for _ in range(2):
        accepted = lane.run(abi.ACCEPT, listener).result
        assert lane.run(abi.WRITE, accepted, data=b"plain").result == 5
        assert lane.run(abi.READ, accepted, length=9).bytes() == b"plain"
        parameters = {"flags": abi.PARAMETER_SERVER, "certificate": b"localhost"}
        assert lane.run(abi.START_TLS, accepted, parameters=parameters).result == 0


def test_flags_belong_to_their_operations(lane: Lane) -> None:
    for opcode, flags in ((abi.OPEN, 2), (abi.OPEN, 4), (abi.CONNECT, 2), (abi.LISTEN, 1), (abi.LISTEN, 2)):
        assert lane.run(opcode, parameters=ECHO | {"flags": flags}).result == -errno.EINVAL
    connection = lane.run(abi.CONNECT, parameters=ECHO).result
    assert lane.run(abi.START_TLS, connection, parameters={"flags": abi.PARAMETER_PLAIN}).result == -errno.EINVAL


def test_limit_of_connections(lane: Lane) -> None:
    connections = [lane.open() for _ in range(lane.connections)]
    assert lane.run(abi.OPEN, parameters=ECHO).result == -errno.EMFILE
    assert lane.run(abi.CLOSE, connections[0]).result == 0
    lane.open()


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"host": b"h"},
        {"port": 2},
        {"host": b"h", "port": 2, "alpn": b"\x05http"},
        {"host": b"h", "port": 2, "alpn": b"\x00"},
        {"host": b"h", "port": 2, "flags": 0x80},
    ],
)
def test_bad_parameters(lane: Lane, parameters: dict[str, int | bytes]) -> None:
    assert lane.run(abi.OPEN, parameters=parameters).result == -errno.EINVAL


def test_a_view_keeps_the_arena_block(lane: Lane) -> None:
    connection = lane.open()
    lane.run(abi.WRITE, connection, data=b"abc")
    read = lane.run(abi.READ, connection, length=3)
    view = memoryview(read)
    with pytest.raises(BufferError):
        read.release()
    assert bytes(view) == b"abc"
    view.release()
    read.release()
    assert lane.ring.arena_used == 0


def test_many_threads_wait_on_one_ring(lane: Lane) -> None:
    connections = [lane.open() for _ in range(6)]
    failures: list[BaseException] = []

    def echo(connection: int) -> None:
        try:
            for number in range(200):
                data = number.to_bytes(4, "big")
                read = lane.ring.post(abi.READ, connection, length=4)
                write = lane.ring.post(abi.WRITE, connection, data=data)
                assert lane.ring.wait(read, DEADLINE_S)
                assert lane.ring.wait(write, DEADLINE_S)
                assert read.bytes() == data
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=echo, args=(connection,)) for connection in connections]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S * 2)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)


def test_death_of_the_daemon_ends_everything(lane: Lane) -> None:
    operation = lane.ring.post(abi.OPEN, parameters=NEVER)
    waiter = threading.Thread(target=lane.ring.wait, args=(operation, DEADLINE_S))
    waiter.start()
    lane.daemon_ends[0].close()
    waiter.join(DEADLINE_S)
    assert operation.result == -errno.ECONNRESET
    with pytest.raises(ConnectionResetError, match="tls_init"):
        lane.ring.post(abi.NOP)


def test_detach_returns_memory_fds_and_connections() -> None:
    lane = Lane()
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(50):
        ring = lane.attach()
        operation = ring.post(abi.OPEN, parameters=ECHO)
        assert ring.wait(operation, DEADLINE_S)
        ring.post(abi.OPEN, parameters=NEVER)
        ring.post(abi.READ, operation.result, length=100)
        ring.close()
        lane.daemon_ends.pop().close()
    wait_for(lambda: len(lane.harness.clients.status()) == 1)
    assert lane.harness.connections() == 0
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    lane.close()


def test_detached_memory_is_punched_out() -> None:
    lane = Lane()
    _, memory, doorbell, size = lane.harness.clients.attach(
        submission_entries=8, completion_entries=8, slot_count=8, arena_size=1 << 20, connections_max=1
    )
    os.pwrite(memory, b"x" * 100_000, size - 100_000)
    assert os.fstat(memory).st_blocks > 0
    os.close(doorbell)
    wait_for(lambda: os.fstat(memory).st_blocks == 0)
    with pytest.raises(PermissionError):
        os.ftruncate(memory, size // 2)
    os.close(memory)
    lane.close()


def test_the_client_that_never_reads_its_completions() -> None:
    """It gets no more than its ring holds, and the one beside it goes on at full speed."""
    lane = Lane(slots=8)
    greedy = lane.attach()
    for _ in range(8):
        greedy.post(abi.NOP)
    for _ in range(500):
        assert lane.run(abi.NOP).result == 0
    greedy.close()
    lane.close()


def test_a_child_cannot_use_its_parents_ring(lane: Lane) -> None:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            lane.ring.abandon()
            lane.ring.post(abi.NOP)
        except RuntimeError:
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert lane.run(abi.NOP).result == 0


def test_a_detached_program_takes_no_zeros_for_completions() -> None:
    """The daemon punches the memory out while the program still looks at it: the hang-up ends what is in flight."""
    lane = Lane()
    lane.run(abi.NOP)
    operation = lane.ring.post(abi.OPEN, parameters=NEVER)
    (client,) = lane.harness.clients.status()
    lane.harness.clients.detach(client["client"])
    wait_for(lambda: not lane.harness.clients.status())
    assert lane.ring.reap() == 0
    assert lane.ring.wait(operation, DEADLINE_S)
    assert operation.result == -errno.ECONNRESET
    lane.close()
