"""A connection's bytes for an event loop: without a Python object per operation."""

import asyncio
from typing import Protocol, final, type_check_only

from _typeshed import ReadableBuffer
from typing_extensions import disjoint_base

from kdaemon_pyx.client_ring import ClientRing

WRITE_PIECE_SIZE: int

@type_check_only
class Owner(Protocol):
    """What a stream tells its transport."""

    def ended(self, result: int, detail: int) -> None:
        """Nothing more can be read: 0 is close_notify, else a negative errno."""
    def failed(self, result: int, detail: int) -> None:
        """A WRITE ended with this negative errno, or the daemon is gone."""
    def raised(self, error: Exception, what: str) -> None:
        """The protocol's method `what` raised; it is not to be called with data any more if that was one for it."""
    def flushed(self) -> None:
        """All that was written is posted: what ends this direction may queue up behind it."""

@disjoint_base
class LaneReader:
    """Takes a lane's completions in an event loop, which watches the lane's doorbell and the end of its attach socket."""

    loop: asyncio.AbstractEventLoop
    def __init__(self, ring: ClientRing, loop: asyncio.AbstractEventLoop) -> None: ...
    def soon(self) -> None:
        """Something was posted: look at the ring, and after the daemon, in the next turn of the loop."""
    def close(self) -> None:
        """Before the ring is closed: the loop stops watching."""

@final
class Stream:
    """READs and WRITEs of one connection, for its transport. Belongs to the thread of the event loop."""

    def __init__(self, ring: ClientRing, reader: LaneReader, handle: int, owner: Owner) -> None: ...
    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None: ...
    def start(self) -> None:
        """Reads from here on, unless paused."""
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def is_reading(self) -> bool: ...
    def write(self, data: ReadableBuffer) -> None:
        """Copied when it is called. RuntimeError after `end_writing`."""
    def flush(self) -> bool:
        """Posts what waits, as far as there is room. True: that was all, and owner.flushed() was called."""
    def end_writing(self) -> None:
        """Nothing more may be written; what was written still leaves."""
    def hold(self) -> None:
        """Nothing more is posted; the READ in flight is called back. What it brings, or brought, is delivered, even to who paused.

        A BARRIER behind it tells when nothing is in flight. BlockingIOError: the ring is full.
        """
    def resume(self) -> None:
        """After `hold`: reads and writes on."""
    def stop(self) -> None:
        """Nothing is delivered and nothing more is accepted; what was written still leaves."""
    def give_up(self) -> None:
        """The connection is lost: what waits is dropped."""
    def write_buffer_size(self) -> int: ...
    def write_buffer_limits(self) -> tuple[int, int]: ...
    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...
