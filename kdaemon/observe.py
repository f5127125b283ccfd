"""Logging for every process of the daemon: structlog, one line per event, on standard error."""

import logging
import os
import sys
from typing import Any

import structlog

from kdaemon.config import Log


def configure_logging(log: Log, process: str) -> None:
    """Sets up logging for this process; every line carries `process`. Standard output stays for the `ready` lines."""
    renderer: Any
    if log.format == "json":
        renderer = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0, pad_level=False)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[log.level.upper()]),
        logger_factory=_LineLogger,
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(process=process)


class _LineLogger:
    """Writes a line to standard error with one write(2), so that lines of several processes do not mix.

    Whatever becomes of standard error (a closed pipe, a full disk), the daemon goes on.
    """

    def __init__(self, *_: object) -> None:
        pass

    def msg(self, line: str) -> None:
        try:
            os.write(2, line.encode(errors="replace") + b"\n")
        except OSError:
            pass

    debug = info = warning = error = msg


class KeyLogFile:
    """Appends lines of the NSS key log format to a file only its owner can read, and with it all traffic."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def __call__(self, line: str) -> None:
        os.write(self._fd, line.encode() + b"\n")  # one write: lines of several workers do not mix


def get_logger() -> Any:
    """The logger of this process."""
    return structlog.get_logger()
