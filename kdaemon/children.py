"""The supervisor's children: a process, its pidfd, its channel, and when to start the next one after it died."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from kdaemon.channel import Channel, Message

BACK_OFF_FIRST_S = 0.05
BACK_OFF_MAX_S = 5.0
PING_INTERVAL_S = 1.0
PINGS_UNANSWERED_MAX = 3  # shorter than the signing deadline: what a hanging keymgr owes, its successor can still sign
STABLE_S = 10.0  # a process that lived so long starts with a clean record


class BackOff:
    """Delay before a replacement: none after a long life, doubled after each short one."""

    def __init__(self) -> None:
        self._delay_s = 0.0
        self._started = time.monotonic()
        self.restarts = 0

    def started(self) -> None:
        self._started = time.monotonic()

    def died(self) -> float:
        """Seconds to wait before the replacement starts."""
        if time.monotonic() - self._started >= STABLE_S:
            self._delay_s = 0.0
        delay_s = self._delay_s
        self._delay_s = min(BACK_OFF_MAX_S, max(BACK_OFF_FIRST_S, delay_s * 2))
        self.restarts += 1
        return delay_s


class Child:
    """A running process of the daemon, watched by the event loop. Owns the pidfd and its end of the channel.

    `on_message(child, message, fds)` gets what it says, `on_exit(child, status)` its end, once, with the wait status.
    """

    def __init__(
        self,
        name: str,
        pid: int,
        channel: Channel,
        on_message: Callable[["Child", Message, list[int]], None],
        on_exit: Callable[["Child", int], None],
    ) -> None:
        self.name = name
        self.pid = pid
        self.channel = channel
        self._on_message = on_message
        self._on_exit = on_exit
        self._pidfd = os.pidfd_open(pid)
        self._loop = asyncio.get_running_loop()
        self._unanswered = 0
        self._timer: asyncio.TimerHandle | None = None  # of what is waited for: its start, then the next ping
        channel.socket.setblocking(False)
        self._loop.add_reader(channel.fileno(), self._readable)
        self._loop.add_reader(self._pidfd, self._exited)

    def send(self, message: Message, fds: tuple[int, ...] = ()) -> bool:
        """Sends a message; a child that is gone, or that has not read for a long time, does not get it: False."""
        try:
            self.channel.send(message, fds)
        except OSError:
            return False
        return True

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal; harmless when the process has ended."""
        if self._pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def start_within(self, seconds: float, log: Any) -> None:
        """Kills it, so that it is replaced or the reload ends, unless `watch` was called before: it is ready then."""

        def too_late() -> None:
            log.error("was not ready in time and is killed", process=self.name, pid=self.pid, seconds=seconds)
            self.kill()

        self._timer = self._loop.call_later(seconds, too_late)

    def watch(self, log: Any) -> None:
        """From now on it is asked for a sign of life every second; one that stays silent is killed, and so replaced.

        Questions are counted, not seconds: a machine that stood still has not asked.
        """
        if self._timer is not None:
            self._timer.cancel()
        if self._unanswered > PINGS_UNANSWERED_MAX:
            log.error("does not answer and is killed", process=self.name, pid=self.pid)
            self.kill()
            return
        self._unanswered += 1
        self.send({"type": "ping"})
        self._timer = self._loop.call_later(PING_INTERVAL_S, self.watch, log)

    def _readable(self) -> None:
        while self._pidfd >= 0:
            try:
                message, fds = self.channel.receive()
            except BlockingIOError:
                return
            except (EOFError, OSError):
                self._loop.remove_reader(self.channel.fileno())  # its exit comes through the pidfd
                return
            if message["type"] == "pong":
                self._unanswered = 0
            else:
                self._on_message(self, message, fds)

    def _exited(self) -> None:
        self._readable()  # its last words
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._pidfd)
        with suppress(ValueError, OSError):
            self._loop.remove_reader(self.channel.fileno())
        try:
            _, status = os.waitpid(self.pid, 0)
        except ChildProcessError:
            status = 0
        os.close(self._pidfd)
        self._pidfd = -1
        self.channel.close()
        self._on_exit(self, status)


@dataclass(slots=True, eq=False)
class WorkerSlot:
    """The place of one worker: its CPU and sockets stay, the process in it may change."""

    index: int
    cpu: int
    back_off: BackOff = field(default_factory=BackOff)
    child: Child | None = None
    channel: Channel | None = None  # the end for the next process, while the zygote forks it
    ready: bool = False
    drained: bool = False
    unlistened: bool = False
    status: Message = field(default_factory=dict)
    status_answer: asyncio.Future[None] | None = None

    def facts(self) -> dict[str, Any]:
        """For `ctl status`: what the worker answered, if it did."""
        answered = self.status_answer is not None and self.status_answer.done() and not self.status_answer.cancelled()
        counters = {name: value for name, value in self.status.items() if name != "clients"} if answered else {}
        return {
            "index": self.index,
            "pid": self.child and self.child.pid,
            "cpu": self.cpu,
            "restarts": self.back_off.restarts,
            "responding": answered,
            **counters,
        }


def describe_status(status: int) -> str:
    """A wait status in words."""
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"exit status {os.waitstatus_to_exitcode(status)}"
