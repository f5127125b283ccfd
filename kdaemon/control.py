"""The daemon's UNIX socket: JSON lines for `kdaemon ctl`; programs that attach by libtls go to a worker.

The first byte decides: `{` begins a command, anything else is libtls's hello, left unread for the worker. Commands
are taken from root and from the daemon's own user only (SO_PEERCRED); who may attach is decided where that is
served. Who has connected and not yet said what for has a deadline, and a place of few: when all are taken, the user
with most of them loses the oldest, so that nobody keeps others out by saying nothing.
"""

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from kdaemon.config import default_socket_path

Message = dict[str, Any]

REQUEST_SIZE_MAX = 4096
RESPONSE_SIZE_MAX = 16 << 20
REQUEST_DEADLINE_S = 5.0
CLIENT_DEADLINE_S = 10.0
CONNECTIONS_MAX = 128  # at a time, of those that are not handed on to a worker yet
_ACCEPT_PAUSE_S = 0.1  # when no descriptor is left
_REFUSAL = json.dumps({"error": "only root and the daemon's own user may give commands"}).encode() + b"\n"
PATH_SIZE_MAX = 107  # sun_path


class ControlError(Exception):
    """The control socket cannot be had, or a command cannot be carried out; one line."""


class ControlServer:
    """Listens on the daemon's UNIX socket. Owns the socket, its file and a lock file beside it.

    The lock tells a living daemon's socket from a stale file, which is replaced. `path` empty: the default path; if
    another daemon has that one, `NAME-PID.sock` beside it. `attach` is given the programs that attach; it duplicates
    what it takes, and says whether it did. Raises ControlError.
    """

    def __init__(
        self,
        path: str,
        handle: Callable[[Message], Awaitable[Message]],
        log: Any,
        attach: Callable[[socket.socket], bool] | None = None,
        open_to_all: bool = False,
    ) -> None:
        self._handle = handle
        self._attach = attach
        self._log = log
        self._serving: dict[asyncio.Task[None], int] = {}  # the oldest first -> user
        chosen = path or default_socket_path()
        lock = _lock(chosen)
        if lock is None and not path and "KDAEMON_SOCKET" not in os.environ:
            first, chosen = chosen, chosen.removesuffix(".sock") + f"-{os.getpid()}.sock"
            log.warning("control socket is another daemon's", path=first, instead=chosen)
            lock = _lock(chosen)
        if lock is None:
            raise ControlError(f"{chosen}: another kdaemon listens there; stop it, or choose another socket")
        self.path = chosen
        self._lock = lock
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        try:
            with contextlib.suppress(FileNotFoundError):
                Path(chosen).unlink()  # stale: nobody held the lock
            mask = os.umask(0o111 if open_to_all else 0o177)  # SO_PEERCRED decides
            try:
                self._socket.bind(chosen)
            finally:
                os.umask(mask)
            self._socket.listen(1024)
        except OSError as error:
            self._socket.close()
            os.close(lock)
            raise ControlError(f"{chosen}: cannot listen: {error.strerror}") from None
        self._listen()

    def close(self) -> None:
        """Stops listening and takes the files away."""
        for task in self._serving:
            task.cancel()
        if self._socket.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            for path in (self.path, f"{self.path}.lock"):
                with contextlib.suppress(OSError):
                    Path(path).unlink()
            os.close(self._lock)

    def _listen(self) -> None:
        if self._socket.fileno() >= 0:
            asyncio.get_running_loop().add_reader(self._socket.fileno(), self._accept)

    def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            connection, _ = self._socket.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # who waits stays readable: do not ask again at once
                loop.remove_reader(self._socket.fileno())
                loop.call_later(_ACCEPT_PAUSE_S, self._listen)
            return
        connection.setblocking(False)
        if len(self._serving) >= CONNECTIONS_MAX:
            self._make_room()
        uid = _user(connection)
        task = loop.create_task(self._serve(connection, uid))
        self._serving[task] = uid
        task.add_done_callback(lambda done: self._serving.pop(done, None))

    def _make_room(self) -> None:
        crowd = Counter(self._serving.values()).most_common(1)[0][0]
        oldest = next(task for task, uid in self._serving.items() if uid == crowd)
        del self._serving[oldest]
        oldest.cancel()

    async def _serve(self, connection: socket.socket, uid: int) -> None:
        loop = asyncio.get_running_loop()
        handed_on = False
        try:
            async with asyncio.timeout(REQUEST_DEADLINE_S):
                await _readable(connection)
                if connection.recv(1, socket.MSG_PEEK) not in (b"{", b""):
                    handed_on = self._attach is not None and self._attach(connection)
                    return
                if uid not in (0, os.geteuid()):
                    connection.send(_REFUSAL)  # and nothing is received: see _close()
                    return
                request = b""
                while not request.endswith(b"\n") and len(request) < REQUEST_SIZE_MAX:
                    received = await loop.sock_recv(connection, 16 * REQUEST_SIZE_MAX)
                    if not received:
                        return
                    request += received
            response = await self._answer(request)
            async with asyncio.timeout(REQUEST_DEADLINE_S):
                await loop.sock_sendall(connection, json.dumps(response).encode() + b"\n")
        except (OSError, TimeoutError):
            pass  # it went away, or never finished its request
        finally:
            if handed_on:
                connection.close()
            else:
                self._close(connection)

    def _close(self, connection: socket.socket) -> None:
        """A stranger may have sent descriptors whose last close waits for somebody: what nobody received goes to a
        worker all the same, which finds it to be no hello, and has a thread for such closes."""
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)  # nothing more comes
            if connection.recv(1, socket.MSG_PEEK) and self._attach is not None:
                self._attach(connection)
        connection.close()

    async def _answer(self, request: bytes) -> Message:
        try:
            message = json.loads(request)
            self._log.debug("control", command=message.get("command"))
            return {"result": await self._handle(message)}
        except Exception as error:  # noqa: BLE001 - the daemon outlives any request; the asker is told
            return {"error": str(error)}


def request(command: str, path: str = "") -> Message:
    """Sends one command to the daemon at `path` (default: see default_socket_path) and returns its result.

    Raises ControlError: no daemon, no answer in time, or the daemon refused.
    """
    path = path or default_socket_path()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(CLIENT_DEADLINE_S)
        try:
            connection.connect(path)
            connection.sendall(json.dumps({"command": command}).encode() + b"\n")
            with connection.makefile("rb") as file:
                line = file.readline(RESPONSE_SIZE_MAX)
        except (FileNotFoundError, ConnectionRefusedError):
            raise ControlError(
                f"{path}: no kdaemon listens there (is it running? --socket or KDAEMON_SOCKET?)"
            ) from None
        except TimeoutError:
            raise ControlError(f"{path}: the daemon does not answer") from None
        except OSError as error:
            raise ControlError(f"{path}: {error.strerror or error}") from None
    if not line.endswith(b"\n"):
        raise ControlError(f"{path}: the daemon ended before it answered")
    response: Message = json.loads(line)
    if "error" in response:
        raise ControlError(response["error"])
    result: Message = response["result"]
    return result


def format_status(status: Message) -> str:
    """`ctl status` for a person."""
    ktls = status["ktls"]
    lines = [
        f"kdaemon {status['version']} on Linux {status['kernel']}, pid {status['pid']}, {status['state']}, "
        f"up {status['uptime_s']:.0f} s",
        f"listening on {', '.join(status['listeners'])}",
        f"record layer: {status['backend']} (ktls {ktls['mode']}: {ktls['reason']})",
    ]
    for worker in status["workers"]:
        if not worker["responding"]:
            lines.append(f"worker {worker['index']}: pid {worker['pid']} does not respond")
            continue
        handshakes, layer = worker["handshakes"], worker["record_layer"]
        lines.append(
            f"worker {worker['index']}: pid {worker['pid']} on CPU {worker['cpu']}, "
            f"{worker['connections']} connections, {worker['accepted']} accepted; "
            f"handshakes {handshakes['full']} full, {handshakes['resumed']} resumed, {handshakes['failed']} failed; "
            f"records {layer['kernel']} kernel, {layer['user']} user; "
            f"{worker['bytes_in']} bytes in, {worker['bytes_out']} out"
        )
    return "\n".join(lines)


def _lock(path: str) -> int | None:
    """Locks the file beside the socket; None if a living daemon holds it. Raises ControlError."""
    if len(os.fsencode(path)) > PATH_SIZE_MAX:
        raise ControlError(f"{path}: longer than the {PATH_SIZE_MAX} bytes a UNIX socket path may have")
    while True:
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True, mode=0o755)
            fd = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ControlError(f"{path}: cannot be made: {error.strerror}") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), Path(f"{path}.lock").stat()):
                return fd
        os.close(fd)  # its owner took the file away between open and lock


def _user(connection: socket.socket) -> int:
    """Whose program connected, by the kernel's word."""
    uid: int
    _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return uid


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def ready() -> None:
        if not future.done():
            future.set_result(None)

    loop.add_reader(sock.fileno(), ready)
    try:
        await future
    finally:
        loop.remove_reader(sock.fileno())
