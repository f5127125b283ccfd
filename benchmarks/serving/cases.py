"""What is measured, and what counts as the work of each case."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.serving.load import Result

KIB = 1024


@dataclass(frozen=True)
class File:
    """A file of the site; its name tells its size."""

    name: str
    size: int


FILES = {
    file.name: file
    for file in (
        File("1k", KIB),
        File("16k", 16 * KIB),
        File("100k", 100 * KIB),
        File("1m", KIB * KIB),
        File("100m", 100 * KIB * KIB),
    )
}


@dataclass(frozen=True)
class Case:
    """One row. `unit` is what is counted: requests, MB (10^6 bytes) or handshakes.

    `mark`: the ratio per CPU-second to reach. `idle`: connections that are open beside the load and do nothing.
    `peak`: the load is this part of the reference server's peak; then the mark is the ratio of the 99th percentile of
    latency that must not be passed.
    """

    name: str
    file: File
    mode: str
    connections: int
    unit: str
    mark: float
    idle: int = 0
    peak: float = 0.0

    def work(self, result: Result) -> float:
        if self.unit == "MB":
            return result.bytes / 1e6
        if self.unit == "handshakes":
            return result.handshakes_resumed if self.mode == "resumed" else result.handshakes_full
        return result.requests


CASES = (
    Case("requests-1k", FILES["1k"], "keepalive", 32, "requests", 0.8),
    Case("requests-1k-256", FILES["1k"], "keepalive", 256, "requests", 0.8),
    Case("requests-16k", FILES["16k"], "keepalive", 32, "requests", 0.8),
    Case("requests-100k", FILES["100k"], "keepalive", 32, "requests", 0.8),
    Case("bytes-1m", FILES["1m"], "keepalive", 8, "MB", 0.8),
    Case("bytes-100m", FILES["100m"], "keepalive", 4, "MB", 0.8),
    Case("handshakes-full", FILES["1k"], "full", 32, "handshakes", 0.4),
    Case("handshakes-resumed", FILES["1k"], "resumed", 32, "handshakes", 0.4),
    Case("latency-1k", FILES["1k"], "keepalive", 32, "requests", 1.0, peak=0.7),
    Case("idle-10000", FILES["1k"], "keepalive", 50, "requests", 0.8, idle=10_000),
)
CASE_NAMES = tuple(case.name for case in CASES)
MEMORY = "memory"  # a case of its own shape: the servers are started afresh for it
MEMORY_CONNECTIONS = 1000
