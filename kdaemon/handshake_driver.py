"""Drives the sans-I/O handshakes of one worker: records in, records and keys out, signatures from keymgr.

Everything here runs in the control thread, over a batch of events per wake-up; the caller flushes the engine and
the key client at the end of the batch. A handshake that waits is one entry in a table; an established connection is
none at all.
"""

import os
import time
from typing import Any, Protocol

from kdaemon_pyx.engine import Engine

from kdaemon.handoff import ConnectionPolicy
from kdaemon.key_client import KeyClient
from kdaemon.key_protocol import ROLE_CLIENT, ROLE_SERVER
from kdaemon.tls.client import ClientHandshake
from kdaemon.tls.configuration import ServerConfig
from kdaemon.tls.errors import AlertReceived, InternalError, PlainHttpReceived, TlsError
from kdaemon.tls.handshake import Established
from kdaemon.tls.server import ServerHandshake
from kdaemon.tls.signing import Role

_PLAIN_HTTP_BODY = (
    b"<!doctype html><title>400 Bad Request</title><h1>400 Bad Request</h1>"
    b"<p>A plain HTTP request was sent to an HTTPS port: use https://.</p>\n"
)
PLAIN_HTTP_RESPONSE = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/html; charset=utf-8\r\n"
    b"Content-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(_PLAIN_HTTP_BODY), _PLAIN_HTTP_BODY)
)


class Owner(Protocol):
    """Who gets a connection that is not the sites': a libtls client."""

    def install(self, engine: Engine, connection: int, established: Established) -> None:
        """Takes the connection; hands it to the engine or closes it."""

    def failed(self, connection: int, error: TlsError | None) -> None:
        """The handshake failed; None: the connection ended in the middle of it."""


class HandshakeDriver:
    """The handshakes of one worker. Used by the control thread only.

    `configure()` must come before the first event; connections that have begun keep the configuration they began with.
    """

    def __init__(self, engine: Engine, keys: KeyClient, log: Any) -> None:
        self._engine = engine
        self._keys = keys
        self._log = log
        self._config: ServerConfig | None = None
        self._policy = ConnectionPolicy(())
        self._handshakes: dict[int, ServerHandshake | ClientHandshake] = {}
        self._listeners: dict[int, tuple[ServerConfig, Owner]] = {}  # those of libtls clients
        self._owners: dict[int, Owner] = {}  # connection -> owner, during the handshake
        self.full = 0
        self.resumed = 0
        self.failed = 0
        self.reasons: dict[str, int] = {}  # why handshakes failed, by the name of the fact

    @property
    def under_way(self) -> int:
        """Handshakes that have begun and not ended."""
        return len(self._handshakes)

    def configure(self, config: ServerConfig, policy: ConnectionPolicy) -> None:
        """New connections begin with this."""
        self._config = config
        self._policy = policy

    def configure_listener(self, listener: int, config: ServerConfig, owner: Owner) -> None:
        """New connections of this listener begin with `config` and belong to `owner`."""
        self._listeners[listener] = (config, owner)

    def forget_listener(self, listener: int) -> None:
        """The caller has the engine abandon the connections under way."""
        self._listeners.pop(listener, None)

    def begin(self, connection: int, handshake: ServerHandshake | ClientHandshake, owner: Owner) -> None:
        """A connection that is not a listener's: a client's ClientHello goes out, a server waits for one."""
        self._handshakes[connection] = handshake
        self._owners[connection] = owner
        self._advance(connection, handshake)

    def abandon(self, connection: int) -> None:
        """Ends a handshake whose owner does not want it any more; the owner is not told."""
        self._owners.pop(connection, None)
        if self._handshakes.pop(connection, None) is not None:
            self._engine.abandon(connection)

    def records(self, connection: int, data: bytes, listener: int = -1) -> None:
        """Bytes from a connection that is not established yet."""
        handshake = self._handshakes.get(connection)
        if handshake is None:
            config = self._config
            if special := self._listeners.get(listener):
                config, self._owners[connection] = special
            assert config is not None
            handshake = ServerHandshake(config, random=os.urandom, now_s=time.time())
            self._handshakes[connection] = handshake
        try:
            handshake.receive(data)
        except TlsError as error:
            self._fail(connection, handshake, error)
        else:
            self._advance(connection, handshake)

    def signature(self, connection: int, signature: bytes) -> None:
        """keymgr's answer; empty if there is none to be had."""
        handshake = self._handshakes.get(connection)
        if handshake is None:
            return  # the connection ended meanwhile
        try:
            if not signature:
                fault = InternalError("keymgr gave no signature")
                handshake.cancel(fault)
                raise fault
            handshake.signature_ready(signature)
        except TlsError as error:
            self._fail(connection, handshake, error)
        else:
            self._advance(connection, handshake)

    def end_of_file(self, connection: int) -> None:
        """The peer sent FIN in the middle of its handshake."""
        self._count_failure("EndOfFile" if connection in self._handshakes else "NothingSent")
        self._handshakes.pop(connection, None)
        if owner := self._owners.pop(connection, None):
            owner.failed(connection, None)
        self._engine.close(connection)

    def closed(self, connection: int, reason: str) -> None:
        """The connection is gone: a handshake that was under way has failed."""
        if self._handshakes.pop(connection, None) is not None:
            self._count_failure(f"Closed_{reason}")
            if owner := self._owners.pop(connection, None):
                owner.failed(connection, None)

    def _advance(self, connection: int, handshake: ServerHandshake | ClientHandshake) -> None:
        engine = self._engine
        if data := handshake.data_to_send():
            engine.send(connection, data)
        if handshake.complete:
            del self._handshakes[connection]
            established = handshake.established
            if established.resumed:
                self.resumed += 1
            else:
                self.full += 1
            (self._owners.pop(connection, None) or self._policy).install(engine, connection, established)
        elif request := handshake.sign_request:
            role = ROLE_CLIENT if request.role is Role.CLIENT else ROLE_SERVER
            key_id = bytes.fromhex(request.key_id)
            self._keys.request(connection, key_id, request.scheme, role, request.transcript_hash)
        else:
            engine.receive(connection)

    def _fail(self, connection: int, handshake: ServerHandshake | ClientHandshake, error: TlsError) -> None:
        del self._handshakes[connection]
        self._count_failure(type(error).__name__)
        if owner := self._owners.pop(connection, None):
            owner.failed(connection, error)
        if isinstance(error, PlainHttpReceived):
            self._engine.close(connection, PLAIN_HTTP_RESPONSE)
            return
        if isinstance(error, InternalError):
            self._log.error("handshake failed", reason=str(error), exc_info=error.__cause__)
        else:
            self._log.debug("handshake failed", reason=str(error), alert_received=isinstance(error, AlertReceived))
        self._engine.close(connection, handshake.data_to_send())

    def _count_failure(self, reason: str) -> None:
        self.failed += 1
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
