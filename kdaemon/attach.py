"""Programs that use libtls: who may attach, the hello, and the end of a client. Worker side; the control thread's.

The supervisor passes an accepted connection of the daemon's UNIX socket with the hello unread. Who asks is the
kernel's word (SO_PEERCRED), never the hello's. A client ends when its socket hangs up, when its process dies (pidfd:
a forked child may keep the socket), when it closes its doorbell, or when it breaks the ring's protocol.
"""

import array
import contextlib
import errno
import grp
import os
import pwd
import select
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kdaemon_pyx import client_abi as abi
from kdaemon_pyx import client_admission
from kdaemon_pyx.client_admission import Clients

from kdaemon.attach_descriptors import BrokenProtocolError, close_elsewhere, receive
from kdaemon.attach_operations import ClientOperations
from kdaemon.config import Clients as ClientsConfig

_SO_PEERPIDFD = 77  # Linux 6.5; a pidfd of the peer without the race of pidfd_open(pid)

Watch = Callable[[int, Callable[[int], None], int], None]
Unwatch = Callable[[int], None]


@dataclass(slots=True, eq=False)
class AttachedClient:
    """One attached program. Owns its socket and pidfd."""

    handle: int
    sock: socket.socket
    pidfd: int
    pid: int
    uid: int


class Attachments:
    """The attached programs of one worker. Used by the control thread only."""

    def __init__(
        self, clients: Clients, operations: ClientOperations, watch: Watch, unwatch: Unwatch, *, log: Any, lane: int
    ) -> None:
        self._clients = clients
        self._operations = operations
        self._watch = watch
        self._unwatch = unwatch
        self._log = log
        self._lane = lane
        self._attached: dict[int, AttachedClient] = {}
        self._config = ClientsConfig()
        watch(clients.event_fd(), self._events, select.EPOLLIN)

    def configure(self, config: ClientsConfig) -> None:
        """New clients are judged by this."""
        self._config = config

    def take(self, sock: socket.socket, lane_count: int, daemon_uid: int) -> None:
        """A connection whose hello can be read. Owns the socket from here on."""
        sock.setblocking(False)
        try:
            self._greet(sock, lane_count, daemon_uid)
        except OSError as error:
            self._refuse(sock, error, lane_count)
        except ValueError as error:
            self._log.info("client refused", problem=str(error))
            self._close(sock)

    def _greet(self, sock: socket.socket, lane_count: int, daemon_uid: int) -> None:
        pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        data, fds = receive(sock, abi.HELLO_SIZE)
        close_elsewhere(fds)  # nobody asked for any
        hello = abi.unpack_hello(data)
        if hello["version_major"] != abi.VERSION_MAJOR:
            raise OSError(errno.EPROTONOSUPPORT, f"version {hello['version_major']} of the client ring is asked for")
        if not may_attach(self._config, uid, gid, daemon_uid):
            raise OSError(errno.EACCES, f"user {uid} is not in clients.users or clients.groups")
        pidfd = _pidfd(sock, pid)
        try:
            self._welcome(sock, hello, pidfd, lane_count, (pid, uid))
        except OSError:
            if pidfd >= 0:
                os.close(pidfd)
            raise

    def _welcome(
        self, sock: socket.socket, hello: dict[str, int], pidfd: int, lane_count: int, who: tuple[int, int]
    ) -> None:
        config, (pid, uid) = self._config, who
        slots = min(hello["slot_count"] or 1024, config.operations_max)
        minor = min(hello["version_minor"], abi.VERSION_MINOR)
        handle, memory_fd, doorbell_fd, memory_size = self._clients.attach(
            submission_entries=min(hello["submission_entries"], config.operations_max),
            completion_entries=min(hello["completion_entries"], 2 * config.operations_max),
            slot_count=slots,
            arena_size=min(hello["arena_size"] or 16 << 20, config.arena_mib_max << 20),
            connections_max=config.connections_max,
            version_minor=minor,
        )
        reply = abi.pack_hello_reply(
            error=0, version_minor=minor, memory_size=memory_size, lane=self._lane, lane_count=lane_count
        )
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [memory_fd, doorbell_fd]))]
        try:
            sock.sendmsg([reply], ancillary, socket.MSG_NOSIGNAL)
        except OSError:
            self._clients.detach(handle)
            raise
        finally:
            os.close(memory_fd)
            os.close(doorbell_fd)
        client = AttachedClient(handle, sock, pidfd, pid, uid)
        self._attached[handle] = client
        self._operations.users[handle] = uid
        self._operations.descriptors.attached(handle, sock)
        self._watch(sock.fileno(), lambda mask: self._said(client, mask), select.EPOLLIN | select.EPOLLRDHUP)
        if client.pidfd >= 0:
            self._watch(client.pidfd, lambda mask: self._gone(client), select.EPOLLIN)
        self._log.info("client attached", pid=pid, uid=uid, arena_mib=round(memory_size / (1 << 20), 1))

    def _refuse(self, sock: socket.socket, error: OSError, lane_count: int) -> None:
        self._log.warning("client refused", problem=error.strerror)
        reply = abi.pack_hello_reply(error=-(error.errno or 1), lane=self._lane, lane_count=lane_count)
        try:
            sock.send(reply, socket.MSG_NOSIGNAL)
        except OSError:
            pass  # it went away
        self._close(sock)

    def _said(self, client: AttachedClient, mask: int) -> None:
        """A descriptor for ADOPT, or the end."""
        try:
            data, fds = receive(client.sock, abi.DESCRIPTOR_MESSAGE_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        if not data:
            self._gone(client)
            return
        try:
            self._operations.descriptor(client.handle, data, fds)
        except BrokenProtocolError as error:
            self._log.warning("client cut off", pid=client.pid, problem=str(error))
            self._gone(client)

    def _gone(self, client: AttachedClient) -> None:
        if self._attached.get(client.handle) is client:
            self._release(client)
            self._clients.detach(client.handle)

    def _release(self, client: AttachedClient) -> None:
        del self._attached[client.handle]
        self._unwatch(client.sock.fileno())
        self._operations.descriptors.forget(client.handle)
        self._close(client.sock)
        if client.pidfd >= 0:
            self._unwatch(client.pidfd)
            os.close(client.pidfd)

    def _close(self, sock: socket.socket) -> None:
        """The program's waits see the hang-up. Descriptors that nobody received are closed with the socket."""
        unread = b""
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)  # nothing more comes
            unread = sock.recv(1, socket.MSG_PEEK)
        if unread:
            close_elsewhere([sock.detach()])
        else:
            sock.close()

    def _events(self, _mask: int) -> None:
        event: Any
        for event in self._clients.events():
            kind = event[0]
            if kind == client_admission.EVENT_OPERATION:
                self._operations.operation(event)
            elif kind == client_admission.EVENT_CANCEL:
                self._operations.cancel(event)
            elif kind == client_admission.EVENT_LISTENER_CLOSED:
                self._operations.listener_closed(event[2])
            elif kind == client_admission.EVENT_DETACHING:
                self._detaching(event[1], event[2])

    def _detaching(self, handle: int, reason: str) -> None:
        self._operations.forget(handle)
        client = self._attached.get(handle)
        if client is None:
            return
        self._log.info("client detached", pid=client.pid, reason=reason)
        self._release(client)

    def status(self) -> list[dict[str, Any]]:
        """For `ctl status --json`."""
        result = []
        for counters in self._clients.status():
            client = self._attached.get(counters.pop("client"))
            pid, uid = (client.pid, client.uid) if client else (0, -1)
            result.append({"pid": pid, "uid": uid, "lane": self._lane, **counters})
        return result


def may_attach(config: ClientsConfig, uid: int, gid: int, daemon_uid: int) -> bool:
    """Root and the daemon's own user may; others by name or number in `users`, or by one of their groups."""
    if uid in (0, daemon_uid):
        return True
    try:
        account = pwd.getpwuid(uid)
        name, groups = account.pw_name, set(os.getgrouplist(account.pw_name, account.pw_gid)) | {gid}
    except KeyError:
        name, groups = "", {gid}
    if str(uid) in config.users or (name and name in config.users):
        return True
    return any(_group_id(group) in groups for group in config.groups)


def _group_id(group: str) -> int:
    if group.isdecimal():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        return -1


def _pidfd(sock: socket.socket, pid: int) -> int:
    """What tells of the program's death; -1: it lives in another pid namespace, hang-up has to do.

    Raises OSError: it is dead already, whoever holds its socket; or no descriptor is left.
    """
    try:
        return struct.unpack("i", sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4))[0]  # type: ignore[no-any-return]
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
    return os.pidfd_open(pid) if pid > 0 else -1
