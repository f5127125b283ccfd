"""The operations as functions, over one lane that `tls_init` attaches. docs/libtls.md explains them."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from kdaemon_pyx import client_abi as abi

from libtls.connection import READ_SIZE, Connection, Listener
from libtls.errors import DaemonError
from libtls.operation import Lane, Operation, alpn_bytes, tls_parameters

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

Value = TypeVar("Value")


@dataclass(slots=True)
class _Program:
    """What this process has attached by tls_init."""

    lane: Lane | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)  # threads that call tls_init at once get one lane


_program = _Program()


def _after_fork_in_child() -> None:
    _program.lock = threading.Lock()  # the thread that held it stayed with the parent


os.register_at_fork(after_in_child=_after_fork_in_child)


def tls_init(path: str | None = None, *, operations: int = 0, arena_size: int = 0) -> Lane:
    """Attaches to the daemon; `path` names its socket (default: `KDAEMON_SOCKET`, else under $XDG_RUNTIME_DIR or /run).

    The lane is what the other functions use when they are given none; when this program is attached already, it is
    that lane. 0 asks for the daemon's default. Thread-safe; a forked child gets a lane of its own.
    Raises DaemonNotRunning, NotAllowed, WrongVersion, DaemonError.
    """
    with _program.lock:
        if _program.lane is None or _program.lane.ring.is_dead:
            _program.lane = Lane.attach(path, operations=operations, arena_size=arena_size)
        return _program.lane


def tls_destroy() -> None:
    """Detaches: operations in flight end with ECONNRESET, connections are closed. Harmless without tls_init."""
    with _program.lock:
        lane, _program.lane = _program.lane, None
    if lane is not None:
        lane.close()


def current_lane() -> Lane:
    """The lane of `tls_init`. Raises DaemonError without one."""
    if (lane := _program.lane) is None:
        raise DaemonError(errno.ENOTCONN, "not attached to kdaemon: call tls_init() first")
    return lane


def _pem(cafile: str | Path | None, cadata: bytes | None) -> bytes | None:
    return Path(cafile).read_bytes() if cafile else cadata or None


def tls_open(
    host: str,
    port: int,
    *,
    server_name: str | None = None,
    alpn: Sequence[str] = (),
    cafile: str | Path | None = None,
    cadata: bytes | None = None,
    insecure: bool = False,
    certificate: str = "",
    timeout: float | None = None,
    lane: Lane | None = None,
) -> Operation[Connection]:
    """OPEN: resolve, connect, handshake, verify; its value is the connection.

    server_name: the name to verify, if it is not `host`. cafile, cadata: PEM certificates to trust instead of the
    system's. certificate: a name that one of the daemon's configured certificates has, for servers that ask who the
    client is; its key stays there. timeout: the operation's deadline in seconds.
    """
    lane = lane or current_lane()
    parameters = tls_parameters(
        server_name=server_name, alpn=alpn, insecure=insecure, host=host, port=port, certificate=certificate
    )
    raw = lane.post(abi.OPEN, data=_pem(cafile, cadata), timeout=timeout, parameters=parameters)
    return Operation(lane, raw, lambda done: Connection(lane, done.result))


def tls_connect(
    host: str, port: int, *, timeout: float | None = None, lane: Lane | None = None
) -> Operation[Connection]:
    """CONNECT: resolve and connect; its value is a connection that carries bytes as they are, until `tls_start`."""
    lane = lane or current_lane()
    parameters = tls_parameters(server_name=None, alpn=(), insecure=False, host=host, port=port)
    raw = lane.post(abi.CONNECT, timeout=timeout, parameters=parameters)
    return Operation(lane, raw, lambda done: Connection(lane, done.result))


def tls_start(
    conn: Connection,
    server_name: str = "",
    *,
    server_side: bool = False,
    certificate: str = "",
    alpn: Sequence[str] = (),
    cafile: str | Path | None = None,
    cadata: bytes | None = None,
    insecure: bool = False,
    timeout: float | None = None,
) -> Operation[Connection]:
    """START_TLS: the handshake on a connection without TLS; its value is `conn`.

    server_name: whom to verify, as the client. server_side: this side is the server. certificate: of the daemon's
    configuration, as in `tls_listen` or `tls_open`. EBUSY while other operations of the connection are in flight.
    """
    parameters = tls_parameters(server_name=server_name, alpn=alpn, insecure=insecure, certificate=certificate)
    if server_side:
        parameters["flags"] = abi.PARAMETER_SERVER
    data = _pem(cafile, cadata)
    raw = conn.lane.post(abi.START_TLS, conn.handle, data=data, timeout=timeout, parameters=parameters)
    return Operation(conn.lane, raw, lambda done: conn)


def tls_listen(
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    certificate: str = "",
    alpn: Sequence[str] = (),
    backlog: int = 128,
    tls: bool = True,
    lane: Lane | None = None,
) -> Operation[Listener]:
    """LISTEN: a TLS server socket; its value is the listener. port 0: the kernel chooses, `Listener.port` tells.

    certificate: a name that one of the daemon's configured certificates has; empty: by what each client asks for.
    tls=False: what is accepted carries bytes as they are, until `tls_start(..., server_side=True)`.
    """
    lane = lane or current_lane()
    raw = lane.post(
        abi.LISTEN,
        parameters={
            "host": host.encode(),
            "port": port,
            "certificate": certificate.encode(),
            "alpn": alpn_bytes(alpn),
            "backlog": backlog,
            "flags": 0 if tls else abi.PARAMETER_PLAIN,
        },
    )
    return Operation(lane, raw, lambda done: Listener(lane, done.result))


def tls_accept(listener: Listener, *, timeout: float | None = None) -> Operation[Connection]:
    """ACCEPT: its value is the next connection whose handshake is complete."""
    return listener.accept_operation(timeout=timeout)


def tls_read(conn: Connection, n: int = READ_SIZE, *, timeout: float | None = None) -> Operation[bytes]:
    """READ: its value is 1..n bytes, empty only after the peer's close_notify; `view()` gives them without a copy."""
    return conn.read_operation(n, timeout=timeout)


def tls_write(conn: Connection, data: ReadableBuffer, *, timeout: float | None = None) -> Operation[int]:
    """WRITE: its value is the number of bytes sent. The data is copied when it is posted."""
    return conn.write_operation(data, timeout=timeout)


def tls_close(conn: Connection | Listener, *, timeout: float | None = None) -> Operation[int]:
    """CLOSE: after the writes before it close_notify, then the end; a listener stops listening."""
    if isinstance(conn, Connection):
        return conn.close_operation(timeout=timeout)
    return Operation(conn.lane, conn.lane.post(abi.CLOSE, conn.handle, timeout=timeout), lambda done: done.result)


def tls_try(op: Operation[Value]) -> bool:
    """Whether the operation is done. Never blocks; may be asked again and again."""
    return op.done


def tls_wait(op: Operation[Value], timeout: float | None = None) -> Value:
    """Blocks until the operation is done; its value or its exception. TimeoutError after `timeout` seconds."""
    return op.wait(timeout)


def tls_try_cancel(op: Operation[Value]) -> Operation[bool]:
    """CANCEL: asks for the operation's end. It completes once all the same: with ECANCELED or with its real result."""
    return op.cancel()


def tls_barrier(conn: Connection) -> Operation[int]:
    """BARRIER: done when all before it on this connection is; nothing behind it starts earlier."""
    return conn.barrier_operation()


def tls_oper_state_destroy(op: Operation[Value]) -> None:
    """Gives its memory back. BlockingIOError (EBUSY) while it is in flight, BufferError while a view exists."""
    op.destroy()
