"""What libtls clients ask of the control thread: all that makes, changes or hands out a connection. No bytes pass here.

Every operation is answered exactly once: by `Clients.complete`, or, when it establishes a connection, by the engine,
which is given the operation's token at installation.
"""

import errno
import ipaddress
import os
import socket
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

from cryptography.utils import CryptographyDeprecationWarning
from kdaemon_pyx import client_abi as abi
from kdaemon_pyx.client_admission import Clients
from kdaemon_pyx.client_connection import SERVICE_CLIENTS
from kdaemon_pyx.engine import Engine

from kdaemon.attach_connect import Connector
from kdaemon.attach_descriptors import Descriptors, close_elsewhere
from kdaemon.attach_facts import TLS_1_3, describe, fact
from kdaemon.client_sessions import ClientSessions, Scope, Session
from kdaemon.config import Clients as ClientsConfig
from kdaemon.credential_store import CredentialStore
from kdaemon.handoff import hand_over
from kdaemon.handshake_driver import HandshakeDriver
from kdaemon.tls.certificates import TrustStore
from kdaemon.tls.client import ClientHandshake
from kdaemon.tls.configuration import ClientConfig, ServerConfig
from kdaemon.tls.errors import TlsError
from kdaemon.tls.handshake import Established
from kdaemon.tls.server import ServerHandshake

_LISTENERS_FIRST = 1 << 16  # numbers below are the supervisor's listeners
_TRUST_CACHE_MAX = 64


@dataclass(slots=True, eq=False)
class Operation:
    """One operation of a client that is under way here."""

    client: int
    opcode: int
    slot: int
    sequence: int
    token: int
    handle: int
    user_data: int
    deadline: float  # time.monotonic(), 0: none
    parameters: dict[str, Any]
    data: bytes
    connection: int = 0  # the engine's, once there is one
    handshake: ClientHandshake | ServerHandshake | None = None  # START_TLS: waits for the connection to be let go of
    chain: Sequence[bytes] = ()  # what the server presented
    scope: Scope | None = None  # as the client: what may be remembered of the server, for whom
    session: Session | None = None  # that is offered

    @property
    def key(self) -> tuple[int, int, int]:
        return self.client, self.slot, self.sequence

    @property
    def role(self) -> str | None:
        """What it makes of the daemon. None: an adopted socket may become either, by START_TLS."""
        if self.opcode in (abi.ADOPT, abi.EXPORT):
            return None
        server = self.opcode == abi.LISTEN or self.parameters["flags"] & abi.PARAMETER_SERVER
        return "server" if server else "client"

    def text(self, name: str) -> str:
        """A parameter as text. Raises UnicodeDecodeError (a ValueError)."""
        return bytes(self.parameters[name]).decode()

    def alpn(self) -> tuple[bytes, ...]:
        """The protocols; the engine has checked the encoding."""
        data, result = bytes(self.parameters["alpn"]), []
        while data:
            result.append(data[1 : 1 + data[0]])
            data = data[1 + data[0] :]
        return tuple(result)

    def timeout_s(self) -> float:
        """What is left of the deadline; 0: there is none."""
        return max(0.001, self.deadline - time.monotonic()) if self.deadline else 0.0


@dataclass(slots=True, eq=False)
class Listening:
    """A LISTEN that succeeded. Owner of its handshakes. Owns the socket until EVENT_UNLISTENED."""

    operations: "ClientOperations"
    number: int
    operation: Operation
    sock: socket.socket
    plain: bool

    def install(self, engine: Engine, connection: int, established: Established) -> None:
        token = self.operations.clients.accepted(self.operation.token, self.operations.describe(established))
        if not token:
            engine.close(connection)
            return
        self.operations.installing[connection] = token
        hand_over(engine, connection, established, SERVICE_CLIENTS, token)

    def failed(self, connection: int, error: TlsError | None) -> None:
        """The program accepts what is established; what failed is counted by the driver."""


@dataclass(slots=True, eq=False)
class Connecting:
    """A START_TLS or OPEN in its handshake. Owner of that."""

    operations: "ClientOperations"
    operation: Operation

    def install(self, engine: Engine, connection: int, established: Established) -> None:
        operation = self.operation
        if operation.role != "server":
            self.operations.sessions.established(
                connection, established, operation.scope, operation.session, time.time()
            )
        self.operations.clients.describe(operation.token, self.operations.describe(established))
        self.operations.opening[connection] = operation
        hand_over(engine, connection, established, SERVICE_CLIENTS, operation.token)

    def failed(self, connection: int, error: TlsError | None) -> None:
        number, detail = fact(error, self.operation.chain)
        self.operations.answer(self.operation, -number, detail)


@dataclass(slots=True)
class Settings:
    """What the worker's configuration says; replaced as a whole at a reload."""

    clients: ClientsConfig = field(default_factory=ClientsConfig)
    server: ServerConfig | None = None
    credentials: CredentialStore = field(default_factory=lambda: CredentialStore(()))
    cipher_suites: tuple[int, ...] = ()
    record_size_limit: int | None = None
    user_layer_reason: str = ""  # why the engine is told not to ask the kernel; empty: it decides
    key_log: Callable[[str], None] | None = None


class ClientOperations:
    """The operations of one worker's clients. Used by the control thread only."""

    def __init__(
        self, engine: Engine, clients: Clients, driver: HandshakeDriver, connector: Connector, log: Any
    ) -> None:
        self.clients = clients
        self.installing: dict[int, int] = {}  # engine connection -> token of an accepted one, until it is installed
        self.opening: dict[int, Operation] = {}  # engine connection -> operation, until it is installed
        self.users: dict[int, int] = {}  # client -> its user
        self.sessions = ClientSessions()
        self._engine = engine
        self._driver = driver
        self._connector = connector
        self._log = log
        self._settings = Settings()
        self._pending: dict[tuple[int, int, int], Operation] = {}
        self.descriptors = Descriptors()
        self._listening: dict[int, Listening] = {}
        self._asked: dict[int, Operation] = {}  # cookie of Engine.adopt, start_tls and export -> operation
        self._next_cookie = 0
        self._next_listener = _LISTENERS_FIRST
        self._trust: dict[bytes, tuple[TrustStore, bytes]] = {}  # by PEM; with its SHA-256

    def configure(self, settings: Settings) -> None:
        """New connections begin with this, those of listeners that exist included."""
        self._settings = settings
        self.sessions.configure(settings.clients.sessions_max)
        for number, listening in self._listening.items():
            if not listening.plain:
                self._driver.configure_listener(number, self._server_config(listening.operation), listening)

    def describe(self, established: Established) -> bytes:
        return describe(established, self._settings.user_layer_reason)

    # Called for the clients' events

    def operation(self, event: Any) -> None:
        """Begins an operation; it will be answered once."""
        _, client, opcode, slot, sequence, token, handle, user_data, timeout_ns, parameters, data, connection = event
        deadline = time.monotonic() + timeout_ns / 1e9 if timeout_ns else 0.0
        operation = Operation(client, opcode, slot, sequence, token, handle, user_data, deadline, parameters, data)
        self._pending[operation.key] = operation
        role = operation.role
        try:
            if role is not None and role not in self._settings.clients.roles:
                raise OSError(errno.EACCES, f"the daemon is not configured for the {role} role")
            if opcode in (abi.LISTEN, abi.OPEN, abi.START_TLS):
                self._check_certificate(operation)
            if opcode == abi.LISTEN:
                self._listen(operation)
            elif opcode in (abi.OPEN, abi.CONNECT):
                self._connector.connect(
                    operation.key,
                    operation.text("host"),
                    operation.parameters["port"],
                    operation.timeout_s(),
                    lambda sock, error: self._connected(operation, sock, error),
                )
            elif opcode == abi.START_TLS:
                operation.handshake = self._handshake(operation)
                self._engine.start_tls(connection, self._ask(operation), client_role=role == "client")
            elif opcode == abi.ADOPT:
                self._adopt(operation)
            else:
                self.descriptors.begin_export(client)
                self._engine.export(connection, self._ask(operation))
        except OSError as error:
            self.answer(operation, -(error.errno or errno.EIO))
        except (ValueError, KeyError):
            self.answer(operation, -errno.EINVAL)

    def cancel(self, event: Any) -> None:
        """The client, or its deadline, ends an operation that is under way here."""
        _, client, slot, sequence, _token, number = event
        operation = self._pending.get((client, slot, sequence))
        if operation is None or operation.opcode == abi.EXPORT:
            return  # answered meanwhile: that answer stands; or about to be, and there is no way back
        self._abandon(operation)
        self.answer(operation, -number)

    def listener_closed(self, token: int) -> None:
        for number, listening in list(self._listening.items()):
            if listening.operation.token == token:
                self._unlisten(number)

    def descriptor(self, client: int, message: bytes, fds: Sequence[int]) -> None:
        """A socket for ADOPT, which may be here already or still come. Raises BrokenProtocolError."""
        user_data = self.descriptors.arrived(client, message, fds)
        for operation in list(self._pending.values()):
            if operation.client == client and operation.opcode == abi.ADOPT and operation.user_data == user_data:
                self._adopt(operation)
                return

    def forget(self, client: int) -> None:
        """A client is gone: nothing of it stays here, but what its user's programs may remember of servers."""
        self.users.pop(client, None)
        for operation in [entry for entry in self._pending.values() if entry.client == client]:
            self._abandon(operation)
            del self._pending[operation.key]
        for number, listening in list(self._listening.items()):
            if listening.operation.client == client:
                self._unlisten(number)

    # Called for the engine's events

    def connected(self, connection: int, cookie: int, error: int) -> None:
        """EVENT_CONNECTED: the engine has the socket of an operation, or let go of the connection that starts TLS."""
        operation = self._asked.pop(cookie)
        if operation.key not in self._pending:
            if connection:
                self._engine.abandon(connection)  # cancelled meanwhile
            return
        if not connection:
            self.answer(operation, -error)
            return
        operation.connection = connection
        if operation.opcode in (abi.CONNECT, abi.ADOPT):
            self.opening[connection] = operation
            self._engine.install_plain(connection, service=SERVICE_CLIENTS, site=operation.token)
            return
        try:
            handshake = operation.handshake or self._handshake(operation)
        except ValueError:
            self._engine.close(connection)
            self.answer(operation, -errno.EINVAL)
            return
        operation.handshake = None
        self._driver.begin(connection, handshake, Connecting(self, operation))

    def exported(self, connection: int, cookie: int, fd: int) -> None:
        """EVENT_EXPORTED: the socket, which is nobody's but ours just now, or why not."""
        operation = self._asked.pop(cookie)
        self.descriptors.end_export(operation.client)
        if fd < 0:
            self.answer(operation, fd)
            return
        self.sessions.closed(connection)
        result = 0
        try:
            self.descriptors.send(operation.client, operation.user_data, fd)
        except OSError as error:
            result = -(error.errno or errno.EIO)
        close_elsewhere([fd])
        self.answer(operation, result)

    def installed(self, connection: int) -> None:
        """EVENT_INSTALLED: the client service has it."""
        self.installing.pop(connection, None)
        if operation := self.opening.pop(connection, None):
            self._pending.pop(operation.key, None)

    def closed(self, connection: int) -> None:
        """EVENT_CLOSED: a connection that was never installed is answered for here."""
        self.sessions.closed(connection)
        if token := self.installing.pop(connection, 0):
            self.clients.forget(token)
        if operation := self.opening.pop(connection, None):
            self.answer(operation, -errno.EOPNOTSUPP)

    def unlistened(self, number: int) -> bool:
        """EVENT_UNLISTENED: whether it was one of these."""
        listening = self._listening.pop(number, None)
        if listening is not None:
            listening.sock.close()
        return listening is not None

    def answer(self, operation: Operation, result: int, detail: int = 0, info: bytes = b"") -> None:
        """Completes an operation; it is forgotten here."""
        if self._pending.pop(operation.key, None) is not None:
            self.clients.complete(operation.client, operation.slot, operation.sequence, result, detail, info)

    # Server role

    def _listen(self, operation: Operation) -> None:
        address = ipaddress.ip_address(operation.text("host") or "127.0.0.1")
        plain = bool(operation.parameters["flags"] & abi.PARAMETER_PLAIN)
        if plain and (operation.parameters["certificate"] or operation.parameters["alpn"]):
            raise ValueError("what concerns TLS comes with START_TLS")
        family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((str(address), operation.parameters["port"]))
            sock.listen(operation.parameters["backlog"] or 128)
        except OSError:
            sock.close()
            raise
        number, self._next_listener = self._next_listener, self._next_listener + 1
        listening = self._listening[number] = Listening(self, number, operation, sock, plain)
        if plain:
            self._engine.listen(number, sock.fileno(), service=SERVICE_CLIENTS, site=operation.token)
        else:
            self._driver.configure_listener(number, self._server_config(operation), listening)
            self._engine.listen(number, sock.fileno())
        info = abi.pack_info(
            tls_version=0 if plain else TLS_1_3,
            cipher_suite=0,
            named_group=0,
            record_layer=0,
            resumed=False,
            port=sock.getsockname()[1],
            alpn=b"",
            reason="",
            server_name=operation.text("certificate"),
            certificate=b"",
        )
        self.answer(operation, 0, info=info)

    def _check_certificate(self, operation: Operation) -> None:
        """Raises OSError: no certificate of that name is configured."""
        certificate = operation.text("certificate")
        if certificate and not self._settings.credentials.knows(certificate):
            raise OSError(errno.ENOENT, f"no certificate for {certificate!r} is configured")

    def _server_config(self, operation: Operation) -> ServerConfig:
        """Of LISTEN and START_TLS; what it names has been checked, and may be gone since."""
        certificate = operation.text("certificate")
        credentials = self._settings.credentials
        assert self._settings.server is not None
        return replace(
            self._settings.server,
            credentials=lambda name, schemes: credentials.select(certificate or name, schemes),
            alpn=operation.alpn(),
            ticket_keys=None,
            client_auth=lambda _name: None,  # that is the sites' policy
        )

    def _unlisten(self, number: int) -> None:
        self._driver.forget_listener(number)
        self._engine.abandon_listener(number)

    # Client role

    def _connected(self, operation: Operation, sock: socket.socket | None, error: OSError | None) -> None:
        if sock is None:
            assert error is not None
            if isinstance(error, socket.gaierror):
                self.answer(operation, -errno.EHOSTUNREACH, abi.DETAIL_NAME_RESOLUTION)
            else:
                self.answer(operation, -(error.errno or errno.EIO))
        else:
            self._engine.adopt(sock.detach(), self._ask(operation))

    def _ask(self, operation: Operation) -> int:
        """A cookie, by which the engine's event names the operation."""
        self._next_cookie += 1
        self._asked[self._next_cookie] = operation
        return self._next_cookie

    def _adopt(self, operation: Operation) -> None:
        """Becomes a connection without TLS as soon as its socket is here."""
        try:
            sock = self.descriptors.claim(operation.client, operation.user_data)
        except OSError as error:
            self.answer(operation, -(error.errno or errno.EIO))
            return
        if sock is not None:
            self._engine.adopt(sock.detach(), self._ask(operation), foreign=True)

    def _handshake(self, operation: Operation) -> ClientHandshake | ServerHandshake:
        """Raises ValueError."""
        if operation.role == "server":
            if operation.data or operation.text("server_name"):
                raise ValueError("trust anchors and the server's name are the client's")
            return ServerHandshake(self._server_config(operation), random=os.urandom, now_s=time.time())
        name = operation.text("server_name") or operation.text("host")
        config = self._client_config(operation, name)
        now_s = time.time()
        operation.session = self.sessions.take(operation.scope, now_s)
        return ClientHandshake(
            config,
            name,
            random=os.urandom,
            now_s=now_s,
            session=operation.session.ticket if operation.session else None,
            group=self.sessions.group(operation.scope),
        )

    def _client_config(self, operation: Operation, name: str) -> ClientConfig:
        """Also says what may be remembered of the server. Raises ValueError."""
        certificate, alpn, credentials = operation.text("certificate"), operation.alpn(), self._settings.credentials
        verify: Callable[[Sequence[bytes], str, float], None] | None = None
        trusted: bytes | None = None
        if not operation.parameters["flags"] & abi.PARAMETER_INSECURE:
            trust, trusted = self._trust_store(operation.data)

            def verify(chain: Sequence[bytes], name: str, now_s: float) -> None:
                operation.chain = chain
                trust.verify_server(chain, name, now_s)

        if name:
            where = operation.text("host"), operation.parameters["port"]
            presented = credentials.presented(certificate)
            operation.scope = Scope(self.users[operation.client], name, *where, alpn, trusted, presented)
        return ClientConfig(
            verify=verify,
            credential=credentials.for_client(certificate),
            cipher_suites=self._settings.cipher_suites,
            alpn=alpn,
            record_size_limit=self._settings.record_size_limit,
            key_log=self._settings.key_log,
        )

    def _trust_store(self, pem: bytes) -> tuple[TrustStore, bytes]:
        """The program's trust anchors, or the system's, and their digest (Scope.trusted). Raises ValueError."""
        entry = self._trust.get(pem)
        if entry is None:
            if len(self._trust) >= _TRUST_CACHE_MAX:
                self._trust.clear()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CryptographyDeprecationWarning)
                store = TrustStore.from_pem(pem) if pem else TrustStore.system()
            entry = self._trust[pem] = store, sha256(pem).digest() if pem else b""
        return entry

    def _abandon(self, operation: Operation) -> None:
        """Stops what is under way for it; nothing of it comes back."""
        if operation.opcode in (abi.OPEN, abi.CONNECT) and not operation.connection:
            self._connector.cancel(operation.key)
        if operation.connection:
            self._driver.abandon(operation.connection)
            self.opening.pop(operation.connection, None)
