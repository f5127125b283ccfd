"""The hand-over of an established connection to the engine, and the policy that goes with it.

Which record layer: `auto` takes the kernel's where the kernel was probed to support the negotiated suite, `require`
negotiates only such suites and lets no connection go another way, `off` never asks the kernel. The engine validates
and commits; this module says what it is given. Which service and site: by ALPN and by server name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kdaemon_pyx.engine import Engine
from kdaemon_pyx.http_config import SITE_BY_HOST

from kdaemon.config import Config, RecordLayerPolicy
from kdaemon.key_protocol import TicketKey
from kdaemon.ktls import REASON_SWITCHED_OFF
from kdaemon.site_settings import Site
from kdaemon.tls import tickets
from kdaemon.tls.configuration import DEFAULT_CIPHER_SUITES, ClientAuthentication, Credential, ServerConfig
from kdaemon.tls.constants import RECORD_SIZE_LIMIT_MAX
from kdaemon.tls.handshake import Established
from kdaemon.tls.signing import PeerSchemes

SERVICE_FILES = 0
# By ALPN protocol; None: the client offered none. A client that means HTTP/1.0 may say so in ALPN, too.
SERVICES = {b"http/1.1": SERVICE_FILES, b"http/1.0": SERVICE_FILES, None: SERVICE_FILES}


@dataclass(frozen=True, slots=True)
class KtlsFacts:
    """What the supervisor's probe found, as far as workers need it (kdaemon/ktls.py has the whole)."""

    available: bool
    reason: str
    suites: frozenset[int]
    rekey: bool
    record_size: bool


class ConnectionPolicy:
    """Decides where an established connection goes. Immutable; a reload makes another."""

    def __init__(
        self, sites: Sequence[Site], first: int = 0, asking: Mapping[int, ClientAuthentication] | None = None
    ) -> None:
        self._asking = {first + index: rule for index, rule in (asking or {}).items()}
        self._site_by_name = {
            name.lower().rstrip("."): first + index for index, site in enumerate(sites) for name in site.names
        }
        self._site_default = first + next((index for index, site in enumerate(sites) if not site.names), 0)

    def site(self, server_name: str | None) -> int:
        """The file service's number of the site for `server_name`: exact, then `*.`; without a name, as Host says."""
        if not server_name:
            # Host is read when it is too late to ask for a certificate: where a site does, it chooses nothing.
            return self._site_default | (0 if self._asking else SITE_BY_HOST)
        name = server_name.lower()
        for candidate in (name, "*." + name.partition(".")[2]):
            if (index := self._site_by_name.get(candidate)) is not None:
                return index
        return self._site_default

    def client_auth(self, server_name: str | None) -> ClientAuthentication | None:
        """Whether a client that wants this name is asked for its certificate."""
        return self._asking.get(self.site(server_name)) if self._asking else None

    def install(self, engine: Engine, connection: int, established: Established) -> None:
        """Gives the connection to the engine; the caller drops the handshake, and every secret with it, right after."""
        hand_over(engine, connection, established, SERVICES[established.alpn], self.site(established.server_name))


def hand_over(engine: Engine, connection: int, established: Established, service: int, site: int) -> None:
    """Installs the keys of a complete handshake, for a service of the engine and what that service calls site."""
    tx, rx = established.tx, established.rx
    engine.install(
        connection,
        cipher_suite=established.cipher_suite,
        tx_key=tx.key,
        tx_iv=tx.iv,
        tx_sequence=tx.sequence,
        tx_secret=tx.secret,
        rx_key=rx.key,
        rx_iv=rx.iv,
        rx_sequence=rx.sequence,
        rx_secret=rx.secret,
        resumption_secret=established.resumption_secret,
        leftover=established.leftover,
        record_size_max=established.record_size_max,
        service=service,
        site=site,
    )


def engine_record_layer(config: Config, ktls: KtlsFacts) -> RecordLayerPolicy:
    """The engine's `record_layer`: without kTLS `auto` is `off`, which spares each connection the attempt."""
    if config.ktls == "auto" and not ktls.available:
        return "off"
    return config.ktls


def user_layer_reason(config: Config, ktls: KtlsFacts) -> str:
    """Why the engine is told not to ask the kernel; empty: it decides by itself, for each connection, and says why."""
    if config.ktls == "off":
        return REASON_SWITCHED_OFF
    return ktls.reason if config.ktls == "auto" and not ktls.available else ""


def server_config(
    config: Config,
    ktls: KtlsFacts,
    credentials: Callable[[str | None, PeerSchemes], Credential | None],
    ticket_keys: Sequence[TicketKey],
    key_log: Callable[[str], None] | None,
    *,
    client_auth: Callable[[str | None], ClientAuthentication | None],
) -> ServerConfig:
    """What the handshakes of a worker negotiate: with `require` only the suites that the kernel takes."""
    suites: tuple[int, ...] = DEFAULT_CIPHER_SUITES
    record_size_limit: int | None = RECORD_SIZE_LIMIT_MAX
    if config.ktls == "require":
        suites = tuple(suite for suite in suites if suite in ktls.suites)
        if not ktls.record_size:
            record_size_limit = None  # this kernel makes no smaller records, and no other way is allowed
    resumption = config.tickets.count > 0 and bool(ticket_keys)
    return ServerConfig(
        credentials=credentials,
        cipher_suites=suites,
        alpn=tuple(protocol for protocol in SERVICES if protocol is not None),
        ticket_keys=tickets.TicketKeys(tickets.TicketKey(entry.name, entry.key) for entry in ticket_keys)
        if resumption
        else None,
        ticket_count=config.tickets.count,
        ticket_lifetime_s=config.tickets.lifetime_s,
        client_auth=client_auth,
        record_size_limit=record_size_limit,
        key_log=key_log,
    )
