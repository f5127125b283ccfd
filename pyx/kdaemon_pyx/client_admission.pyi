"""Clients of a worker as its control thread sees them."""

from typing import Final, TypeAlias

EVENT_OPERATION: Final[int]          # (kind, client, opcode, slot, sequence, token, handle, user_data, timeout_ns, parameters, data,
                                     # connection: the engine's, of START_TLS and EXPORT)
EVENT_CANCEL: Final[int]             # (kind, client, slot, sequence, token, errno): answer the operation soon
EVENT_LISTENER_CLOSED: Final[int]    # (kind, client, token, handle)
EVENT_DETACHING: Final[int]          # (kind, client, reason: str)
EVENT_DETACHED: Final[int]           # (kind, client, reason: str): its memory is returned

Event: TypeAlias = tuple[object, ...]

class Clients:
    """The clients of one worker.

    Thread-safety: the methods belong to one control thread; the engine thread gets the object once, before it runs. The object
    must outlive the engine's run.
    """

    def __init__(self, *, clients_max: int = 64) -> None: ...
    def event_fd(self) -> int:
        """eventfd that becomes readable when ``events()`` has something (owner: this object)."""
    def attach(
        self, *, submission_entries: int, completion_entries: int, slot_count: int, arena_size: int, connections_max: int,
        version_minor: int = ...,
    ) -> tuple[int, int, int, int]:
        """Makes a client's shared memory: (client, memory_fd, doorbell_fd, memory_size); the caller passes both fds and closes them.

        Raises OSError: EUSERS when all places are taken, or what memfd_create said.
        """
    def detach(self, client: int) -> None:
        """Cuts a client off -> EVENT_DETACHING, then EVENT_DETACHED when its connections are joined."""
    def complete(self, client: int, slot: int, sequence: int, result: int, detail: int = 0, info: bytes = b"") -> None:
        """Answers an EVENT_OPERATION with 0 or a negative errno; an established connection is answered by the engine instead."""
    def accepted(self, listener: int, info: bytes) -> int:
        """Token to install a connection of this listener with; 0: the listener is gone. ``forget`` it if it is not installed."""
    def describe(self, token: int, info: bytes) -> None:
        """What INFO will answer for the connection that an operation's token stands for."""
    def forget(self, token: int) -> None: ...
    def events(self) -> list[Event]: ...
    def status(self) -> list[dict[str, int]]:
        """Counters of every attached client."""
