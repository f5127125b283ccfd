"""keymgr: the only process that holds private keys.

`python -m kdaemon.keymgr`, started by the supervisor with descriptor 3. It opens, makes and checks the keys, gives up
root if it has it, tells the supervisor the public part, and from then on signs what workers ask for in the terms of
key_protocol. It is replaced when it dies: nothing but the ticket keys would be lost with it, and those it keeps
in a memory file whose descriptor the supervisor holds for the next one, without ever reading it.
"""

import os
import secrets
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Callable

from kdaemon import process
from kdaemon.channel import Channel
from kdaemon.config import Config, ConfigError, from_mapping
from kdaemon.credentials import Credential, CredentialError, load_all
from kdaemon.key_protocol import (
    MESSAGE_SIZE_MAX,
    REPLY,
    REQUEST,
    ROLE_CLIENT,
    ROLE_SERVER,
    SIGN,
    SIGNATURES,
    TICKET_KEYS,
    TicketKey,
    parse_ticket_keys,
    serialize_ticket_keys,
)
from kdaemon.observe import configure_logging, get_logger
from kdaemon.tls import signing

ROLES = {ROLE_SERVER: signing.Role.SERVER, ROLE_CLIENT: signing.Role.CLIENT}


class TicketKeyStore:
    """The ticket keys, the newest first, kept in a memory file that survives this process.

    A key seals tickets for `rotation_s` and opens them for `lifetime_s` more. Owns `fd`.
    """

    def __init__(self, fd: int | None, rotation_s: int, lifetime_s: int) -> None:
        self.rotation_s = rotation_s
        self.lifetime_s = lifetime_s
        self.fd = os.memfd_create("kdaemon-ticket-keys", os.MFD_CLOEXEC) if fd is None else fd
        try:
            self.keys = parse_ticket_keys(os.pread(self.fd, MESSAGE_SIZE_MAX, 0))
        except ValueError:
            self.keys = []  # cut in the middle of a write: begin anew

    def rotate(self, now_s: float) -> bool:
        """Makes a new key and drops old ones if it is time; True if anything changed."""
        keys = [entry for entry in self.keys if now_s < entry.created_s + self.rotation_s + self.lifetime_s]
        if not keys or now_s >= keys[0].created_s + self.rotation_s or keys[0].created_s > now_s + self.rotation_s:
            keys.insert(0, TicketKey(secrets.token_bytes(16), secrets.token_bytes(32), int(now_s)))
        if keys == self.keys:
            return False
        self.keys = keys
        data = serialize_ticket_keys(keys)
        os.pwrite(self.fd, data, 0)
        os.ftruncate(self.fd, len(data))
        return True

    def next_rotation_s(self, now_s: float) -> float:
        """Seconds until rotate() has something to do."""
        return max(0.0, self.keys[0].created_s + self.rotation_s - now_s) if self.keys else 0.0


class _Peer:
    """A worker's socket, and the replies it has not taken yet (while there are any, no more is read from it)."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.replies: deque[bytes] = deque()


class KeyManager:
    """The event loop of keymgr: one thread, batches in, batches out."""

    def __init__(self, supervisor: Channel, credentials: list[Credential], tickets: TicketKeyStore) -> None:
        self._supervisor = supervisor
        self._credentials = {bytes.fromhex(entry.key_id): entry for entry in credentials}
        self._tickets = tickets
        self._peers: dict[int, _Peer] = {}
        self._epoll = select.epoll()
        self._epoll.register(supervisor.fileno(), select.EPOLLIN)
        self._retired = False
        self._received = memoryview(bytearray(MESSAGE_SIZE_MAX))  # one for all messages, as in KeyClient

    def run(self) -> None:
        """Serves until the supervisor is gone, or until the last worker has left after `retire`."""
        while not (self._retired and not self._peers):
            timeout = None if self._retired else self._tickets.next_rotation_s(time.time()) + 0.1
            for fd, mask in self._epoll.poll(timeout):
                if fd == self._supervisor.fileno():
                    if not self._supervisor_says():
                        return
                elif peer := self._peers.get(fd):
                    self._serve(peer, mask)
            if not self._retired and self._tickets.rotate(time.time()):
                for peer in list(self._peers.values()):
                    self._reply(peer, self._ticket_key_message())

    def _supervisor_says(self) -> bool:
        try:
            message, fds = self._supervisor.receive()
        except EOFError:
            return False
        if message["type"] == "attach":
            peer = _Peer(socket.socket(fileno=fds[0]))
            peer.socket.setblocking(False)
            self._peers[fds[0]] = peer
            self._epoll.register(fds[0], select.EPOLLIN)
            self._reply(peer, self._ticket_key_message())
        elif message["type"] == "ping":
            self._supervisor.send({"type": "pong"})
        elif message["type"] == "retire":
            self._retired = True  # the successor rotates the ticket keys now
        return True

    def _serve(self, peer: _Peer, mask: int) -> None:
        try:
            if mask & select.EPOLLOUT:
                self._send_replies(peer)
            elif mask & select.EPOLLIN:
                message = self._received[: peer.socket.recv_into(self._received)]
                if not message or message[0] != SIGN or (len(message) - 1) % REQUEST.size:
                    raise ConnectionAbortedError
                self._reply(peer, self._sign(message))
            else:
                raise ConnectionAbortedError
        except BlockingIOError:
            pass
        except OSError:
            self._drop(peer)

    def _sign(self, message: memoryview) -> bytes:
        parts = [bytes((SIGNATURES,))]
        for request_id, scheme, role, length, key_id, padded in REQUEST.iter_unpack(message[1:]):
            signature = b""
            credential = self._credentials.get(key_id)
            if credential is not None and scheme in credential.schemes and length <= len(padded):
                try:
                    signature = signing.sign(credential.private_key, scheme, ROLES[role], padded[:length])
                except (ValueError, KeyError):
                    signature = b""  # a role or hash length that no handshake has
            parts.append(REPLY.pack(request_id, len(signature)))
            parts.append(signature)
        return b"".join(parts)

    def _ticket_key_message(self) -> bytes:
        return bytes((TICKET_KEYS,)) + serialize_ticket_keys(self._tickets.keys)

    def _reply(self, peer: _Peer, message: bytes) -> None:
        peer.replies.append(message)
        try:
            self._send_replies(peer)
        except BlockingIOError:
            pass
        except OSError:
            self._drop(peer)

    def _send_replies(self, peer: _Peer) -> None:
        fd = peer.socket.fileno()
        while peer.replies:
            try:
                peer.socket.send(peer.replies[0], socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._epoll.modify(fd, select.EPOLLOUT)
                raise
            peer.replies.popleft()
        self._epoll.modify(fd, select.EPOLLIN)

    def _drop(self, peer: _Peer) -> None:
        fd = peer.socket.fileno()
        if fd >= 0:
            self._epoll.unregister(fd)
            del self._peers[fd]
            peer.socket.close()


def _load(config: Config) -> list[Credential]:
    credentials = load_all(config.certificate)
    for credential in credentials:
        for warning in credential.warnings:
            get_logger().warning("certificate", problem=warning)
    return credentials


def main(load: Callable[[Config], list[Credential]] = _load) -> int:
    """Entry point of the process; returns its exit status."""
    process.ignore_terminal_signals()
    process.set_name("kdaemon-keymgr")
    process.sacrifice(process.SACRIFICE_KEYMGR)
    process.harden()
    supervisor = Channel.from_fd(3)
    try:
        message, fds = supervisor.receive()
    except EOFError:
        return 0
    try:
        config = from_mapping(message["config"])
        configure_logging(config.log, "keymgr")
        credentials = load(config)
        process.change_user(config.users.keymgr)
    except (ConfigError, CredentialError, LookupError, OSError) as error:
        supervisor.send({"type": "failed", "reason": str(error)})
        return 2
    process.harden()  # once more: a change of user makes a process dumpable as the system says
    process.die_with_parent(message["supervisor"], 9)
    process.lock_memory()
    tickets = TicketKeyStore(fds[0] if fds else None, config.tickets.rotation_s, config.tickets.lifetime_s)
    tickets.rotate(time.time())
    supervisor.send({"type": "ready", "credentials": [entry.describe() for entry in credentials]}, [tickets.fd])
    KeyManager(supervisor, credentials, tickets).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
