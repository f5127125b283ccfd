"""The daemon under test: started in a control group of its own, watched from outside."""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from benchmarks.serving.accounting import Account, account

DEADLINE_S = 120.0  # of a start or an end, in an emulated guest
TROUBLE = re.compile(rb"Traceback|Exception ignored|Sanitizer|runtime error:|Segmentation|assert", re.IGNORECASE)


class ServerError(Exception):
    """The daemon did not start, did not end as it should, or said something ugly."""


def make_certificate(directory: Path) -> tuple[Path, Path]:
    """Self-signed, ECDSA P-256, for localhost: the certificate (which also verifies it) and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    addresses = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName(addresses), critical=False)
        .sign(key, hashes.SHA256())
    )
    chain, private = directory / "cert.pem", directory / "key.pem"
    chain.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private.touch(mode=0o600)
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return chain, private


@dataclass
class Sample:
    """What the daemon holds at one moment."""

    memory_bytes: int  # control group: anonymous, shared and kernel memory
    pss_bytes: int  # proportional set size of all processes, without what is mapped: others may have that mapped, too
    descriptors: int  # without the next
    files: int  # descriptors of the site's files, which the daemon remembers
    mappings: int
    threads: int
    pids: tuple[int, ...]

    def __str__(self) -> str:
        return (
            f"{self.memory_bytes / 1e6:7.2f} MB in the group, {self.pss_bytes / 1e6:7.2f} MB PSS, "
            f"{self.descriptors} descriptors + {self.files} files, {self.mappings} mappings, {self.threads} threads, "
            f"{len(self.pids)} processes"
        )


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    account: Account
    address: tuple[str, int]
    ca: Path
    backend: str
    state: Path
    site: Path

    @property
    def stderr(self) -> bytes:
        return (self.state / "stderr").read_bytes()

    def pids(self) -> list[int]:
        return sorted(self.account.pids())

    def sample(self) -> Sample:
        pss = descriptors = files = mappings = threads = 0
        pids = self.pids()
        for pid in pids:
            process = Path(f"/proc/{pid}")
            for line in (process / "smaps_rollup").read_text().splitlines():
                if line.startswith("Pss_Anon:"):
                    pss += int(line.split()[1]) * 1024
            for descriptor in (process / "fd").iterdir():
                if str(descriptor.readlink()).startswith(f"{self.site}/"):
                    files += 1
                else:
                    descriptors += 1
            mappings += len((process / "maps").read_text().splitlines())
            threads += len(list((process / "task").iterdir()))
        return Sample(self.account.memory_bytes(), pss, descriptors, files, mappings, threads, tuple(pids))

    def status(self) -> dict[str, Any]:
        """`kdaemon ctl status --json`."""
        completed = subprocess.run(
            [sys.executable, "-m", "kdaemon", "ctl", "status", "--json"],
            env=_environment(self.state),
            capture_output=True,
            timeout=DEADLINE_S,
            check=False,
        )
        if completed.returncode:
            raise ServerError(f"ctl status: {completed.stderr.decode()}")
        found: dict[str, Any] = json.loads(completed.stdout)
        return found

    def workers(self) -> list[int]:
        return [worker["pid"] for worker in self.status()["workers"]]

    def connections(self) -> int:
        return sum(worker.get("connections", 0) for worker in self.status()["workers"])

    def resident_buffers(self) -> int:
        names = ("buffers_resident", "receive_buffers_resident")
        return sum(worker["engine"][name] for worker in self.status()["workers"] for name in names)

    def wait_until_idle(self) -> None:
        """Until no worker has a connection."""
        wait_for(lambda: self.connections() == 0, "the daemon has closed every connection")

    def wait_until_at_rest(self) -> None:
        """Idle, and until the pages of the buffers that a peak needed have been given back."""
        self.wait_until_idle()
        wait_for(lambda: self.resident_buffers() == 0, "idle workers have given back the pages of their buffers")


def wait_for(question: Any, what: str, deadline_s: float = DEADLINE_S) -> None:
    end = time.monotonic() + deadline_s
    while not question():
        if time.monotonic() > end:
            raise ServerError(f"not within {deadline_s:g} s: {what}")
        time.sleep(0.05)


def _environment(state: Path) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("KDAEMON_", "SSL", "XDG_"))}
    return inherited | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "XDG_RUNTIME_DIR": str(state),
        "XDG_STATE_HOME": str(state),
        "HOME": str(state),
    }


@contextmanager
def running(
    site: Path, state: Path, *, workers: int, ktls: str, configuration: str, files_max: int = 0
) -> Iterator[Server]:
    """A daemon, ready; stopped by SIGTERM at the end, which must be clean. `files_max`: its limit of open files."""
    state.mkdir()
    chain, key = make_certificate(state)
    (state / "kdaemon.toml").write_text(configuration)

    def enter() -> None:
        used.enter()
        if files_max:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files_max, files_max))

    used = account(f"kdaemon-robustness-{os.getpid()}-{state.name}")
    command = [
        sys.executable, "-m", "kdaemon", "serve", str(site), "--listen", "127.0.0.1:0", "--cert", str(chain),
        "--key", str(key), "--config", str(state / "kdaemon.toml"), "--workers", str(workers), "--ktls", ktls,
    ]  # fmt: skip
    try:
        with (state / "stderr").open("wb") as stderr:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                bufsize=0,
                env=_environment(state),
                preexec_fn=enter,  # noqa: PLW1509 - no other thread is running yet
                start_new_session=True,
            )
        used.started(process.pid)
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], DEADLINE_S)
        line = process.stdout.readline() if readable else b""
        match = re.match(rb"ready https://([\d.]+):(\d+)/ backend=(\w+)", line)
        if match is None:
            process.kill()
            raise ServerError(f"not ready: {line!r}; it said:\n{(state / 'stderr').read_text()}")
        host, port, backend = (group.decode() for group in match.groups())
        server = Server(process, used, (host, int(port)), chain, backend, state, site)
        try:
            yield server
            _end(server)
        finally:
            process.stdout.close()
            if process.poll() is None:
                process.kill()
                process.wait()
    finally:
        for pid in used.pids():
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not used.pids(), "the daemon's processes have ended")
        used.close()


def _end(server: Server) -> None:
    server.process.terminate()
    try:
        status = server.process.wait(DEADLINE_S)
    except subprocess.TimeoutExpired:
        raise ServerError(f"no end within {DEADLINE_S:g} s of SIGTERM; it said:\n{server.stderr.decode()}") from None
    if status != 0:
        raise ServerError(f"exit status {status}; it said:\n{server.stderr.decode()}")
    if TROUBLE.search(server.stderr):
        raise ServerError(f"it said:\n{server.stderr.decode()}")
