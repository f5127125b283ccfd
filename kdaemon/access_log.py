"""Writes the access log: one thread per worker takes whole batches of lines from the engine's ring to the file.

The supervisor opens the file, so that it may lie where a worker's user cannot write, and opens it again on SIGUSR1.
"""

import os
import threading
from typing import Any

from kdaemon_pyx.http_log import AccessLog

BATCH_INTERVAL_S = 1.0  # a line is in the file after that long at the latest


def open_log(path: str) -> int:
    """Opens the file at `path` to append to; the caller owns the descriptor. Raises OSError."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)


class AccessLogWriter:
    """Owns the descriptor it writes to. use() and close() are for the control thread."""

    def __init__(self, ring: AccessLog, path: str, log: Any) -> None:
        self._ring = ring
        self._path = path
        self._log = log
        self._lock = threading.Lock()  # of the two below
        self._fd = -1
        self._closing = False
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="access-log", daemon=True)
        self._thread.start()

    def use(self, fd: int) -> None:
        """Writes to `fd` from now on; what came before goes to the old one, which is closed."""
        with self._lock:
            self._drain()
            old, self._fd = self._fd, fd
        if old >= 0:
            os.close(old)

    def close(self) -> None:
        """Writes what is there and ends the thread."""
        with self._lock:
            self._closing = True
        self._ring.wake()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._ring.wait(BATCH_INTERVAL_S)
            with self._lock:
                self._drain()
                if self._closing:
                    return

    def _drain(self) -> None:
        if self._fd < 0:
            return
        try:
            while self._ring.drain(self._fd):
                pass
        except OSError as error:
            if not self._failed:  # told once
                self._log.error(
                    "access log cannot be written",
                    path=self._path,
                    problem=error.strerror,
                    meanwhile="requests are served; lines of this worker wait in memory, then they are dropped",
                )
            self._failed = True
        else:
            if self._failed:
                dropped = self._ring.counters()["log_dropped"]
                self._log.info("access log is written again", path=self._path, dropped=dropped)
            self._failed = False
