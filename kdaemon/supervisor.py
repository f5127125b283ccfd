"""The supervisor: owns the configuration, the listening sockets and all other processes. Never reads a key.

One thread, one event loop. Startup: sockets, keymgr and zygote side by side, workers, `ready` lines. From then on
it replaces what dies: a worker (its connections are lost, nobody else's), the zygote (nothing is lost), keymgr
(handshakes wait until the next one has the keys). SIGTERM or SIGINT drains; the second one cuts. SIGHUP reloads.
SIGUSR1 opens the access log anew.
"""

import asyncio
import os
import platform
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from kdaemon_pyx.client_abi import HELLO_SIZE, lane_of_hello

from kdaemon import __version__, process
from kdaemon.access_log import open_log
from kdaemon.channel import Channel, Message
from kdaemon.children import BackOff, Child, WorkerSlot, describe_status
from kdaemon.config import NEEDS_RESTART, Config, ConfigError, to_mapping
from kdaemon.control import ControlError, ControlServer
from kdaemon.ktls import REASON_SWITCHED_OFF, KtlsSupport
from kdaemon.listeners import Listener, open_listener, open_listeners
from kdaemon.observe import get_logger

STARTUP_DEADLINE_S = 60.0
STATUS_DEADLINE_S = 2.0
RELOAD_DEADLINE_S = 8.0  # until whoever asks for one is told; the reload itself takes the time it needs
EXIT_GRACE_S = 10.0  # beyond the drain deadline, for processes to leave by themselves

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_CONFIGURATION = 2


class StartError(Exception):
    """The daemon cannot start; one line, and the exit status that goes with it."""

    def __init__(self, reason: str, status: int = EXIT_FAILURE) -> None:
        super().__init__(reason)
        self.status = status


class Supervisor:
    """Runs the daemon in the calling thread until it has been stopped; `run()` returns the exit status."""

    def __init__(self, config: Config, ktls: KtlsSupport, load_config: Callable[[], Config]) -> None:
        self._config = config
        self._ktls = ktls
        self._load_config = load_config  # for reload; raises ConfigError
        cpus = sorted(os.sched_getaffinity(0))
        count = config.workers or len(cpus)
        self._slots = [WorkerSlot(index, cpus[index % len(cpus)]) for index in range(count)]
        self._listeners: list[Listener] = []
        self._redirects: list[Listener] = []  # plain HTTP
        self._keymgr: Child | None = None
        self._keymgr_next: Child | None = None  # started, not ready yet
        self._config_next = config  # what it was started with; becomes the configuration when it is ready
        self._keymgr_back_off = BackOff()
        self._zygote: Child | None = None
        self._zygote_ready = False
        self._zygote_back_off = BackOff()
        self._reloaded: asyncio.Future[str] | None = None  # what became of the last reload; empty: all well
        self._credentials: list[Message] = []
        self._ticket_keys_fd = -1  # held for the next keymgr, never read here
        self._control: ControlServer | None = None
        self._changed = asyncio.Event()
        self._failure: StartError | None = None
        self._running = False
        self._stopping = False
        self._cut = 0
        self._next_lane = 0
        self._started = time.time()
        self._log = get_logger()

    def run(self) -> int:
        """Starts, serves, stops. Raises StartError or ListenError."""
        process.become_subreaper()
        return asyncio.run(self._run())

    async def _run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop_signal)
        loop.add_signal_handler(signal.SIGHUP, self._reload_signal)
        loop.add_signal_handler(signal.SIGUSR1, self._reopen_signal)
        try:
            await self._start()
            await self._wait(lambda: self._stopping)
            return await self._drain()
        finally:
            self._leave()

    # Startup

    async def _start(self) -> None:
        if self._config.ktls == "require" and not self._ktls.available:
            raise StartError(f"ktls is required and cannot be used: {self._ktls.detail} (see: kdaemon doctor)")
        if path := self._config.access_log.path:
            try:
                os.close(open_log(path))
            except OSError as error:
                raise StartError(f"the access log {path} cannot be opened: {error.strerror}") from None
        self._listeners, warnings = open_listeners(
            [listener.address for listener in self._config.listen], len(self._slots)
        )
        for warning in warnings:
            self._log.warning("listen", problem=warning)
        for entry in self._config.redirect_listen:
            self._redirects.append(open_listener(entry.address, len(self._slots)))
        try:
            others = bool(self._config.clients.users or self._config.clients.groups)
            self._control = ControlServer(
                self._config.socket, self._control_request, self._log, self._attach_client, open_to_all=others
            )
        except ControlError as error:
            raise StartError(str(error)) from None
        self._spawn_zygote()
        self._spawn_keymgr()
        try:
            async with asyncio.timeout(STARTUP_DEADLINE_S):
                await self._wait(lambda: self._stopping or all(slot.ready for slot in self._slots))
        except TimeoutError:
            raise StartError(f"the workers were not ready within {STARTUP_DEADLINE_S:.0f} s") from None
        self._running = True
        if not self._stopping:
            backend, reason = self._backend()
            for listener in self._listeners:
                print(f"ready https://{listener.address}/ backend={backend} reason={reason}", flush=True)

    def _backend(self) -> tuple[str, str]:
        """The record layer that connections get, and why, as the ready line says it."""
        if self._config.ktls == "off":
            return "user", REASON_SWITCHED_OFF
        return ("kernel" if self._ktls.available else "user"), self._ktls.reason

    async def _wait(self, condition: Callable[[], bool]) -> None:
        while not condition():
            if self._failure is not None:
                raise self._failure
            self._changed.clear()
            await self._changed.wait()

    def _fail(self, reason: str, status: int = EXIT_FAILURE) -> None:
        """Something that cannot be had: the end during startup, a line in the log afterwards."""
        if self._running:
            self._log.error("failed", problem=reason)
        else:
            self._failure = StartError(reason, status)
            self._changed.set()

    def _spawn(self, name: str, config: Config, on_exit: Callable[[Child, int], None], fds: tuple[int, ...]) -> Child:
        ours, theirs = Channel.pair()
        pid = process.spawn_module(f"kdaemon.{name}", theirs.fileno())
        theirs.close()
        child = Child(name, pid, ours, getattr(self, f"_{name}_says"), on_exit)
        child.start_within(STARTUP_DEADLINE_S, self._log)
        child.send({"type": "start", "config": to_mapping(config), "supervisor": os.getpid()}, fds)
        return child

    # keymgr

    def _spawn_keymgr(self, config: Config | None = None) -> None:
        self._config_next = config or self._config
        fds = (self._ticket_keys_fd,) if self._ticket_keys_fd >= 0 else ()
        self._keymgr_back_off.started()
        self._keymgr_next = self._spawn("keymgr", self._config_next, self._keymgr_exited, fds)

    def _keymgr_says(self, child: Child, message: Message, fds: list[int]) -> None:
        if message["type"] == "failed":
            self._fail(message["reason"], EXIT_CONFIGURATION)
            self._reload_ended(message["reason"])
        elif message["type"] == "ready" and child is self._keymgr_next:
            if self._ticket_keys_fd >= 0:
                os.close(self._ticket_keys_fd)
            self._ticket_keys_fd = fds[0]
            before, self._keymgr, self._keymgr_next = self._keymgr, child, None
            child.watch(self._log)
            self._config = self._config_next
            self._credentials = message["credentials"]
            for credential in self._credentials:
                self._log.info("certificate", names=credential["names"], sha256=credential["sha256"])
            for slot in self._slots:
                if slot.child is not None:
                    self._configure(slot)
                else:
                    self._fork(slot)
            if before is not None:
                before.send({"type": "retire"})  # it leaves when the last worker has its last signature
            self._reload_ended()

    def _keymgr_exited(self, child: Child, status: int) -> None:
        if child is self._keymgr_next:
            self._keymgr_next = None
            self._reload_ended(f"keymgr did not start: {describe_status(status)}")
            if self._keymgr is not None and self._keymgr is not child:
                return  # a reload failed; the old one serves on
        elif child is self._keymgr:
            self._keymgr = None
        else:
            return  # one that had been retired
        if not self._running:
            self._fail(f"keymgr did not start: {describe_status(status)}")
        elif not self._stopping or any(slot.child for slot in self._slots):
            self._log.warning("keymgr died", pid=child.pid, how=describe_status(status))
            asyncio.get_running_loop().call_later(self._keymgr_back_off.died(), self._spawn_keymgr)

    def _configure(self, slot: WorkerSlot) -> None:
        """Gives a worker the configuration, the credentials and a connection to the present keymgr."""
        if self._keymgr is None or slot.child is None:
            return
        ours, theirs = Channel.pair()
        self._keymgr.send({"type": "attach", "worker": slot.index}, (ours.fileno(),))
        message = {"type": "configure", "config": to_mapping(self._config), "credentials": self._credentials}
        slot.child.send(message, (theirs.fileno(),))
        ours.close()
        theirs.close()
        self._send_access_log([slot])

    def _reopen_signal(self) -> None:
        self._send_access_log(self._slots)

    def _send_access_log(self, slots: Sequence[WorkerSlot]) -> None:
        """Opens the access log, anew after it was moved away, and gives it to the workers."""
        if not self._config.access_log.path:
            return
        try:
            fd = open_log(self._config.access_log.path)
        except OSError as error:
            self._log.error("access log cannot be opened", path=self._config.access_log.path, problem=error.strerror)
            return
        for slot in slots:
            if slot.child is not None:
                slot.child.send({"type": "access_log"}, (fd,))
        os.close(fd)

    # Workers, forked by the zygote

    def _spawn_zygote(self) -> None:
        self._zygote_back_off.started()
        self._zygote = self._spawn("zygote", self._config, self._zygote_exited, ())

    def _zygote_says(self, child: Child, message: Message, _fds: list[int]) -> None:
        if message["type"] == "failed":
            self._fail(message["reason"])
        elif message["type"] == "ready":
            self._zygote_ready = True
            child.watch(self._log)
            for slot in self._slots:
                self._fork(slot)
        elif message["type"] == "forked":
            slot = self._slots[message["index"]]
            if slot.channel is not None:
                self._worker_forked(slot, message["pid"], slot.channel)

    def _zygote_exited(self, child: Child, status: int) -> None:
        self._zygote, self._zygote_ready = None, False
        for slot in self._slots:
            if slot.channel is not None:  # it was to be forked; a worker that was never reported leaves by itself
                slot.channel.close()
                slot.channel = None
        if not self._running and not self._stopping:
            self._fail(f"the zygote did not start: {describe_status(status)}")
        elif not self._stopping:
            self._log.warning("zygote died", pid=child.pid, how=describe_status(status))
            asyncio.get_running_loop().call_later(self._zygote_back_off.died(), self._spawn_zygote)

    def _fork(self, slot: WorkerSlot) -> None:
        """Asks for a process in an empty slot, if everything it needs is there."""
        ready = self._zygote is not None and self._zygote_ready and self._keymgr is not None
        if not ready or slot.child is not None or slot.channel is not None or self._stopping:
            return
        assert self._zygote is not None
        slot.channel, theirs = Channel.pair()
        slot.back_off.started()
        self._zygote.send({"type": "fork", "index": slot.index}, (theirs.fileno(),))
        theirs.close()

    def _worker_forked(self, slot: WorkerSlot, pid: int, channel: Channel) -> None:
        slot.channel = None
        try:
            slot.child = Child(
                "worker",
                pid,
                channel,
                lambda child, message, fds: self._worker_says(slot, message),
                lambda child, status: self._worker_exited(slot, child, status),
            )
        except ProcessLookupError:  # gone before anybody looked, and reaped
            channel.close()
            self._replace(slot, pid, "gone at once")
            return
        slot.child.send(
            {
                "type": "start",
                "cpu": slot.cpu,
                "ktls": {
                    "available": self._ktls.available,
                    "reason": self._ktls.reason,
                    "suites": sorted(self._ktls.suites),
                    "rekey": self._ktls.rekey,
                    "record_size": self._ktls.tx_max_payload,
                },
            },
            tuple(listener.socket_for(slot.index).fileno() for listener in self._listeners + self._redirects),
        )
        self._configure(slot)
        if self._stopping:
            slot.child.send({"type": "drain", "deadline_ms": 0})

    def _worker_says(self, slot: WorkerSlot, message: Message) -> None:
        match message["type"]:
            case "ready":
                slot.ready = True
            case "failed":
                self._fail(f"worker {slot.index}: {message['reason']}")
            case "status":
                slot.status = message["status"]
                if slot.status_answer is not None and not slot.status_answer.done():
                    slot.status_answer.set_result(None)
            case "unlistened":
                slot.unlistened = True
                self._close_listeners()
            case "drained":
                slot.drained = True
                self._cut += message["cut"]
        self._changed.set()

    def _close_listeners(self) -> None:
        """In a drain, when no worker listens any more: from here on the port answers with a reset."""
        if all(each.unlistened or each.child is None for each in self._slots):
            for listener in self._listeners + self._redirects:
                listener.close()

    def _worker_exited(self, slot: WorkerSlot, child: Child, status: int) -> None:
        slot.child = None
        slot.ready = False
        if slot.status_answer is not None and not slot.status_answer.done():
            slot.status_answer.cancel()
        if self._stopping:
            self._close_listeners()  # one with nothing to finish may be gone before it has said that it listens no more
            if not slot.drained:
                self._log.error("worker died while draining", pid=child.pid, how=describe_status(status))
                self._cut += 1
        elif not self._running:
            self._fail(f"worker {slot.index} did not start: {describe_status(status)}")
        else:
            self._replace(slot, child.pid, describe_status(status))
        self._changed.set()

    def _replace(self, slot: WorkerSlot, pid: int, how: str) -> None:
        delay_s = slot.back_off.died()
        self._log.warning("worker died", index=slot.index, pid=pid, how=how, replaced_in_s=delay_s)
        asyncio.get_running_loop().call_later(delay_s, self._fork, slot)

    # Stopping

    def _stop_signal(self) -> None:
        self.stop(cut=self._stopping)  # the second signal is impatient

    def stop(self, cut: bool = False) -> None:
        deadline_ms = 0 if cut else self._config.deadlines.drain_ms
        if not self._stopping:
            self._log.info("stopping" if cut else "draining", deadline_ms=deadline_ms)
            self._stopping = True
            for listener in self._listeners + self._redirects:
                listener.refuse_new()
        elif not cut:
            return
        for child in [slot.child for slot in self._slots if slot.child is not None]:
            child.send({"type": "drain", "deadline_ms": deadline_ms})
        self._changed.set()

    async def _drain(self) -> int:
        deadline_s = self._config.deadlines.drain_ms / 1000 + EXIT_GRACE_S
        try:
            async with asyncio.timeout(deadline_s):
                await self._wait(lambda: all(slot.child is None for slot in self._slots))
        except TimeoutError:
            self._log.error("workers did not leave in time and are killed")
            self._cut += sum(slot.child is not None for slot in self._slots)
        if self._cut:
            self._log.warning("connections were cut by the drain deadline", count=self._cut)
        return EXIT_FAILURE if self._cut else EXIT_OK

    def _leave(self) -> None:
        """Takes everything along; safe at any point of a start that failed."""
        if self._control is not None:
            self._control.close()
        for listener in self._listeners + self._redirects:
            listener.close()
        workers = [slot.child for slot in self._slots]
        children = [child for child in (*workers, self._zygote, self._keymgr, self._keymgr_next) if child]
        for child in children:
            child.kill()
        for child in children:
            with suppress(ChildProcessError):
                os.waitpid(child.pid, 0)

    # Reload and control

    def _reload_signal(self) -> None:
        try:
            self.reload()
        except Exception as error:  # noqa: BLE001 - whatever is wrong with the new one, the old one serves on
            self._log.error("reload refused; the old configuration stays", problem=str(error))

    def reload(self) -> asyncio.Future[str]:
        """Reads the configuration again; certificates, keys and sites change without dropping a connection.

        Raises ConfigError. A new keymgr takes the new keys; the old one serves until it is ready, so bad keys
        change nothing: the future tells what is wrong with them, or nothing when they are in use.
        """
        config = self._load_config()
        if self._stopping or self._keymgr_next is not None:
            raise ConfigError("the daemon is ending" if self._stopping else "keymgr is just being started; try again")
        ignored = [name for name in NEEDS_RESTART if getattr(config, name) != getattr(self._config, name)]
        if ignored:
            self._log.warning("reload: these keys need a restart", keys=ignored)
        self._reloaded = asyncio.get_running_loop().create_future()
        self._spawn_keymgr(replace(config, **{name: getattr(self._config, name) for name in NEEDS_RESTART}))
        return self._reloaded

    def _reload_ended(self, problem: str = "") -> None:
        if self._reloaded is not None and not self._reloaded.done():
            self._reloaded.set_result(problem)

    def _attach_client(self, connection: socket.socket) -> bool:
        """A libtls program: its lane is a worker, which reads the hello and decides. False: no worker is ready."""
        workers = [slot for slot in self._slots if slot.child is not None and slot.ready]
        if not workers:
            return False
        lane = lane_of_hello(connection.recv(HELLO_SIZE, socket.MSG_PEEK))
        if lane is None:
            self._next_lane += 1
            lane = self._next_lane
        slot = workers[lane % len(workers)]
        assert slot.child is not None
        message = {"type": "attach", "lane_count": len(workers), "uid": os.geteuid()}
        return slot.child.send(message, (connection.fileno(),))

    async def _control_request(self, request: Message) -> Message:
        match request.get("command"):
            case "status":
                return await self._status()
            case "reload":
                done, _ = await asyncio.wait([self.reload()], timeout=RELOAD_DEADLINE_S)
                if not done:
                    raise ControlError("the new keys are still being read; the log will tell")
                if problem := done.pop().result():
                    raise ControlError(f"reload refused; the old configuration stays: {problem}")
                return {}
            case "drain":
                self.stop()
                return {}
            case "stop":
                self.stop(cut=True)
                return {}
        raise ControlError(f"unknown command {request.get('command')!r}")

    async def _status(self) -> Message:
        asked = []
        for slot in self._slots:
            if slot.child is not None:
                slot.status_answer = asyncio.get_running_loop().create_future()
                slot.child.send({"type": "status"})
                asked.append(slot.status_answer)
        if asked:
            await asyncio.wait(asked, timeout=STATUS_DEADLINE_S)
        backend, _ = self._backend()
        return {
            "version": __version__,
            "kernel": platform.release(),
            "pid": os.getpid(),
            "uptime_s": round(time.time() - self._started, 3),
            "state": "draining" if self._stopping else "running",
            "listeners": [listener.address for listener in self._listeners],
            "redirect_listeners": [listener.address for listener in self._redirects],
            "ktls": {"mode": self._config.ktls, "available": self._ktls.available, "reason": self._ktls.reason},
            "backend": backend,
            "keymgr": {"pid": self._keymgr and self._keymgr.pid, "restarts": self._keymgr_back_off.restarts},
            "zygote": {"pid": self._zygote and self._zygote.pid, "restarts": self._zygote_back_off.restarts},
            "certificates": [{key: entry[key] for key in ("names", "sha256")} for entry in self._credentials],
            "workers": [slot.facts() for slot in self._slots],
            "clients": [client for slot in self._slots for client in slot.status.get("clients", [])],
        }
