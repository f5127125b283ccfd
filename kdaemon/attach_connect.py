"""TCP connections for libtls clients: names resolved and addresses tried beside the control thread.

One helper thread with an event loop of its own, started with the first connection, holds any number of attempts; a
name is resolved in that loop's small pool of threads. Addresses are tried as RFC 8305 has it: families interleaved,
the next one a quarter of a second after the one before, or at once when that failed; the first that answers is kept.
"""

import asyncio
import collections
import concurrent.futures.thread  # noqa: F401 - for getaddrinfo, as encodings.idna: while the user may still read their files
import encodings.idna  # noqa: F401
import errno
import itertools
import os
import select
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

ATTEMPT_DELAY_S = 0.25  # RFC 8305 section 5
CONNECT_DEADLINE_S = 30.0  # when the operation has no deadline of its own

Done = Callable[[socket.socket | None, OSError | None], None]
_Result = tuple[object, Done, socket.socket | None, OSError | None]
_AddressInfo = tuple[int, int, int, str, Any]


class Connector:
    """Connects on behalf of the control thread, in which `done` callbacks run. Used by the control thread only."""

    def __init__(self, watch: Callable[[int, Callable[[int], None], int], None]) -> None:
        self._watch = watch
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: dict[object, asyncio.Future[socket.socket]] = {}
        self._results: collections.deque[_Result] = collections.deque()
        self._event_fd = -1
        self._outstanding: set[object] = set()
        self._cancelled: set[object] = set()

    def connect(self, key: object, host: str, port: int, timeout_s: float, done: Done) -> None:
        """Begins; `done(socket, None)` or `done(None, error)` follows unless `cancel(key)` comes first.

        The socket is connected, non-blocking and the callee's. `socket.gaierror`: the name does not resolve.
        """
        loop = self._loop or self._start()
        self._outstanding.add(key)
        asyncio.run_coroutine_threadsafe(self._run(key, host, port, timeout_s or CONNECT_DEADLINE_S, done), loop)

    def cancel(self, key: object) -> None:
        """Its `done` will not be called, if it was not yet."""
        if key in self._outstanding and self._loop is not None:
            self._cancelled.add(key)
            self._loop.call_soon_threadsafe(self._cancel_task, key)

    def _start(self) -> asyncio.AbstractEventLoop:
        self._event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._watch(self._event_fd, self._ready, select.EPOLLIN)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="connect", daemon=True).start()
        return self._loop

    def _cancel_task(self, key: object) -> None:
        if task := self._tasks.get(key):
            task.cancel()

    async def _run(self, key: object, host: str, port: int, timeout_s: float, done: Done) -> None:
        task = self._tasks[key] = asyncio.ensure_future(connect(host, port))
        if key in self._cancelled:  # before this began: there was no task to cancel
            task.cancel()
        sock, error = None, None
        try:
            async with asyncio.timeout(timeout_s):
                sock = await task
        except TimeoutError:
            error = OSError(errno.ETIMEDOUT, "no address answered in time")
        except asyncio.CancelledError:
            error = OSError(errno.ECANCELED, "cancelled")
        except OSError as failure:
            error = failure
        except Exception as failure:  # noqa: BLE001 - whatever it is, the operation ends
            error = OSError(errno.EIO, f"connecting failed: {failure!r}")
        del self._tasks[key]
        self._results.append((key, done, sock, error))
        os.eventfd_write(self._event_fd, 1)

    def _ready(self, _mask: int) -> None:
        os.eventfd_read(self._event_fd)
        while self._results:
            key, done, sock, error = self._results.popleft()
            self._outstanding.discard(key)
            if key in self._cancelled:
                self._cancelled.discard(key)
                if sock is not None:
                    sock.close()
            else:
                done(sock, error)


def interleave(addresses: Sequence[_AddressInfo]) -> list[_AddressInfo]:
    """Families in turn, beginning with that of the first address (RFC 8305 section 4)."""
    families: dict[int, list[_AddressInfo]] = {}
    for address in addresses:
        families.setdefault(address[0], []).append(address)
    rounds = itertools.zip_longest(*families.values())
    return [address for entry in rounds for address in entry if address is not None]


async def connect(host: str, port: int) -> socket.socket:
    """A connected, non-blocking socket. Raises OSError: that of the first address when none works."""
    loop = asyncio.get_running_loop()
    try:
        addresses = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    except ValueError as error:  # UnicodeError: an empty or too long label; ValueError: NUL
        raise socket.gaierror(socket.EAI_NONAME, "this is no name of a host") from error
    waiting = interleave(addresses)
    running: set[asyncio.Task[socket.socket]] = set()
    first_error: OSError | None = None
    winner: socket.socket | None = None
    try:
        while waiting or running:
            if waiting:
                running.add(asyncio.ensure_future(_attempt(waiting.pop(0))))
            finished, running = await asyncio.wait(
                running, timeout=ATTEMPT_DELAY_S if waiting else None, return_when=asyncio.FIRST_COMPLETED
            )
            for task in finished:
                if (failure := task.exception()) is not None:
                    if not isinstance(failure, OSError):
                        raise failure
                    first_error = first_error or failure
                elif winner is None:
                    winner = task.result()
                else:
                    task.result().close()
            if winner is not None:
                return winner
    finally:
        for task in running:
            task.cancel()
        for task in running:
            try:
                (await task).close()
            except (OSError, asyncio.CancelledError):
                pass
    raise first_error or OSError(errno.EADDRNOTAVAIL, "the name has no addresses")


async def _attempt(address: _AddressInfo) -> socket.socket:
    family, kind, protocol, _, target = address
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(sock, target)
    except BaseException:
        sock.close()
        raise
    return sock
