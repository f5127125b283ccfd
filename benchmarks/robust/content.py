"""The served folder: files whose every byte is known, some of them replaced and rewritten while they are served.

A byte is a function of (name, version, offset): an AES-CTR keystream, made at any offset without what is before it. So
a whole body is checked by SHA-256 against the digest noted when the version was written, and any range byte for byte.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

BLOCK = 16
# docs/configuration.md: a change is seen within a second, of a path that is asked for all the time. The rest is the
# machine's.
STALE_S = 3.0
HUGE_BYTES = (5 << 30) + 4321
HUGE_ISLANDS = (0, (4 << 30) - 5000, (4 << 30) + 777, HUGE_BYTES - 4096)
ISLAND_BYTES = 4096


def content(name: str, version: int, first: int, length: int) -> bytes:
    """`length` bytes of a version of a file, from offset `first` on."""
    if length == 0:
        return b""
    key = hashlib.sha256(f"{name}/{version}".encode()).digest()
    skip = first % BLOCK
    counter = (first // BLOCK).to_bytes(BLOCK, "big")
    stream = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor()
    return stream.update(bytes(skip + length))[skip:]


def huge_content(first: int, length: int) -> bytes:
    """The same for the sparse file of 5 GiB: zeros, with islands of its keystream."""
    piece = bytearray(length)
    for island in HUGE_ISLANDS:
        start, end = max(first, island), min(first + length, island + ISLAND_BYTES)
        if start < end:
            piece[start - first : end - first] = content("huge.bin", 0, start, end - start)
    return bytes(piece)


@dataclass
class Version:
    """One content of a file and when a client may see it."""

    number: int
    size: int
    sha256: bytes
    from_s: float  # just before it was there
    to_s: float = float("inf")  # just after it was gone


@dataclass
class File:
    """`kind`: fixed, renamed (replaced by rename: a client gets one version whole, always) or rewritten (in place: a
    client gets one version whole, or its connection is cut)."""

    name: str
    kind: str
    versions: deque[Version] = field(default_factory=lambda: deque(maxlen=4096))

    @property
    def size(self) -> int:
        return self.versions[-1].size


class Site:
    """Makes the folder and keeps changing it while running. Thread-safe."""

    def __init__(self, directory: Path, seed: int, scale: float = 1.0) -> None:
        self._directory = directory
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._scratch = directory.parent / "scratch"
        self._scratch.mkdir()
        directory.mkdir()
        self.replaced = self.rewritten = 0
        self.files: dict[str, File] = {}
        sizes = [0, 1, 1023, 1024, 16383, 16384, 16385, 65536, 65537]
        sizes += [self._random.randrange(2, 60_000) for _ in range(30)]
        sizes += [self._random.randrange(100_000, 2_000_000) for _ in range(10)]
        sizes += [int(16e6 * scale) + 1, int(32e6 * scale) + 77]
        for number, size in enumerate(sizes):
            self._make(File(f"fixed-{number}.bin", "fixed"), size)
        for number in range(8):
            self._make(File(f"renamed-{number}.bin", "renamed"), self._some_size())
        for number in range(4):
            self._make(File(f"rewritten-{number}.bin", "rewritten"), self._random.randrange(1000, 3_000_000))
        with (directory / "huge.bin").open("wb") as file:
            file.truncate(HUGE_BYTES)
            for island in HUGE_ISLANDS:
                file.seek(island)
                file.write(content("huge.bin", 0, island, ISLAND_BYTES))

    def _some_size(self) -> int:
        return self._random.choice([self._random.randrange(1, 60_000), self._random.randrange(60_000, 3_000_000)])

    def _make(self, file: File, size: int) -> None:
        data = content(file.name, 0, 0, size)
        (self._directory / file.name).write_bytes(data)
        file.versions.append(Version(0, size, hashlib.sha256(data).digest(), time.monotonic()))
        self.files[file.name] = file

    def change_one(self) -> None:
        """Replaces or rewrites a file, chosen at random. Called by one thread only."""
        file = self._random.choice([file for file in self.files.values() if file.kind != "fixed"])
        before = file.versions[-1]
        number = before.number + 1
        size = self._some_size() if file.kind == "renamed" else before.size
        data = content(file.name, number, 0, size)
        version = Version(number, size, hashlib.sha256(data).digest(), 0.0)
        path = self._directory / file.name
        if file.kind == "renamed":
            (self._scratch / file.name).write_bytes(data)
            with self._lock:
                version.from_s = time.monotonic()
                file.versions.append(version)
            (self._scratch / file.name).rename(path)
            self.replaced += 1
        else:
            with path.open("r+b") as opened:
                with self._lock:
                    version.from_s = time.monotonic()
                    file.versions.append(version)
                opened.write(data)
            # Who asks while it is being written may see both: no server can tell. So that its time is that of the end:
            os.utime(path)
            self.rewritten += 1
        before.to_s = time.monotonic()

    def candidates(self, name: str, asked_s: float, answered_s: float) -> list[Version]:
        """The versions that a response may have, the newest first."""
        with self._lock:
            versions = list(self.files[name].versions)
        return [
            version
            for version in reversed(versions)
            if version.from_s <= answered_s and version.to_s >= asked_s - STALE_S
        ]

    def being_written(self, name: str, asked_s: float) -> bool:
        """Whether the file was being rewritten in place when it was asked for: then its content is anybody's guess."""
        if self.files[name].kind != "rewritten":
            return False
        with self._lock:
            versions = list(self.files[name].versions)
        return any(
            after.from_s - 0.1 <= asked_s <= before.to_s + 0.1
            for before, after in itertools.pairwise(versions)
        )
