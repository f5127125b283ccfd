"""A worker process: the control thread's event loop here, one engine thread beside it on the same CPU.

Forked by the zygote. The loop waits for three things: the engine's events, keymgr's answers, the supervisor's
words. Each wake-up handles all that is there, then wakes the others once. The supervisor's end is noticed by its
socket's end of file and by the parent-death signal; the worker then closes its listeners, says goodbye to its
connections and leaves.
"""

import gc
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from kdaemon_pyx import engine as events
from kdaemon_pyx.client_admission import Clients
from kdaemon_pyx.client_connection import SERVICE_CLIENTS, ClientConnections
from kdaemon_pyx.engine import Engine
from kdaemon_pyx.file_service import FileService
from kdaemon_pyx.hkdf import hmac_digest
from kdaemon_pyx.http_log import AccessLog

from kdaemon import client_trust, process
from kdaemon.access_log import AccessLogWriter
from kdaemon.attach import Attachments
from kdaemon.attach_connect import Connector
from kdaemon.attach_operations import ClientOperations, Settings
from kdaemon.channel import Channel, Message
from kdaemon.config import Config, from_mapping
from kdaemon.control_records import ControlRecords
from kdaemon.credential_store import CredentialStore
from kdaemon.handoff import ConnectionPolicy, KtlsFacts, engine_record_layer, server_config, user_layer_reason
from kdaemon.handshake_driver import HandshakeDriver
from kdaemon.key_client import KeyChannel, KeyClient
from kdaemon.key_protocol import TicketKey
from kdaemon.observe import KeyLogFile, configure_logging, get_logger
from kdaemon.redirect import RedirectServer
from kdaemon.site_settings import http_limits, media_types, open_sites, reopened
from kdaemon.tls import key_schedule
from kdaemon.tls.configuration import ClientAuthentication
from kdaemon.tls.signing import Role

# The parent-death signal; not SIGTERM, which service managers and timeout(1) send to whole groups of processes: in
# a worker that one is ignored, the supervisor alone answers it
PARENT_DIED = signal.SIGUSR2
# Handshakes make many objects and no cycles: the collector looks a thirtieth as often as by default
GC_THRESHOLD = (20_000, 10, 10)
# Of the engine's events between two looks at everything else: a burst of ClientHellos is answered in parts, so that the
# first peers compute while the last are read
EVENTS_MAX = 4
ACCEPT_PAUSED_INTERVAL_S = 10.0  # between two lines of the log about it
ORPHAN_DEADLINE_MS = 500  # what connections get when the supervisor is gone
CLIENT_SPIN_NS = 20_000  # how long idle client rings are looked at, where the program has a CPU of its own
ORPHAN_KILL_S = 5  # and when the kernel ends what has not ended by then

_CONNECTION_EVENTS = frozenset(
    (events.EVENT_RECORDS, events.EVENT_END_OF_FILE, events.EVENT_CONTROL_RECORD, events.EVENT_INSTALLED)
)


class Worker:
    """State and event loop of the control thread."""

    def __init__(self, supervisor: Channel, index: int) -> None:
        self._supervisor = supervisor
        self._index = index
        self._log = get_logger()
        self._epoll = select.epoll()
        self._readers: dict[int, Callable[[int], None]] = {}
        self._essential: set[int] = set()  # descriptors without which there is no worker
        self._leaving = False
        self._draining = False
        self._drained: int | None = None  # connections that the engine cut, when it has none left
        self._reported_ready = False
        self._listener_fds: dict[int, int] = {}  # listener number -> descriptor, owned until EVENT_UNLISTENED
        self._config = Config()
        self._ktls = KtlsFacts(available=False, reason="", suites=frozenset(), rekey=False, record_size=False)
        self._cpu = -1
        self._accept_paused_told = -ACCEPT_PAUSED_INTERVAL_S
        self._credentials = CredentialStore(())
        self._client_trust: Mapping[int, ClientAuthentication] = {}
        self._keys_channels: dict[int, KeyChannel] = {}
        self._backends: dict[tuple[str, str], int] = {}
        self._ticket_keys: list[TicketKey] = []
        self._key_log: KeyLogFile | None = None
        self._redirects: list[RedirectServer] = []
        self._engine: Engine | None = None
        self._more_events = False  # were left in the engine's queue
        # None: not ours to choose, because whoever started the daemon did, or because a sandbox forbids it
        self._engine_policy = os.SCHED_OTHER if os.sched_getscheduler(0) == os.SCHED_OTHER else None
        self._engine_error = ""
        self._thread = threading.Thread(target=self._run_engine, name="engine", daemon=True)
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)

    def run(self) -> int:
        """Serves until told to leave; returns the exit status."""
        signal.signal(PARENT_DIED, lambda *_: self._orphaned())
        self._watch(self._supervisor.fileno(), self._supervisor_says)
        self._watch(self._wake_reader.fileno(), self._woken)
        self._essential.update(self._readers)
        while not self._leaving:
            if self._more_events:
                self._engine_events(select.EPOLLIN)
            timeout_s = self._timeout_s()
            self._leave_if_drained()
            if self._engine is not None:  # what the last batch of events, or a deadline just now, left to send
                self._keys.flush()
                self._engine.flush()
                self._schedule_engine()
            # (Leaving, too, may have been the last thing that a batch of events said.)
            for fd, mask in self._epoll.poll(0.0 if self._more_events or self._leaving else timeout_s):
                if reader := self._readers.get(fd):
                    self._read(fd, reader, mask)
        if self._thread.is_alive():
            assert self._engine is not None
            self._engine.stop()
            self._engine.flush()
            self._thread.join()
        if self._engine is not None and self._access_log is not None:
            self._access_log.close()
        return 1 if self._engine_error else 0

    def _read(self, fd: int, reader: Callable[[int], None], mask: int) -> None:
        """A surprise from one client's socket is that client's end, not that of the worker."""
        try:
            reader(mask)
        except Exception:
            if fd in self._essential:
                raise
            self._log.exception("client dropped")
            self._unwatch(fd)

    def _timeout_s(self) -> float | None:
        """Until the next signing request or redirect has waited too long; fails those that have."""
        if self._engine is None:
            return None
        now = time.monotonic()
        deadlines = [self._keys.expire(now), *(server.expire(now) for server in self._redirects)]
        return min((max(0.0, deadline - now) for deadline in deadlines if deadline is not None), default=None)

    def _watch(self, fd: int, reader: Callable[[int], None], mask: int = select.EPOLLIN) -> None:
        self._readers[fd] = reader
        self._epoll.register(fd, mask)

    def _unwatch(self, fd: int) -> None:
        self._epoll.unregister(fd)
        del self._readers[fd]
        self._essential.discard(fd)

    # The engine

    def _start_engine(self) -> None:
        deadlines = self._config.deadlines
        ring = AccessLog(self._config.access_log.format) if self._config.access_log.path else None
        self._access_log = AccessLogWriter(ring, self._config.access_log.path, self._log) if ring is not None else None
        # Owner of the roots: this process, as long as the engine's file service is
        self._file_service: FileService | None = None  # a daemon for libtls alone has none
        if self._config.site or self._config.listen:
            self._sites = open_sites(self._config.site)
            self._file_service = FileService(
                self._sites,
                http_limits(self._config.http),
                media_types(self._config.http, self._config.media_type),
                ring,
            )
        self._sites_first = 0
        self._clients = Clients(clients_max=self._config.clients.clients_max)
        spin_ns = CLIENT_SPIN_NS if (os.cpu_count() or 1) > 1 else 0
        self._engine = Engine(
            file_service=self._file_service,
            cpu=self._cpu,
            connections_max=self._config.limits.connections_max,
            record_layer=engine_record_layer(self._config, self._ktls),
            ktls_suites=self._ktls.suites,
            ktls_rekey=self._ktls.rekey,
            ktls_record_size=self._ktls.record_size,
            deadlines_ms={
                "handshake": deadlines.handshake_ms,
                "header": deadlines.header_ms,
                "body": deadlines.body_ms,
                "send": deadlines.send_ms,
                "idle": deadlines.idle_ms,
                "close": deadlines.close_ms,
            },
            services={SERVICE_CLIENTS: ClientConnections(self._clients, spin_ns=spin_ns)},
        )
        self._keys = KeyClient(self._signature, self._take_ticket_keys, deadlines.signing_ms / 1000)
        self._driver = HandshakeDriver(self._engine, self._keys, self._log)
        self._control_records = ControlRecords(self._engine, self._log)
        connector = Connector(self._watch)
        self._operations = ClientOperations(self._engine, self._clients, self._driver, connector, self._log)
        self._attachments = Attachments(
            self._clients, self._operations, self._watch, self._unwatch, log=self._log, lane=self._index
        )
        first = len(self._listener_fds) - len(self._config.redirect_listen)
        for number, entry in enumerate(self._config.redirect_listen, first):
            listener = socket.socket(fileno=self._listener_fds.pop(number))
            self._redirects.append(RedirectServer([listener], entry.port, self._watch, self._unwatch))
        self._thread.start()
        self._watch(self._engine.event_fd(), self._engine_events)
        self._essential.add(self._engine.event_fd())

    def _run_engine(self) -> None:
        assert self._engine is not None
        try:
            self._engine.run()
        except OSError as error:
            self._engine_error = f"io_uring cannot be used: {error.strerror or error} (see: kdaemon doctor)"
            self._wake_writer.send(b"e")

    def _woken(self, _mask: int) -> None:
        self._wake_reader.recv(64)
        self._say({"type": "failed", "reason": self._engine_error})
        self._leaving = True

    def _schedule_engine(self) -> None:
        """Whether what wakes the engine stops this thread at once, or only where it pauses.

        Both share a CPU, and in the middle of handshakes the switches there and back, two for each of them, cost more
        than they bring: as long as any is under way, the engine has its turn when this thread waits, and between two
        batches of events. Without them it runs as soon as it is woken.
        """
        policy = os.SCHED_BATCH if self._driver.under_way else os.SCHED_OTHER
        if self._engine_policy is not None and self._engine_policy != policy:
            self._engine_policy = policy
            assert self._thread.native_id is not None
            try:
                os.sched_setscheduler(self._thread.native_id, policy, os.sched_param(0))
            except OSError:
                self._engine_policy = None
        if self._more_events and policy == os.SCHED_BATCH:
            os.sched_yield()

    def _engine_events(self, _mask: int) -> None:
        assert self._engine is not None
        event: Any
        batch = self._engine.events(EVENTS_MAX)
        self._more_events = len(batch) == EVENTS_MAX
        for event in batch:
            try:
                self._handle(event)
            except Exception:
                if event[0] not in _CONNECTION_EVENTS:
                    raise
                self._log.exception("connection dropped")  # it alone, whatever was wrong with it
                self._engine.close(event[1])

    def _handle(self, event: Any) -> None:
        driver = self._driver
        kind = event[0]
        if kind == events.EVENT_RECORDS:
            driver.records(event[1], event[3], event[2])
        elif kind == events.EVENT_CLOSED:
            driver.closed(event[1], event[2])
            self._control_records.closed(event[1])
            self._operations.closed(event[1])
        elif kind == events.EVENT_CONNECTED:
            self._operations.connected(event[1], event[2], event[3])
        elif kind == events.EVENT_EXPORTED:
            self._operations.exported(event[1], event[2], event[3])
            if event[3] >= 0:
                self._control_records.closed(event[1])
        elif kind == events.EVENT_INSTALLED:
            self._operations.installed(event[1])
            if event[2] != "none":
                self._installed(event[2], event[3])
        elif kind == events.EVENT_CONTROL_RECORD:
            sessions = self._operations.sessions
            role = Role.CLIENT if sessions.is_client(event[1]) else Role.SERVER
            if tickets := self._control_records.received(event[1], event[2], event[3], event[4], role):
                sessions.received(event[1], tickets)
        elif kind == events.EVENT_END_OF_FILE:
            driver.end_of_file(event[1])
        elif kind == events.EVENT_REKEYED:
            self._control_records.rekeyed(event[1], event[2], event[3])
        elif kind == events.EVENT_KEY_LIMIT:
            self._control_records.key_limit(event[1], event[2])
        elif kind == events.EVENT_ACCEPT_PAUSED:
            self._accept_paused(event[2])
        elif kind == events.EVENT_UNLISTENED:
            self._unlistened(event[1])
        elif kind == events.EVENT_DRAINED:
            self._drained = event[1]

    def _accept_paused(self, error: int) -> None:
        now = time.monotonic()
        if now - self._accept_paused_told >= ACCEPT_PAUSED_INTERVAL_S:
            self._accept_paused_told = now
            self._log.warning("accept paused", problem=os.strerror(error), remedy="raise the limit of open files")

    def _installed(self, backend: str, reason: str) -> None:
        """Counts the reasons for a record layer and tells each once."""
        reason = user_layer_reason(self._config, self._ktls) or reason
        if (backend, reason) not in self._backends:
            self._log.info("record layer", backend=backend, reason=reason)
        self._backends[backend, reason] = self._backends.get((backend, reason), 0) + 1

    # keymgr

    def _signature(self, connection: int, signature: bytes) -> None:
        self._driver.signature(connection, signature)

    def _take_ticket_keys(self, keys: list[TicketKey]) -> None:
        self._ticket_keys = keys
        self._renew()
        if not self._reported_ready:
            self._reported_ready = True
            assert self._engine is not None
            for number, fd in self._listener_fds.items():
                self._engine.listen(number, fd, limited=True)
            self._say({"type": "ready"})

    def _attach_keymgr(self, fd: int) -> None:
        before = list(self._keys_channels.values())
        channel = self._keys.attach(socket.socket(fileno=fd))
        self._keys_channels[fd] = channel
        self._watch(fd, lambda mask: self._keymgr_ready(channel, mask))
        self._essential.add(fd)
        for old in before:
            self._keymgr_ready(old, select.EPOLLIN)  # it ends here if it owes nothing

    def _keymgr_ready(self, channel: KeyChannel, mask: int) -> None:
        fd = channel.fileno()
        if fd < 0:
            return
        if mask & ~select.EPOLLOUT and not self._keys.readable(channel):
            self._unwatch(fd)
            del self._keys_channels[fd]
            self._keys.lost(channel)
            return
        self._keys.flush()
        wanted = select.EPOLLIN | (select.EPOLLOUT if channel.wants_write else 0)
        self._epoll.modify(fd, wanted)

    # The supervisor

    def _supervisor_says(self, _mask: int) -> None:
        try:
            message, fds = self._supervisor.receive()
        except EOFError:
            self._unwatch(self._supervisor.fileno())
            self._orphaned()
            return
        match message["type"]:
            case "start":
                self._start(message, fds)
            case "configure":
                self._configure(message, fds)
            case "status":
                self._say({"type": "status", "status": self._status()})
            case "attach":
                if self._engine is not None:
                    self._attachments.take(socket.socket(fileno=fds[0]), message["lane_count"], message["uid"])
                else:
                    os.close(fds[0])
            case "access_log":
                self._use_access_log(fds[0])
            case "drain":
                self._drain(message["deadline_ms"])

    def _say(self, message: Message) -> None:
        try:
            self._supervisor.send(message)
        except OSError:
            pass  # its end of file is on the way

    def _start(self, message: Message, fds: list[int]) -> None:
        ktls = message["ktls"]
        self._ktls = KtlsFacts(**{**ktls, "suites": frozenset(ktls["suites"])})
        self._cpu = message["cpu"]
        os.sched_setaffinity(0, {self._cpu})
        self._listener_fds = dict(enumerate(fds))

    def _configure(self, message: Message, fds: list[int]) -> None:
        before, self._config = self._config, from_mapping(message["config"])
        configure_logging(self._config.log, f"worker-{self._index}")
        self._credentials = CredentialStore(message["credentials"])
        self._client_trust = client_trust.load_all(self._config.site, self._log.error)
        if self._engine is None:
            self._start_engine()
        elif self._file_service is not None:
            same = before.site == self._config.site
            sites = reopened(self._config.site, self._sites) if same else open_sites(self._config.site)
            if sites is not self._sites:  # connections of the old ones stay with them; new ones get the new numbers
                self._sites, self._sites_first = sites, self._file_service.add_sites(sites)
        if self._config.keylog and self._key_log is None:
            self._key_log = KeyLogFile(self._config.keylog)
        if self._ticket_keys:
            self._renew()
        self._attach_keymgr(fds[0])

    def _use_access_log(self, fd: int) -> None:
        if self._engine is not None and self._access_log is not None:
            self._access_log.use(fd)
        else:
            os.close(fd)

    def _renew(self) -> None:
        """What new connections begin with, after a change of configuration, credentials or ticket keys."""
        policy = ConnectionPolicy(self._config.site, self._sites_first, self._client_trust)
        config = server_config(
            self._config,
            self._ktls,
            self._credentials.select,
            self._ticket_keys,
            self._key_log,
            client_auth=policy.client_auth,
        )
        self._driver.configure(config, policy)
        self._attachments.configure(self._config.clients)
        self._operations.configure(
            Settings(
                clients=self._config.clients,
                server=config,
                credentials=self._credentials,
                cipher_suites=config.cipher_suites,
                record_size_limit=config.record_size_limit,
                user_layer_reason=user_layer_reason(self._config, self._ktls),
                key_log=self._key_log,
            )
        )

    def _status(self) -> Message:
        if self._engine is None:
            return {}
        counters = self._engine.counters()
        driver, control = self._driver, self._control_records
        return {
            "connections": counters["connections"],
            "accepted": counters["accepted"],
            "handshakes": {"full": driver.full, "resumed": driver.resumed, "failed": driver.failed},
            "handshake_failures": driver.reasons,
            "record_layer": {name: counters[f"record_layer_{name}"] for name in ("kernel", "user", "none")},
            "exported": counters["exported"],
            "record_layer_reasons": [
                {"backend": backend, "reason": reason, "count": count}
                for (backend, reason), count in self._backends.items()
            ],
            "key_updates": {"followed": control.key_updates, "refused": control.rekeys_refused},
            "control_errors": control.errors,
            "bytes_in": counters["bytes_in"],
            "bytes_out": counters["bytes_out"],
            "engine": counters,
            "files": dict(self._file_service.counters()) if self._file_service else {},
            "redirects": sum(server.redirects for server in self._redirects),
            "clients": self._attachments.status(),
        }

    # The end

    def _drain(self, deadline_ms: int) -> None:
        if self._engine is None:
            self._say({"type": "drained", "cut": 0})
            self._leaving = True
            return
        self._engine.drain(deadline_ms)  # before the listeners go: what is queued on them is still served
        for server in self._redirects:
            server.drain(time.monotonic() + deadline_ms / 1000)
        if not self._draining:
            self._draining = True
            for number in self._listener_fds:
                self._engine.unlisten(number)

    def _leave_if_drained(self) -> None:
        if self._drained is not None and not any(server.under_way for server in self._redirects):
            self._say({"type": "drained", "cut": self._drained + sum(server.cut for server in self._redirects)})
            self._leaving = True

    def _unlistened(self, number: int) -> None:
        if self._operations.unlistened(number):
            return
        fd = self._listener_fds.pop(number, -1)
        if fd >= 0:
            os.close(fd)
        if not self._listener_fds:
            self._say({"type": "unlistened"})

    def _orphaned(self) -> None:
        """The supervisor is gone: leave, saying goodbye to connections if that goes fast."""
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(ORPHAN_KILL_S)
        self._drain(ORPHAN_DEADLINE_MS)


def main(supervisor: Channel, index: int, supervisor_pid: int) -> int:
    """Entry point of a forked worker; returns its exit status."""
    process.set_name(f"kdaemon-wrk-{index}")
    process.harden()
    process.die_with_parent(supervisor_pid, PARENT_DIED)
    key_schedule.use_hmac(hmac_digest)
    gc.set_threshold(*GC_THRESHOLD)
    return Worker(supervisor, index).run()
