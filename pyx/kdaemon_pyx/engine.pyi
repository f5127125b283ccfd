"""Python face of the engine: what the control thread of a worker sees.

Thread-safety: ``run`` belongs to the engine thread. Everything else belongs to one control thread.
Commands are queued and take effect in order; ``flush`` wakes the engine if it sleeps (once per batch).
A connection is named by an ``int`` handle (slot and generation): commands for one that is gone are ignored.
"""

from collections.abc import Mapping
from typing import Final, TypeAlias

from kdaemon_pyx.file_service import FileService
from kdaemon_pyx.service import ServiceObject

# Events, each a tuple that begins with its kind and the connection (or listener) handle.
EVENT_RECORDS: Final[int]         # (kind, conn, listener, data: bytes): complete records, or bytes that cannot be a record
EVENT_END_OF_FILE: Final[int]     # (kind, conn): FIN in the middle of the handshake
EVENT_CONTROL_RECORD: Final[int]  # (kind, conn, content_type: int, data: bytes, keys: ConnectionKeys): not application data, not close_notify
EVENT_INSTALLED: Final[int]       # (kind, conn, backend: "kernel"|"user"|"none", reason: str)
EVENT_CLOSED: Final[int]          # (kind, conn, reason: str, errno: int): the last event of a connection
EVENT_ACCEPT_PAUSED: Final[int]   # (kind, listener, errno): EMFILE and friends; resumes by itself
EVENT_UNLISTENED: Final[int]      # (kind, listener)
EVENT_DRAINED: Final[int]         # (kind, cut: int): no connection is left; cut by the deadline
EVENT_CONNECTED: Final[int]       # (kind, conn, cookie, errno): adopt() or start_tls() is done. conn 0: not, and why; an adopted fd is closed then
EVENT_EXPORTED: Final[int]        # (kind, conn, cookie, fd): the fd is the callee's, nothing else of the connection is left; or a negative errno
EVENT_REKEYED: Final[int]         # (kind, conn, direction: int, errno)
EVENT_KEY_LIMIT: Final[int]       # (kind, conn, keys: ConnectionKeys): few records are left under the tx key; without a KeyUpdate the connection ends

CONNECTION_BYTES: Final[int]      # of the engine's structure per connection; libcrypto's contexts of the user layer come on top

Event: TypeAlias = tuple[object, ...]

# (cipher_suite, tx_secret, rx_secret, resumption_secret): what Python needs to continue a connection it has forgotten
ConnectionKeys: TypeAlias = tuple[int, bytes, bytes, bytes]

class Engine:
    def __init__(
        self,
        *,
        cpu: int = -1,                     # pin the engine thread; -1: do not
        connections_max: int = 65536,
        record_layer: str = "auto",        # "auto" | "require" | "off"
        ktls_suites: frozenset[int] = ...,  # cipher suites the kernel was probed to support (kdaemon/ktls.py)
        ktls_rekey: bool = False,          # kernel >= 6.14, probed
        ktls_record_size: bool = False,    # TLS_TX_MAX_PAYLOAD_LEN: kernel >= 6.19, probed
        deadlines_ms: Mapping[str, int] | None = None,  # handshake, header, body, send, idle, close: what is not named keeps its default
        file_service: FileService | None = None,        # service 0
        services: Mapping[int, ServiceObject] | None = None,  # others by index (the `service` of install())
        buffers_rest_ms: int = 5_000,      # buffers that nobody wanted that long give their pages back to the kernel
    ) -> None: ...
    def run(self) -> None:
        """Runs the loop without the GIL until stop(). Raises OSError if the uring cannot be made."""
    def event_fd(self) -> int:
        """eventfd that becomes readable when events() has something (owner: the engine)."""
    def events(self, maximum: int = ...) -> list[Event]:
        """Takes the queued events, the oldest `maximum` of them at most. event_fd() tells of new ones only: after as many as that
        there may be more."""
    def flush(self) -> None: ...
    def listen(self, listener: int, fd: int, *, service: int = -1, site: int = 0, limited: bool = False) -> None:
        """Multishot accept on fd; `limited`: the file service's limits per address apply; the caller keeps the fd open until EVENT_UNLISTENED. With a service its connections begin
        without TLS, as by install_plain()."""
    def adopt(self, fd: int, cookie: int, *, foreign: bool = False) -> None:
        """A connected socket becomes a connection, in the client role -> EVENT_CONNECTED; the fd is the engine's from here on. Handshake state: what follows
        is send() and receive(), or install_plain(). foreign: somebody outside the daemon may hold the same socket."""
    def install_plain(self, conn: int, *, service: int, site: int) -> None:
        """Handshake state, nothing sent or received yet: the service gets the connection without TLS -> EVENT_INSTALLED."""
    def start_tls(self, conn: int, cookie: int, *, client_role: bool) -> None:
        """A connection without TLS goes back to the handshake state -> EVENT_CONNECTED; its service has let go of it. What was received
        and not read yet comes with the first EVENT_RECORDS. Refused (errno) it stays as it was."""
    def export(self, conn: int, cookie: int) -> None:
        """The fd of an established connection leaves the engine, its keys in the kernel -> EVENT_EXPORTED, always one. Refused while
        data is buffered or queued (EBUSY) and in the user record layer (EOPNOTSUPP); the connection goes on then."""
    def unlisten(self, listener: int) -> None: ...
    def receive(self, conn: int) -> None:
        """Handshake state: receive until at least one complete record is there -> EVENT_RECORDS. A new connection starts so by itself."""
    def send(self, conn: int, data: bytes) -> None:
        """Handshake state: raw bytes to the socket, in order."""
    def install(
        self,
        conn: int,
        *,
        cipher_suite: int,
        tx_key: bytes, tx_iv: bytes, tx_sequence: int, tx_secret: bytes,
        rx_key: bytes, rx_iv: bytes, rx_sequence: int, rx_secret: bytes,
        resumption_secret: bytes = b"",
        leftover: bytes = b"",             # ciphertext received behind the last handshake record: drained in user space before TLS_RX is set
        service: int = 0,
        site: int = 0,                     # index the service understands (which root, which limits)
        record_size_max: int = 16385,      # content of a record sent, with its type byte: the peer's record_size_limit (RFC 8449)
    ) -> None:
        """Validate, commit: the connection belongs to the engine from here on -> EVENT_INSTALLED or EVENT_CLOSED.
        All sends queued before are on the wire first. In "require" mode a connection the kernel cannot take is closed."""
    def rekey(self, conn: int, direction: int, key: bytes, iv: bytes, secret: bytes, key_update: bytes = b"") -> None:
        """direction 0: rx, behind the peer's KeyUpdate; 1: tx, behind `key_update`, our own, with no data between the two (RFC 8446,
        section 4.6.3) -> EVENT_REKEYED. The secret in force is not taken a second time: two reasons for one update make one."""
    def send_control(self, conn: int, content_type: int, data: bytes) -> None:
        """Established state: one record of another type (KeyUpdate, NewSessionTicket, alert), in order with the data."""
    def close(self, conn: int, data: bytes = b"") -> None:
        """Handshake state: send data (an alert record), half-close, linger briefly, close."""
    def abandon(self, conn: int) -> None:
        """Close at once, without a word: whom it was for is gone."""
    def abandon_listener(self, listener: int) -> None:
        """unlisten(), and those of its connections whose handshake is under way are abandoned."""
    def drain(self, deadline_ms: int) -> None:
        """Stop accepting, finish responses, close idle connections -> EVENT_DRAINED."""
    def stop(self) -> None:
        """run() returns after all outstanding operations are joined."""
    def counters(self) -> dict[str, int]:
        """Monotonic counters and gauges: connections, accepted, bytes_in, bytes_out, record_layer_kernel, record_layer_user,
        requests, closed_<reason>, ...; may be read from any thread."""
