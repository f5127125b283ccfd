"""Finding the daemon and attaching to it: the hello over its UNIX socket, and what comes back."""

import errno
import os
import socket
import time
from pathlib import Path

from kdaemon_pyx import client_abi as abi
from kdaemon_pyx.client_ring import ClientRing

from libtls.descriptors import receive_descriptors
from libtls.errors import DaemonError, DaemonNotRunning, NotAllowed, WrongVersion

HELLO_DEADLINE_S = 10.0
_RETRY_S = 0.01
_PATH_SIZE_MAX = 107  # sun_path of unix(7), without its terminator


def socket_path() -> str:
    """Where the daemon listens: `KDAEMON_SOCKET`, else the first default place that exists, else the first one."""
    if path := os.environ.get("KDAEMON_SOCKET"):
        return path
    uid = os.geteuid()
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    places = [f"{runtime}/kdaemon.sock"] if runtime else []
    places += [
        "/run/kdaemon.sock",
        f"/run/user/{uid}/kdaemon.sock",
        f"{os.environ.get('TMPDIR', '/tmp')}/kdaemon-{uid}.sock",
    ]
    return next((place for place in places if Path(place).exists()), places[0])


def attach(
    path: str | None = None,
    *,
    lane: int | None = None,
    operations: int = 0,
    arena_size: int = 0,
    version: tuple[int, int] | None = None,
) -> ClientRing:
    """Attaches to the daemon at `path` (default: `socket_path()`); 0 asks for the daemon's default size.

    lane: attach to this worker, modulo their number; None: the daemon chooses.
    Raises DaemonNotRunning, NotAllowed, WrongVersion, DaemonError (path too long, no room, no answer in time).
    """
    path = path or socket_path()
    if len(os.fsencode(path)) > _PATH_SIZE_MAX:
        raise DaemonError(errno.ENAMETOOLONG, f"{path}: longer than the {_PATH_SIZE_MAX} bytes of a UNIX socket's path")
    hello = abi.pack_hello(
        lane=abi.LANE_ANY if lane is None else lane,
        submission_entries=operations,
        completion_entries=operations,
        slot_count=operations,
        arena_size=arena_size,
        **({"version": version} if version else {}),
    )
    fds: list[int] = []
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(HELLO_DEADLINE_S)
        try:
            _connect(connection, path)
            connection.sendall(hello)
            data, fds = receive_descriptors(connection, abi.HELLO_REPLY_SIZE, 2)
        except (FileNotFoundError, ConnectionRefusedError):
            raise DaemonNotRunning(
                errno.ECONNREFUSED, f"{path}: kdaemon does not listen there; is it running?"
            ) from None
        except PermissionError:
            raise NotAllowed(errno.EACCES, f"{path}: this user may not open the daemon's socket") from None
        except (ConnectionResetError, BrokenPipeError):
            data = b""
        except TimeoutError:
            raise DaemonError(errno.ETIMEDOUT, f"{path}: no answer within {HELLO_DEADLINE_S:.0f} s") from None
        _check(path, data)
        if len(fds) < 2:
            raise DaemonError(errno.EMFILE, f"{path}: this program has no room for the daemon's two descriptors")
        connection.settimeout(None)
        ring = ClientRing(fds[0], fds[1], connection.fileno())
        connection.detach()
        fds = []
        return ring
    finally:
        for fd in fds:
            os.close(fd)
        connection.close()


def _connect(connection: socket.socket, path: str) -> None:
    """Waits where many others have connected and the daemon has not got to them yet: the kernel does not."""
    end = time.monotonic() + HELLO_DEADLINE_S
    while True:
        try:
            connection.connect(path)
            return
        except BlockingIOError:
            if time.monotonic() >= end:
                raise TimeoutError from None
            time.sleep(_RETRY_S)


def _check(path: str, data: bytes) -> None:
    """Raises what a reply that is no welcome stands for."""
    if not data:
        raise DaemonError(errno.ECONNRESET, f"{path}: the daemon closed the connection; is it starting or stopping?")
    try:
        reply = abi.unpack_hello_reply(data)
    except ValueError as error:
        raise WrongVersion(errno.EPROTONOSUPPORT, f"{path}: {error}") from None
    match -reply["error"]:
        case 0:
            return
        case errno.EPROTONOSUPPORT:
            theirs = f"{reply['version_major']}.{reply['version_minor']}"
            raise WrongVersion(errno.EPROTONOSUPPORT, f"{path}: the daemon speaks version {theirs} of the client ring")
        case errno.EACCES:
            raise NotAllowed(
                errno.EACCES, f"{path}: this user is not among the daemon's clients.users or clients.groups"
            )
        case number:
            raise DaemonError(number, f"{path}: the daemon refused: {os.strerror(number)}")
