"""Examples of docs/libtls.md run as they are printed, but for names, ports and whom to trust."""

from __future__ import annotations

import contextlib
import io
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.certificates import Issued
from support.daemon import Daemon
from support.waiting import DEADLINE_S, eventually

DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs" / "libtls.md"


def example(containing: str, **replaced: str) -> str:
    """The one code block with this text in it, each key's text (underscores as they are printed) replaced."""
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    [block] = [block for block in blocks if containing in block]
    for old, new in replaced.items():
        assert old in block
        block = block.replace(old, new)
    return block


@contextlib.contextmanager
def program(daemon: Daemon, source: str) -> Iterator[subprocess.Popen[bytes]]:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "KDAEMON_SOCKET": daemon.socket_path,
        "SSL_CERT_FILE": str(daemon.ca),
    }
    command = [sys.executable, "-u", "-c", source]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def output(daemon: Daemon, source: str) -> bytes:
    with program(daemon, source) as process:
        out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, err.decode()
    return out


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def connected(port: int) -> socket.socket | None:
    with contextlib.suppress(ConnectionRefusedError):
        return socket.create_connection(("127.0.0.1", port), DEADLINE_S)
    return None


def test_no_example_is_left_out() -> None:
    """Each is a file of docs/examples, which test_docs_examples.py runs, or one that is run here."""
    files = {path.read_text() for path in (DOCUMENT.parent / "examples").iterdir()}
    run_here = [text for _, text in re.findall(r"""example\(\s*(["'])(.*?)\1""", Path(__file__).read_text())]
    for block in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL):
        assert block in files or any(text in block for text in run_here), block


def test_starttls_as_client(daemon: Daemon, issued: Issued) -> None:
    """A mail server by Python's ssl that greets, knows STARTTLS, and then says who it is."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(issued.certificate, issued.key)

    def session(plain: socket.socket) -> None:
        plain.sendall(b"220 ready\r\n")
        lines = io.BufferedReader(socket.SocketIO(plain, "r"), 1)
        assert lines.readline() == b"EHLO me.example.org\r\n"
        plain.sendall(b"250-hello\r\n250 STARTTLS\r\n")
        assert lines.readline() == b"STARTTLS\r\n"
        plain.sendall(b"220 go ahead\r\n")
        with context.wrap_socket(plain, server_side=True) as tls:
            assert tls.recv(100) == b"EHLO me.example.org\r\n"
            tls.sendall(b"250 sealed\r\n")
            assert tls.recv(100) == b"QUIT\r\n"

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: session(listener.accept()[0]), daemon=True)
        thread.start()
        source = example(
            '"mail.example.org", 25',
            **{
                '"mail.example.org", 25': f'"127.0.0.1", {listener.getsockname()[1]}',
                'tls_start(mail, "mail.example.org")': f'tls_start(mail, "localhost", cafile={str(daemon.ca)!r})',
            },
        )
        assert output(daemon, source).splitlines() == [b"b'220 ready\\r\\n'", b"250 sealed", b""]
        thread.join(DEADLINE_S)


def test_starttls_by_asyncio(daemon: Daemon) -> None:
    port = free_port()
    with program(daemon, example("async def session", **{"8446": str(port)})):
        plain = eventually(lambda: connected(port), "the server listens")
        assert plain is not None
        assert plain.recv(100) == b"220 ready\r\n"
        plain.sendall(b"STARTTLS\r\n")
        assert plain.recv(100) == b"220 go ahead\r\n"
        context = ssl.create_default_context(cafile=str(daemon.ca))
        with context.wrap_socket(plain, server_hostname="localhost") as tls:
            assert tls.recv(100) == b"hello over TLS\n"


def test_a_protocol(daemon: Daemon) -> None:
    port = free_port()
    with program(daemon, example("class Shout", **{"8447": str(port)})):
        plain = eventually(lambda: connected(port), "the server listens")
        assert plain is not None
        context = ssl.create_default_context(cafile=str(daemon.ca))
        with context.wrap_socket(plain, server_hostname="localhost") as tls:
            tls.sendall(b"hello")
            assert tls.recv(100) == b"HELLO"


def test_adopt(daemon: Daemon) -> None:
    port = free_port()
    with program(daemon, example("tls_adopt(accepted)", **{"8445": str(port)})):
        plain = eventually(lambda: connected(port), "the program listens")
        assert plain is not None
        context = ssl.create_default_context(cafile=str(daemon.ca))
        with context.wrap_socket(plain, server_hostname="localhost") as tls:
            assert tls.recv(100) == b"hello over TLS\n"
            assert tls.recv(100) == b""


def test_export(daemon: Daemon) -> None:
    if daemon.ready[0].backend != "kernel":
        pytest.skip("only kernel TLS can be exported")
    printed = output(daemon, example("tls_export", **{"8443": str(daemon.port), "ca.pem": str(daemon.ca)}))
    assert printed.startswith(b"HTTP/1.1 200 OK")
    assert b"<title>kdaemon</title>" in printed


def test_http_client(daemon: Daemon) -> None:
    trust = f"cafile={str(daemon.ca)!r}, "
    source = example(
        "http.client",
        **{'TlsSocket.open("example.org", 443, ': f'TlsSocket.open("localhost", {daemon.port}, {trust}'},
    )
    assert b"<title>kdaemon</title>" in output(daemon, source)


def test_httpx_async_client(daemon: Daemon) -> None:
    trust = f"verify=__import__('ssl').create_default_context(cafile={str(daemon.ca)!r})"
    source = example(
        "httpx.AsyncClient",
        **{
            "httpx_async_transport()": f"httpx_async_transport({trust})",
            "https://example.org/": f"https://localhost:{daemon.port}/",
        },
    )
    assert b"<title>kdaemon</title>" in output(daemon, source)
