"""Other people's TLS programs as peers, one process for a connection: curl, OpenSSL, GnuTLS and NSS.

Jobs and results are those of peer_programs.py; a server is for one job.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from support.clients import parse_response
from support.peer_programs import Job, installed
from support.waiting import DEADLINE_S, eventually, read_line

OPENSSL_GROUPS = {"x25519": "X25519", "secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}
GNUTLS_GROUPS = {
    "x25519": "GROUP-X25519",
    "secp256r1": "GROUP-SECP256R1",
    "secp384r1": "GROUP-SECP384R1",
    "secp521r1": "GROUP-SECP521R1",
}
GNUTLS_CIPHERS = {
    "TLS_AES_128_GCM_SHA256": "AES-128-GCM",
    "TLS_AES_256_GCM_SHA384": "AES-256-GCM",
    "TLS_CHACHA20_POLY1305_SHA256": "CHACHA20-POLY1305",
}
NSS_GROUPS = {"x25519": "x25519", "secp256r1": "P256", "secp384r1": "P384", "secp521r1": "P521"}
# rsa_pss_pss_* are off by default; Ed25519 it does not have.
NSS_SCHEMES = (
    "ecdsa_secp256r1_sha256",
    "ecdsa_secp384r1_sha384",
    "rsa_pss_rsae_sha256",
    "rsa_pss_rsae_sha384",
    "rsa_pss_pss_sha256",
)
NSS_SUITES = {
    "TLS_AES_128_GCM_SHA256": ":1301",
    "TLS_AES_256_GCM_SHA384": ":1302",
    "TLS_CHACHA20_POLY1305_SHA256": ":1303",
}


def run(command: list[str], stdin: bytes = b"") -> bytes:
    """Standard output; the test fails with what the program said if its exit status is not 0."""
    completed = subprocess.run(command, input=stdin, capture_output=True, timeout=DEADLINE_S, check=False)
    said = (completed.stderr + completed.stdout[-2000:]).decode(errors="replace")
    assert completed.returncode == 0, f"{' '.join(command)}: status {completed.returncode}\n{said}"
    return completed.stdout


def request(job: Job) -> bytes:
    return f"GET {job['path']} HTTP/1.1\r\nHost: {job['name']}\r\nConnection: close\r\n\r\n".encode()


def result(output: bytes, resumed: bool = False) -> Job:
    response = parse_response(output[output.index(b"HTTP/1.1") :])
    digest = hashlib.sha256(response.body).hexdigest()
    return {"error": "", "status": response.status, "sha256": digest, "resumed": resumed}


# --- clients


def curl(job: Job) -> Job:
    output = run([
        installed("curl", "Debian"), "--silent", "--show-error", "--include", "--tlsv1.3", "--cacert", job["ca"],
        "--resolve", f"{job['name']}:{job['port']}:127.0.0.1", "--tls13-ciphers", ":".join(job["suites"]),
        "--curves", ":".join(OPENSSL_GROUPS[group] for group in job["groups"]),
        f"https://{job['name']}:{job['port']}{job['path']}",
    ])  # fmt: skip
    return result(output)


def s_client(job: Job) -> Job:
    command = [
        installed("openssl", "Debian"), "s_client", "-connect", f"127.0.0.1:{job['port']}", "-tls1_3",
        "-servername", job["name"], "-verify_hostname", job["name"], "-CAfile", job["ca"], "-verify_return_error",
        "-ciphersuites", ":".join(job["suites"]),
        "-groups", ":".join(OPENSSL_GROUPS[group] for group in job["groups"]), "-ign_eof",
    ]  # fmt: skip
    if job["certificate"]:
        command += ["-cert", job["certificate"], "-key", job["key"]]
    with tempfile.TemporaryDirectory() as folder:
        session = f"{folder}/session"
        if job["resume"]:
            run([*command, "-sess_out", session], request(job))
            command += ["-sess_in", session]
        output = run(command, request(job))
    start = output.index(b"HTTP/1.1")
    head = output[start : output.index(b"\r\n\r\n", start)]
    length = len(head) + 4 + int(re.search(rb"(?i)content-length: (\d+)", head)[1])
    resumed = re.search(rb"^Reused, TLSv1.3", output, re.MULTILINE) is not None
    # Tickets are printed in between; -quiet would hide them, and whether the session was resumed.
    body = re.sub(
        rb"---\nPost-Handshake New Session Ticket arrived:\n.*?\n---\nread R BLOCK\n",
        b"",
        output[start:],
        flags=re.DOTALL,
    )
    return result(body[:length], resumed)


def gnutls_cli(job: Job) -> Job:
    priority = ":".join([
        "NORMAL:-VERS-ALL:+VERS-TLS1.3:-CIPHER-ALL", *(f"+{GNUTLS_CIPHERS[suite]}" for suite in job["suites"]),
        "-GROUP-ALL", *(f"+{GNUTLS_GROUPS[group]}" for group in job["groups"]),
    ])  # fmt: skip
    command = [
        installed("gnutls-cli", "Debian's gnutls-bin"), "--logfile", "/dev/stderr", "--x509cafile", job["ca"],
        "--sni-hostname", job["name"], "--verify-hostname", job["name"], "--priority", priority,
        "--single-key-share", "--port", str(job["port"]), "127.0.0.1",
    ]  # fmt: skip
    if job["certificate"]:
        command += ["--x509certfile", job["certificate"], "--x509keyfile", job["key"]]
    if job["resume"]:
        command += ["--resume", "--waitresumption"]
    completed = subprocess.run(command, input=request(job), capture_output=True, timeout=DEADLINE_S, check=False)
    assert completed.returncode == 0, completed.stderr.decode(errors="replace")
    return result(completed.stdout, b"This is a resumed session" in completed.stderr)


class NssDatabase:
    """NSS's certificates and keys, in a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = f"sql:{folder}"
        self._folder = folder
        run([installed("certutil", "Debian's libnss3-tools"), "-N", "-d", self.path, "--empty-password"])

    def trust(self, pem: bytes) -> None:
        for number, block in enumerate(re.findall(rb"-----BEGIN C.*?-----END CERTIFICATE-----\n", pem, re.DOTALL)):
            file = self._folder / f"ca-{number}.pem"
            file.write_bytes(block)
            run(["certutil", "-A", "-d", self.path, "-n", f"ca-{number}", "-t", "CT,C,C", "-i", str(file)])

    def identity(self, nickname: str, certificate: str, key: str) -> None:
        """Takes a certificate and its key."""
        file = str(self._folder / "identity.p12")
        run([
            "openssl", "pkcs12", "-export", "-in", certificate, "-inkey", key, "-name", nickname, "-out", file,
            "-passout", "pass:password",
        ])  # fmt: skip
        run(["pk12util", "-i", file, "-d", self.path, "-W", "password"])


def tstclnt(job: Job) -> Job:
    """Needs `database` in the job, an NssDatabase that trusts the authority (and has the identity "client").

    No resumption: with -L, Debian 12's tstclnt ends in "free(): invalid pointer" behind its first connection.
    """
    with tempfile.NamedTemporaryFile() as file:
        file.write(request(job))
        file.flush()
        command = [
            installed("tstclnt", "Debian's libnss3-tools"), "-h", "127.0.0.1", "-p", str(job["port"]),
            "-a", job["name"], "-d", job["database"].path, "-V", "tls1.3:tls1.3", "-J", ",".join(NSS_SCHEMES),
            "-c", "".join(NSS_SUITES[suite] for suite in job["suites"]),
            "-I", ",".join(NSS_GROUPS[group] for group in job["groups"]), "-A", file.name,
        ]  # fmt: skip
        if job["certificate"]:
            command += ["-n", "client"]
        completed = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=DEADLINE_S, check=False
        )
    said = (completed.stderr + completed.stdout).decode(errors="replace")
    assert completed.returncode == 0, f"{' '.join(command)}: status {completed.returncode}\n{said}"
    return result(completed.stdout)


CLIENTS: dict[str, Callable[[Job], Job]] = {
    "curl": curl,
    "s_client": s_client,
    "gnutls-cli": gnutls_cli,
    "tstclnt": tstclnt,
}


# --- servers, which answer a request for a page with one


@contextmanager
def _started(command: list[str], ready: bytes) -> Iterator[tuple[int, bytes]]:
    """A server whose line that contains `ready` is there: its pid, and that line."""
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
    )
    assert process.stdout is not None and process.stdin is not None
    try:
        line = b""
        while ready not in line:
            line = read_line(process.stdout, f"{ready!r} of {command[0]}")
            assert line, f"{' '.join(command)} ended"
        yield process.pid, line
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stdin.close()


def _listening_port(pid: int) -> int:
    """The port that a process listens on, IPv4 first, 0 while there is none."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(str(descriptor.readlink()))
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                return int(fields[1].rpartition(":")[2], 16)
    return 0


@contextmanager
def s_server(job: Job) -> Iterator[int]:
    command = [
        installed("openssl", "Debian"), "s_server", "-accept", "127.0.0.1:0", "-tls1_3", "-www",
        "-cert", job["certificate"], "-key", job["key"], "-ciphersuites", ":".join(job["suites"]),
        "-groups", ":".join(OPENSSL_GROUPS[group] for group in job["groups"]),
    ]  # fmt: skip
    if job["client_ca"]:
        command += ["-CAfile", job["client_ca"], "-Verify", "1", "-verify_return_error"]
    with _started(command, b"ACCEPT") as (_, line):
        yield int(line.rsplit(b":", 1)[1])


@contextmanager
def gnutls_serv(job: Job) -> Iterator[int]:
    priority = ":".join([
        "NORMAL:-VERS-ALL:+VERS-TLS1.3:-CIPHER-ALL", *(f"+{GNUTLS_CIPHERS[suite]}" for suite in job["suites"]),
        "-GROUP-ALL", *(f"+{GNUTLS_GROUPS[group]}" for group in job["groups"]),
    ])  # fmt: skip
    command = [
        installed("gnutls-serv", "Debian's gnutls-bin"), "--http", "--port", "0", "--priority", priority,
        "--x509certfile", job["certificate"], "--x509keyfile", job["key"],
    ]  # fmt: skip
    if job["client_ca"]:
        command += ["--x509cafile", job["client_ca"], "--require-client-cert", "--verify-client-cert"]
    with _started(command, b"listening on IPv4") as (pid, _):
        yield eventually(lambda: _listening_port(pid), "the port of gnutls-serv")


@contextmanager
def selfserv(job: Job) -> Iterator[int]:
    """It must be told a port: one that the kernel has just given and got back."""
    with tempfile.TemporaryDirectory() as folder:
        database = NssDatabase(Path(folder))
        database.identity("server", job["certificate"], job["key"])
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = int(listening.getsockname()[1])
        kind = "-n" if job["rsa"] else "-e"
        command = [
            installed("selfserv", "Debian's libnss3-tools"), kind, "server", "-p", str(port), "-d", database.path,
            "-V", "tls1.3:tls1.3", "-u", "-v", "-H", "1", "-c", "".join(NSS_SUITES[suite] for suite in job["suites"]),
            "-I", ",".join(NSS_GROUPS[group] for group in job["groups"]),
        ]  # fmt: skip
        if job["client_ca"]:
            database.trust(Path(job["client_ca"]).read_bytes())
            command += ["-r", "-r"]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            eventually(lambda: process.poll() is not None or _listening_port(process.pid), "selfserv listens")
            assert process.poll() is None, f"{' '.join(command)} ended"
            yield port
        finally:
            process.kill()
            process.wait()


Server = Callable[[Job], contextlib.AbstractContextManager[int]]
SERVERS: dict[str, Server] = {"s_server": s_server, "gnutls-serv": gnutls_serv, "selfserv": selfserv}
