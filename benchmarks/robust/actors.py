"""The mixed load: what clients do to a server, well-behaved and not, each response checked byte for byte."""

from __future__ import annotations

import hashlib
import random
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.robust.client import Connection, CutError, Response, WrongError, context
from benchmarks.robust.content import HUGE_BYTES, HUGE_ISLANDS, Site, content, huge_content

SLOW_READER_S = 15.0
FAULTS_MAX = 50
LARGE_BYTES = 4_000_000


@dataclass
class Tally:
    """What happened; shared by all threads."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, what: str, number: int = 1) -> None:
        with self.lock:
            self.counts[what] += number

    def fault(self, what: str) -> None:
        with self.lock:
            self.counts["faults"] += 1
            if len(self.faults) < FAULTS_MAX:
                self.faults.append(f"{time.strftime('%H:%M:%S')} {what}")


class Load:
    """Runs actors in threads until told to pause or to stop. `header_s`: the daemon's deadline for a request's head."""

    def __init__(self, address: tuple[str, int], ca: Path, site: Site, seed: int, header_s: float) -> None:
        self.tally = Tally()
        self._address = address
        self._tls = context(ca)
        self._site = site
        self._seed = seed
        self._header_s = header_s
        self._running = threading.Event()
        self._stopped = False
        self._idle = threading.Condition()
        self._busy = 0
        self._threads: list[threading.Thread] = []

    def start(self, threads: int) -> None:
        slow: list[Callable[[random.Random], None]] = [self._read_slowly, self._write_slowly]
        for number in range(threads):
            actors = slow if number % 4 == 0 else self._quick()
            thread = threading.Thread(target=self._run, args=(random.Random(self._seed + number), actors), daemon=True)
            self._threads.append(thread)
            thread.start()
        changer = threading.Thread(target=self._change, daemon=True)
        self._threads.append(changer)
        changer.start()
        self.resume()

    def _quick(self) -> list[Callable[[random.Random], None]]:
        return [
            self._new, self._new, self._resumed, self._resumed, self._keep_alive, self._keep_alive, self._pipeline,
            self._ranges, self._ranges, self._abort, self._abort, self._changing, self._changing, self._conditions,
            self._body,
        ]  # fmt: skip

    def resume(self) -> None:
        self._running.set()

    def pause(self) -> None:
        """Returns when every actor has finished what it was doing and closed its connections."""
        self._running.clear()
        with self._idle:
            self._idle.wait_for(lambda: self._busy == 0)

    def stop(self) -> None:
        self._stopped = True
        self.resume()
        for thread in self._threads:
            thread.join()

    def _run(self, chance: random.Random, actors: list[Callable[[random.Random], None]]) -> None:
        while True:
            self._running.wait()
            if self._stopped:
                return
            with self._idle:
                self._busy += 1
            actor = chance.choice(actors)
            try:
                actor(chance)
                self.tally.count(actor.__name__.lstrip("_"))
            except (WrongError, CutError, OSError, ValueError, KeyError) as error:
                self.tally.fault(f"{actor.__name__}: {type(error).__name__}: {error}")
            with self._idle:
                self._busy -= 1
                self._idle.notify_all()

    def _change(self) -> None:
        chance = random.Random(self._seed - 1)
        while not self._stopped:
            self._running.wait()
            self._site.change_one()
            time.sleep(chance.uniform(0.02, 0.2))

    # Checking

    def _open(self, session: ssl.SSLSession | None = None, receive_buffer: int = 0) -> Connection:
        connection = Connection(self._address, self._tls, session, receive_buffer)
        self.tally.count("connections resumed" if connection.socket.session_reused else "connections full")
        return connection

    def _name(self, chance: random.Random, kind: str = "") -> str:
        names = [file.name for file in self._site.files.values() if not kind or file.kind == kind]
        name = chance.choice(names)
        # The largest seldom: they would be all that is left of the load.
        return name if self._site.files[name].size < LARGE_BYTES or chance.random() < 0.2 else chance.choice(names)

    def _check(self, name: str, response: Response, first: int | None = None) -> None:
        """The body is a version of the file, whole or from `first` on, that was there in the time of the request."""
        self.tally.count("responses")
        self.tally.count("bytes", len(response.body))
        expected_status = 200 if first is None else 206
        if response.status != expected_status:
            raise WrongError(f"{name}: status {response.status}, not {expected_status}")
        candidates = self._site.candidates(name, response.asked_s, response.answered_s)
        if first is None:
            digest = hashlib.sha256(response.body).digest()
            if any(version.sha256 == digest for version in candidates):
                self.tally.count("bodies equal by SHA-256")
                return
        else:
            for version in candidates:
                if content(name, version.number, first, len(response.body)) == response.body:
                    self.tally.count("ranges equal")
                    return
        if self._site.being_written(name, response.asked_s):
            self.tally.count("asked while being rewritten")
            return
        self.tally.count("WRONG BODIES")
        raise WrongError(f"{name}: {len(response.body)} bytes from {first} are none of versions "
                         f"{[version.number for version in candidates]}")  # fmt: skip

    def _get(self, connection: Connection, name: str, *headers: str) -> Response:
        connection.ask(name, *headers)
        response = connection.response()
        self._check(name, response)
        return response

    def _get_or_cut(self, connection: Connection, name: str, *headers: str) -> bool:
        """False: cut, as it must be where the file was rewritten in place meanwhile."""
        try:
            self._get(connection, name, *headers)
        except CutError:
            if self._site.files[name].kind != "rewritten":
                raise
            self.tally.count("cut because rewritten")
            return False
        return True

    # The actors, one session each

    def _new(self, chance: random.Random) -> None:
        with self._open() as connection:
            if self._get_or_cut(connection, self._name(chance), "Connection: close"):
                connection.end()

    def _resumed(self, chance: random.Random) -> None:
        session = None
        for _ in range(chance.randrange(2, 6)):
            with self._open(session) as connection:
                self._get(connection, self._name(chance, "fixed"), "Connection: close")
                connection.end()
                session = connection.socket.session

    def _keep_alive(self, chance: random.Random) -> None:
        with self._open() as connection:
            for _ in range(chance.randrange(1, 40)):
                name = self._name(chance)
                if chance.random() < 0.15:
                    connection.ask(name, method="HEAD")
                    response = connection.response()
                    sizes = [
                        version.size
                        for version in self._site.candidates(name, response.asked_s, response.answered_s)
                    ]
                    if int(response.headers["content-length"]) not in sizes:
                        raise WrongError(f"HEAD {name}: {response.headers['content-length']} bytes, not one of {sizes}")
                elif chance.random() < 0.1:
                    connection.ask("is-not-there", method=chance.choice(["GET", "HEAD"]))
                    if (response := connection.response()).status != 404:
                        raise WrongError(f"a missing file is {response.status}")
                elif not self._get_or_cut(connection, name):
                    return

    def _pipeline(self, chance: random.Random) -> None:
        with self._open() as connection:
            names = [self._name(chance, chance.choice(["fixed", "renamed"])) for _ in range(chance.randrange(2, 12))]
            connection.send(b"".join(connection.request(name) for name in names))
            for name in names:
                self._check(name, connection.response())

    def _ranges(self, chance: random.Random) -> None:
        with self._open() as connection:
            for _ in range(chance.randrange(1, 10)):
                if chance.random() < 0.25:
                    first = max(0, chance.choice(HUGE_ISLANDS) - chance.randrange(70_000))
                    length = min(chance.randrange(1, 150_000), HUGE_BYTES - first)
                    connection.ask("huge.bin", f"Range: bytes={first}-{first + length - 1}")
                    response = connection.response()
                    self.tally.count("responses")
                    if response.status != 206 or response.body != huge_content(first, length):
                        raise WrongError(f"huge.bin from {first}: status {response.status}, other bytes")
                    self.tally.count("ranges equal")
                    continue
                name = self._name(chance, "fixed")
                size = self._site.files[name].size
                if size < 2:
                    continue
                first = chance.randrange(size)
                last = chance.randrange(first, size)
                if chance.random() < 0.3:
                    last = size - 1
                    connection.ask(name, f"Range: bytes=-{size - first}")
                else:
                    connection.ask(name, f"Range: bytes={first}-{last}")
                response = connection.response()
                if response.headers.get("content-range") != f"bytes {first}-{last}/{size}":
                    raise WrongError(f"{name}: Content-Range {response.headers.get('content-range')}")
                self._check(name, response, first)
                if len(response.body) != last - first + 1:
                    raise WrongError(f"{name}: {len(response.body)} bytes, not {last - first + 1}")

    def _abort(self, chance: random.Random) -> None:
        connection = self._open()
        # Of what is aborted there is always more to come.
        large = max(self._site.files.values(), key=lambda file: file.size).name
        connection.ask(large if chance.random() < 0.5 else "huge.bin")
        for _ in range(chance.randrange(0, 12)):
            if not connection.socket.recv(chance.randrange(1, 65536)):
                break
        if chance.random() < 0.5:
            connection.reset()
        else:
            connection.socket.close()
        self.tally.count("aborts")

    def _changing(self, chance: random.Random) -> None:
        with self._open() as connection:
            for _ in range(chance.randrange(1, 6)):
                if not self._get_or_cut(connection, self._name(chance, chance.choice(["renamed", "rewritten"]))):
                    return

    def _conditions(self, chance: random.Random) -> None:
        with self._open() as connection:
            name = self._name(chance, "fixed")
            tag = self._get(connection, name).headers["etag"]
            connection.ask(name, f"If-None-Match: {tag}")
            if (response := connection.response()).status != 304 or response.headers.get("etag") != tag:
                raise WrongError(f"{name}: If-None-Match gives {response.status}")
            connection.ask(name, 'If-Match: "something else"')
            if (response := connection.response()).status != 412:
                raise WrongError(f"{name}: If-Match gives {response.status}")
            renamed = self._name(chance, "renamed")
            tag = self._get(connection, renamed).headers["etag"]
            connection.ask(renamed, f"If-Range: {tag}", "Range: bytes=0-")
            response = connection.response()
            # Another version is sent whole, and so is one too young for a strong tag (RFC 9110, section 13.1.5).
            self._check(renamed, response, 0 if response.status == 206 else None)
            if (response.headers["etag"] == tag and not tag.startswith("W/")) != (response.status == 206):
                raise WrongError(f"{renamed}: If-Range gives {response.status} with {response.headers['etag']}")

    def _body(self, chance: random.Random) -> None:
        with self._open() as connection:
            name = self._name(chance, "fixed")
            if chance.random() < 0.5:
                sizes = (1, 1000, chance.randrange(1, 50_000))
                body = b"".join(b"%x\r\n%b\r\n" % (size, bytes(size)) for size in sizes)
                connection.send(connection.request(name, "Transfer-Encoding: chunked") + body + b"0\r\n\r\n")
            else:
                size = chance.randrange(0, 500_000)
                connection.send(connection.request(name, f"Content-Length: {size}") + bytes(size))
            self._check(name, connection.response())
            self._get(connection, name)

    def _read_slowly(self, chance: random.Random) -> None:
        until_s = time.monotonic() + SLOW_READER_S
        with self._open(receive_buffer=chance.choice([2048, 4096, 16384])) as connection:
            name = self._name(chance, chance.choice(["fixed", "renamed"]))
            connection.ask(name)
            try:
                piece = chance.choice([700, 4096, 16384, 60_000])
                response = connection.response(
                    piece,
                    chance.choice([0.0, 0.001, 0.01]),
                    lambda: time.monotonic() > until_s or not self._running.is_set(),
                )
            except CutError as error:
                if str(error) != "impatience":
                    raise
                self.tally.count("slow readers that left")
                return
            self._check(name, response)
            self.tally.count("slow readers served")

    def _write_slowly(self, chance: random.Random) -> None:
        with self._open() as connection:
            name = self._name(chance, "fixed")
            request = connection.request(name)
            for offset in range(0, len(request) - 1, 8):
                connection.send(request[offset : min(offset + 8, len(request) - 1)])
                time.sleep(chance.uniform(0.0, 0.05))
            if chance.random() < 0.2:
                # It stalls before the last byte: 408 at the deadline, then the end.
                if (response := connection.response()).status != 408:
                    raise WrongError(f"a head that stalls is answered with {response.status}")
                waited_s = response.answered_s - connection.opened_s
                if waited_s < self._header_s - 0.5:
                    raise WrongError(f"408 after {waited_s:.1f} s, before the deadline of {self._header_s:g} s")
                self.tally.count("stalled heads answered with 408")
                return
            connection.send(request[-1:])
            response = connection.response()
            if response.status == 408 and response.answered_s - connection.opened_s >= self._header_s - 0.5:
                self.tally.count("writers slower than they meant to be, answered with 408")
                return
            self._check(name, response)

    def check_everything(self) -> None:
        """Every file once on one connection: what is remembered of them is then the same each time."""
        with self._open() as connection:
            for name in self._site.files:
                self._get(connection, name)
