"""Waiting with a deadline.

Tests wait for events: a line on a pipe, a readable socket, the end of a process. A few facts announce themselves to
nobody (what /proc says about another process); ``eventually`` asks for those again and again, and is the one place in
the tests that may let time pass.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from typing import IO, TypeVar

T = TypeVar("T")

# Far beyond what anything here takes: only a hang meets it. Guests (scripts/guest) are slower: under user-mode Linux
# every system call is, under QEMU everything is.
DEADLINE_S = {"uml": 90.0, "qemu": 240.0}.get(os.environ.get("KDAEMON_GUEST", ""), 30.0)


class DeadlineError(AssertionError):
    """What was waited for did not happen."""


def eventually(question: Callable[[], T], what: str, deadline_s: float = DEADLINE_S) -> T:
    """The first true answer of `question`. Raises DeadlineError, naming `what` and the last answer."""
    end = time.monotonic() + deadline_s
    while True:
        answer = question()
        if answer:
            return answer
        if time.monotonic() >= end:
            raise DeadlineError(f"not within {deadline_s:g} s: {what} (last answer: {answer!r})")
        select.select([], [], [], 0.005)


def read_line(stream: IO[bytes], what: str, deadline_s: float = DEADLINE_S) -> bytes:
    """One line of an unbuffered pipe, newline included; b"" at its end. Raises DeadlineError."""
    end = time.monotonic() + deadline_s
    line = b""
    while not line.endswith(b"\n"):
        readable, _, _ = select.select([stream], [], [], max(0.0, end - time.monotonic()))
        if not readable:
            raise DeadlineError(f"not within {deadline_s:g} s: {what} (so far: {line!r})")
        byte = stream.read(1)
        if not byte:
            break
        line += byte
    return line


def say_until(stdin: IO[bytes], said: bytes, stdout: IO[bytes], expected: bytes) -> None:
    """Writes `said` and reads lines until one contains `expected`."""
    stdin.write(said)
    seen = b""
    while expected not in (line := read_line(stdout, f"{expected!r} after {said!r}")):
        assert line, f"the end came before {expected!r}: {seen[-2000:]!r}"
        seen += line
