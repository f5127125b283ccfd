"""Programs and their rings, turn by turn of the daemon: those that share a worker share it alike; signals in a wait."""

from __future__ import annotations

import errno
import signal
import socket

import pytest
from kdaemon_pyx import client_abi as abi
from kdaemon_pyx.client_harness import Harness
from kdaemon_pyx.client_ring import ClientRing
from support.waiting import DEADLINE_S

PER_TURN = 64  # client_service.pyx, SUBMISSIONS_PER_TURN
SLOTS = 1024


class Programs:
    """Several rings, and turns of the daemon one by one."""

    def __init__(self, count: int) -> None:
        self.harness = Harness()
        self.ends: list[socket.socket] = []
        self.rings = [self._attach() for _ in range(count)]
        self.harness.turn()

    def _attach(self) -> ClientRing:
        _, memory, doorbell, _ = self.harness.clients.attach(
            submission_entries=SLOTS, completion_entries=SLOTS, slot_count=SLOTS, arena_size=1 << 20, connections_max=8
        )
        ours, theirs = socket.socketpair()
        self.ends.append(ours)
        return ClientRing(memory, doorbell, theirs.detach())

    def answered(self) -> list[int]:
        return [entry["completions"] for entry in self.harness.clients.status()]

    def close(self) -> None:
        for ring in self.rings:
            ring.close()
        for end in self.ends:
            end.close()
        self.harness.turn()


def test_a_flood_takes_its_share_of_a_turn() -> None:
    programs = Programs(3)
    flood, *others = programs.rings
    for _ in range(5 * PER_TURN):
        flood.post(abi.NOP)
    for ring in others:
        ring.post(abi.NOP)
    programs.harness.turn()
    assert programs.answered() == [PER_TURN, 1, 1]
    for turn in range(2, 6):
        programs.harness.turn()
        assert programs.answered() == [turn * PER_TURN, 1, 1]
    programs.close()


def test_floods_share_alike() -> None:
    programs = Programs(3)
    for ring in programs.rings:
        for _ in range(3 * PER_TURN):
            ring.post(abi.NOP)
    for turn in range(1, 4):
        programs.harness.turn()
        assert programs.answered() == [turn * PER_TURN] * 3
    programs.close()


def test_signals_are_handled_in_a_wait() -> None:
    """As PEP 475 has it: a wait goes on behind a handler that returns; the exception of one that raises ends it."""
    programs = Programs(1)
    (ring,) = programs.rings
    operation = ring.post(abi.OPEN, parameters={"host": b"never", "port": 1})
    programs.harness.turn()
    handled = 0

    def handler(_number: int, _frame: object) -> None:
        nonlocal handled
        handled += 1
        if handled == 3:
            raise InterruptedError("enough")

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
        with pytest.raises(InterruptedError, match="enough"):
            ring.wait(operation, DEADLINE_S)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert handled == 3
    cancel = ring.post(abi.CANCEL, target=operation)
    programs.harness.turn()
    assert ring.wait(cancel, DEADLINE_S)
    programs.harness.turn()  # an OPEN under way is taken back first
    assert ring.wait(operation, DEADLINE_S)
    assert (cancel.result, operation.result) == (0, -errno.ECANCELED)
    programs.close()
