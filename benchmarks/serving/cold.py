"""Big files that are not in the page cache, streamed to others while small ones are asked for."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.serving.cases import COLD, COLD_FILES_PER_SECOND, COLD_STREAMS
from benchmarks.serving.conditions import Conditions
from benchmarks.serving.load import Load, LoadError, beside
from benchmarks.serving.servers import Server

FORGET_INTERVAL_S = 0.5
_COLD_PART_MIN = 0.5  # of what is streamed must have come from the disk


def forget(paths: list[Path]) -> None:
    """Takes the files out of the page cache."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # what was just written is not forgotten before it is on the disk
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


@contextmanager
def streams(server: Server, conditions: Conditions) -> Iterator[None]:
    """Streams the cold files until the end; LoadError if they were not cold."""
    paths = [conditions.site / name for name in COLD.names()]
    load = Load(
        path=f"/{COLD.name}", mode="keepalive", connections=COLD_STREAMS, seconds=3600.0, rate=COLD_FILES_PER_SECOND,
        body_bytes=COLD.size, suite=conditions.suite, group=conditions.group, files=COLD.count,
    )  # fmt: skip
    ended = threading.Event()

    def keep_cold() -> None:
        while not ended.wait(FORGET_INTERVAL_S):
            forget(paths)

    forget(paths)
    with beside(conditions.generator, server.address, load, conditions.cpu):
        thread = threading.Thread(target=keep_cold)
        thread.start()
        before, clock = server.account.disk_bytes(), os.times().elapsed
        try:
            yield
        finally:
            read, seconds = server.account.disk_bytes() - before, os.times().elapsed - clock
            ended.set()
            thread.join()
    streamed = COLD_FILES_PER_SECOND * COLD.size * seconds
    if read < _COLD_PART_MIN * streamed:
        raise LoadError(f"{server.name} read {read / 1e6:.0f} MB of {streamed / 1e6:.0f} MB from the disk: not cold")
