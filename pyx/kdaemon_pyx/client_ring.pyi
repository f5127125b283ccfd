"""The program's side of a client ring: post, reap, wait, and the data arena."""

from collections.abc import Callable
from typing import Self, final

from _typeshed import ReadableBuffer
from typing_extensions import disjoint_base

@final
class Operation:
    """One posted operation. Buffer protocol: the bytes that a completed READ or INFO got, in the arena, without a copy."""

    context: object
    def __init__(self, *args: object, **kwargs: object) -> None:
        """TypeError: operations are made by posting them."""
    @property
    def user_data(self) -> int: ...
    @property
    def handle(self) -> int: ...
    @property
    def detail(self) -> int: ...
    @property
    def opcode(self) -> int: ...
    @property
    def done(self) -> bool: ...
    @property
    def result(self) -> int:
        """Bytes, a handle, 0, or a negative errno. ValueError while in flight."""
    def bytes(self) -> bytes: ...
    def release(self) -> None:
        """Give the arena block back early. ValueError while in flight, BufferError while a view of it exists."""
    def __buffer__(self, flags: int, /) -> memoryview: ...

@disjoint_base
class ClientRing:
    """One lane to one worker of the daemon. Every method may be called from any thread of the process that made it."""

    spin_ns: int
    def __new__(cls, memory_fd: int, doorbell_fd: int, attach_fd: int) -> Self:
        """Owns the three fds from here on. Raises OSError (EPROTONOSUPPORT, EPROTO, what mmap said)."""
    @property
    def arena_size(self) -> int: ...
    @property
    def arena_used(self) -> int: ...
    @property
    def slot_count(self) -> int: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def is_dead(self) -> bool: ...
    @property
    def doorbells(self) -> int: ...
    def fileno(self) -> int: ...
    def attach_fileno(self) -> int: ...
    def post(
        self,
        opcode: int,
        handle: int = 0,
        length: int = 0,
        data: ReadableBuffer | None = None,
        timeout_ns: int = 0,
        parameters: dict[str, int | bytes] | None = None,
        target: Operation | None = None,
        argument: int = 0,
        context: object = None,
    ) -> Operation:
        """Post an operation. length: arena bytes to reserve; data: what to copy into the arena.

        Raises BlockingIOError: all slots are in flight; OSError(ENOBUFS): the arena is full; ConnectionResetError: the daemon is gone.
        """
    def cancel(self, target: Operation) -> Operation: ...
    def reap(self) -> int:
        """Take all completions that are there and run their callbacks; how many. Never blocks."""
    def on_done(self, operation: Operation, callback: Callable[[Operation], object]) -> None: ...
    def arm(self) -> bool:
        """Ask for the doorbell. False: completions are there already, reap instead of waiting."""
    def disarm(self) -> bool:
        """After the doorbell rang: empty it. False when the daemon is gone; then everything in flight has ended."""
    def lose(self) -> None:
        """The attach socket hung up: take the completions that are there, and end everything else that is in flight."""
    def wait(self, operation: Operation, timeout: float | None = None) -> bool:
        """Until the operation is done; False when ``timeout`` (seconds) passed before. Signals run their handlers (PEP 475)."""
    def abandon(self) -> None: ...
    def close(self) -> None: ...
