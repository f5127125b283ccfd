"""`kdaemon connect`: standard input and output over a TLS connection, like netcat.

The end of standard input closes our direction with close_notify; the end of the program is the peer's close_notify.
A peer that ends without one has truncated the stream, which is a failure.
"""

import contextlib
import hashlib
import os
import select
import socket
import sys
import time
import warnings
from pathlib import Path

from cryptography.utils import CryptographyDeprecationWarning

from kdaemon import credentials, ktls
from kdaemon.config import Certificate
from kdaemon.observe import KeyLogFile
from kdaemon.session_file import SessionFile
from kdaemon.socket_records import KernelRecords, SocketRecords, UserRecords
from kdaemon.tls.certificates import TrustStore
from kdaemon.tls.client import ClientHandshake
from kdaemon.tls.configuration import DEFAULT_CIPHER_SUITES, ClientConfig, Credential
from kdaemon.tls.constants import RECORD_SIZE_LIMIT_MAX, ContentType
from kdaemon.tls.errors import CloseNotifyReceived, TlsError, TlsFault
from kdaemon.tls.handshake import CLOSE_NOTIFY, Established
from kdaemon.tls.post_handshake import ConnectionSecrets, ControlState, handle_control_record, start_key_update
from kdaemon.tls.session import SessionTicket
from kdaemon.tls.signing import Role, sign

HANDSHAKE_DEADLINE_S = 10.0
_CHUNK_SIZE = 65536


class ConnectError(Exception):
    """The connection failed; one line."""


def main(
    host: str,
    port: int,
    *,
    cafile: str | None = None,
    servername: str | None = None,
    certificate: tuple[str, str] | None = None,
    alpn: tuple[str, ...] = (),
    insecure: bool = False,
    policy: str = "auto",
    keylog: str = "",
    session: str = "",
) -> int:
    """Runs the command; returns its exit status: 0, or 1 with the failure named on standard error.

    `certificate`: files with our own chain and its key, for servers that ask. `session`: the file with tickets.
    """
    try:
        support = ktls.probe() if policy != "off" else None
        if policy == "require" and not (support and support.available):
            raise ConnectError(f"ktls is required and cannot be used: {support.detail if support else ''}")
        suites: tuple[int, ...] = DEFAULT_CIPHER_SUITES
        record_size_limit: int | None = RECORD_SIZE_LIMIT_MAX
        if policy == "require" and support:
            suites = tuple(suite for suite in suites if suite in support.suites)
            if not support.tx_max_payload:
                record_size_limit = None  # this kernel makes no smaller records
        own = credentials.load(Certificate(chain=certificate[0], key=certificate[1])) if certificate else None
        credential = Credential(own.key_id, own.chain_der, own.schemes) if own else None
        config = ClientConfig(
            verify=None if insecure else _trust(cafile).verify_server,
            cipher_suites=suites,
            alpn=tuple(protocol.encode() for protocol in alpn),
            credential=lambda _request: credential,
            record_size_limit=record_size_limit,
            key_log=KeyLogFile(keylog) if keylog else None,
        )
        name = servername or host
        trust = "nobody" if insecure else _digest(cafile) if cafile else "the system"
        scope = f"{name} at {host}:{port}, believed by {trust}, shown {own.key_id if own else 'nothing'}"
        sessions = _session_file(session, scope) if session else None
        with _connect(host, port) as sock:
            established = _handshake(sock, config, name, own, sessions)
            if sessions and established.retried:
                sessions.prefer(established.group)
            in_kernel = (
                support is not None
                and established.cipher_suite in support.suites
                and (support.tx_max_payload or established.record_size_max == RECORD_SIZE_LIMIT_MAX)
            )
            records: SocketRecords = (KernelRecords if in_kernel else UserRecords)(sock, established)
            sock.setblocking(False)
            _relay(sock, records, established, sessions)
    except (ConnectError, credentials.CredentialError, TlsError) as error:
        print(f"kdaemon: {host}:{port}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"kdaemon: {host}:{port}: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


def _trust(cafile: str | None) -> TrustStore:
    # System stores keep old roots with odd serial numbers; whether they may be used is the store's to say
    warnings.simplefilter("ignore", CryptographyDeprecationWarning)
    try:
        return TrustStore.from_pem(Path(cafile).read_bytes()) if cafile else TrustStore.system()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConnectError(f"no trusted certificates{f' in {cafile}' if cafile else ''}: {reason}") from None


def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _session_file(path: str, scope: str) -> SessionFile:
    try:
        return SessionFile(path, scope)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConnectError(f"no session file at {path}: {reason}") from None


def _connect(host: str, port: int) -> socket.socket:
    try:
        return socket.create_connection((host, port), HANDSHAKE_DEADLINE_S)
    except TimeoutError:
        raise ConnectError(f"no connection within {HANDSHAKE_DEADLINE_S:.0f} s") from None
    except socket.gaierror as error:
        raise ConnectError(f"the name cannot be resolved: {error.strerror}") from None
    except UnicodeError:  # from the encoding "idna": a label that is empty or over 63 characters
        raise ConnectError("the name cannot be resolved: it is no host name") from None


def _handshake(
    sock: socket.socket,
    config: ClientConfig,
    server_name: str,
    own: credentials.Credential | None,
    sessions: SessionFile | None,
) -> Established:
    """Record by record, so that not one byte behind the last handshake record is read: the kernel may want it."""
    now_s = time.time()
    handshake = ClientHandshake(
        config,
        server_name,
        random=os.urandom,
        now_s=now_s,
        session=sessions.take(now_s) if sessions else None,
        group=sessions.group if sessions else None,
    )
    deadline = time.monotonic() + HANDSHAKE_DEADLINE_S
    try:
        while True:
            if own and (request := handshake.sign_request):
                handshake.signature_ready(sign(own.private_key, request.scheme, request.role, request.transcript_hash))
            sock.sendall(handshake.data_to_send())
            if handshake.complete:
                return handshake.established
            header = _receive_exactly(sock, 5, deadline)
            handshake.receive(header)  # judged before its body is waited for
            handshake.receive(_receive_exactly(sock, int.from_bytes(header[3:], "big"), deadline))
    except TlsError:
        with contextlib.suppress(OSError):  # who breaks the protocol may be gone; what it did is the news
            sock.sendall(handshake.data_to_send())
        raise
    except TimeoutError:
        raise ConnectError(f"the peer did not finish the handshake within {HANDSHAKE_DEADLINE_S:.0f} s") from None


def _receive_exactly(sock: socket.socket, size: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < size:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        sock.settimeout(remaining)
        received = sock.recv(size - len(data))
        if not received:
            raise ConnectError("the peer closed the connection in the middle of the handshake")
        data += received
    return bytes(data)


def _relay(sock: socket.socket, records: SocketRecords, established: Established, sessions: SessionFile | None) -> None:
    """Until the peer's close_notify. Raises ConnectError on truncation, TlsError on breaches of protocol and alerts."""
    poller = select.poll()
    state = ControlState()
    pending = memoryview(b"")
    stdin_open = True
    flushed = True
    while True:
        try:
            while True:
                received = records.receive()
                if received is None:
                    raise ConnectError("truncated: the peer ended the connection without close_notify")
                content_type, content = received
                if content_type == ContentType.APPLICATION_DATA and content and not state.fragment:
                    _write_all(content)
                elif content_type == ContentType.APPLICATION_DATA and not state.fragment:
                    state.spend(time.time())  # legal, and nothing: so many of them are a flood
                else:
                    tickets = _control(records, established, content_type, content, state)
                    if sessions and tickets:
                        sessions.keep(tickets)
        except BlockingIOError:
            pass
        except TlsFault as fault:
            _tell(records, bytes((2, fault.alert)))
            raise
        except CloseNotifyReceived:
            if stdin_open:
                _tell(records, CLOSE_NOTIFY)
            return
        try:
            while pending and flushed:
                _update_before_limit(records, established)
                pending = pending[records.send(ContentType.APPLICATION_DATA, bytes(pending)) :]
                flushed = records.flush()
            flushed = records.flush()
        except BlockingIOError:
            flushed = False
        wants_input = stdin_open and flushed and not pending
        poller.register(sock, select.POLLIN | (0 if flushed and not pending else select.POLLOUT))
        if wants_input:
            poller.register(0, select.POLLIN)
        ready = dict(poller.poll())
        if wants_input:
            poller.unregister(0)
        if 0 in ready and wants_input:
            data = os.read(0, _CHUNK_SIZE)
            if data:
                pending = memoryview(data)
            else:
                stdin_open = False
                _tell(records, CLOSE_NOTIFY)
        if sock.fileno() in ready:
            flushed = flushed or records.flush()


def _secrets(records: SocketRecords, established: Established) -> ConnectionSecrets:
    return ConnectionSecrets(
        established.cipher_suite, records.tx_secret, records.rx_secret, established.resumption_secret
    )


def _update_before_limit(records: SocketRecords, established: Established) -> None:
    """A KeyUpdate before the AEAD's limit (RFC 9846, section 5.5): it is the last record under the old key."""
    if records.tx_records < established.suite.record_count_max - 1:
        return
    reaction = start_key_update(_secrets(records, established))
    assert reaction.tx is not None
    records.send(ContentType.HANDSHAKE, reaction.messages)
    try:
        records.rekey_tx(reaction.tx)
    except OSError as error:
        raise ConnectError(
            f"{records.tx_records} records are all that one key may protect, and this kernel takes no other"
            f" ({error.strerror})"
        ) from None


def _control(
    records: SocketRecords, established: Established, content_type: int, content: bytes, state: ControlState
) -> tuple[SessionTicket, ...]:
    """Follows what the record says; the tickets in it."""
    secrets = _secrets(records, established)
    reaction = handle_control_record(Role.CLIENT, content_type, content, secrets, state=state, now_s=time.time())
    if reaction.error is not None:
        raise reaction.error
    if reaction.rx is not None:
        try:
            records.rekey_rx(reaction.rx)
        except OSError as error:
            raise ConnectError(
                f"the peer updated its keys, which this kernel cannot follow ({error.strerror})"
            ) from None
    if reaction.messages:
        records.send(ContentType.HANDSHAKE, reaction.messages)
    if reaction.tx is not None:
        records.rekey_tx(reaction.tx)
    return reaction.tickets


def _tell(records: SocketRecords, alert: bytes) -> None:
    try:
        records.send(ContentType.ALERT, alert)
    except OSError:
        pass  # the peer is gone or takes nothing any more; what it sent before still counts


def _write_all(data: bytes) -> None:
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(1, view) :]
    except BrokenPipeError:
        raise ConnectError("standard output was closed") from None
