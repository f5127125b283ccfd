"""What is measured, what counts as the work of each case, and the mark it has to reach."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.serving.load import Result

KIB = 1024


@dataclass(frozen=True)
class File:
    """A file of the site; its name tells its size. `count` of them where the name has a *."""

    name: str
    size: int
    count: int = 1

    def names(self) -> list[str]:
        return [self.name.replace("*", str(number)) for number in range(self.count)]


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
# Read again only when the page cache has been told to forget it; 128 MB/s of them are streamed.
COLD = File("cold-*", 16 * KIB * KIB, count=32)
COLD_STREAMS = 4
COLD_FILES_PER_SECOND = 8.0

# How a case is compared, and what its mark bounds
WORK = "work"  # per CPU-second, with the reference server: at least
LATENCY = "latency"  # 99th percentile, with the reference server: at most
ITSELF = "itself"  # work per CPU-second, with the same server without `idle` connections: at least
WORKERS = "workers"  # CPU per unit of work, with the same server's one worker: at most


@dataclass(frozen=True)
class Case:
    """One row. `unit` is what is counted: requests, MB (10^6 bytes) or handshakes.

    `idle`: connections that are open beside the load and do nothing. `peak`: the load is this part of the reference
    server's peak. `ages`: the connections have asked up to so many times before (both servers close a connection
    after 1,000 requests; renewed all together, they would make one burst of handshakes after each 1,000 rounds).
    `cold`: others stream big files that are not in the page cache.
    """

    name: str
    file: File
    mode: str
    connections: int
    unit: str
    mark: float
    compared: str = WORK
    idle: int = 0
    peak: float = 0.0
    ages: int = 0
    cold: bool = False

    def work(self, result: Result) -> float:
        if self.unit == "MB":
            return result.bytes / 1e6
        if self.unit == "handshakes":
            return result.handshakes_resumed if self.mode == "resumed" else result.handshakes_full
        return result.requests


CASES = (
    Case("requests-1k", FILES["1k"], "keepalive", 32, "requests", 1.3),
    Case("requests-1k-256", FILES["1k"], "keepalive", 256, "requests", 1.3),
    Case("requests-16k", FILES["16k"], "keepalive", 32, "requests", 1.15),
    Case("requests-100k", FILES["100k"], "keepalive", 32, "requests", 1.15),
    Case("bytes-1m", FILES["1m"], "keepalive", 8, "MB", 1.1),
    Case("bytes-100m", FILES["100m"], "keepalive", 4, "MB", 1.1),
    Case("handshakes-full", FILES["1k"], "full", 32, "handshakes", 0.6),
    Case("handshakes-resumed", FILES["1k"], "resumed", 32, "handshakes", 0.6),
    Case("latency-1k", FILES["1k"], "keepalive", 32, "requests", 1.0, LATENCY, peak=0.7, ages=1000),
    Case("latency-1k-renewed", FILES["1k"], "keepalive", 32, "requests", 1.0, LATENCY, peak=0.7),
    Case("latency-cold", FILES["1k"], "keepalive", 32, "requests", 1.0, LATENCY, peak=0.3, ages=1000, cold=True),
    Case("idle-10000", FILES["1k"], "keepalive", 50, "requests", 0.95, ITSELF, idle=10_000),
    Case("two-workers", FILES["1k"], "keepalive", 64, "requests", 1.1, WORKERS),
)
CASE_NAMES = tuple(case.name for case in CASES)
MEMORY = "memory"  # a case of its own shape: the servers are started afresh for it
MEMORY_CONNECTIONS = 1000
MEMORY_MARK = 0.5
