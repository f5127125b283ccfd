"""Sites that ask their clients for a certificate: curl, openssl, Python's ssl and `kdaemon connect` are asked."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support.certificates import Issued, issue
from support.daemon import Daemon, control, environment, serve, status
from support.waiting import DEADLINE_S, eventually


class Setting(NamedTuple):
    daemon: Daemon
    client: Issued  # what the sites that ask believe
    stranger: Issued
    expired: Issued
    file: Path  # the configuration


@pytest.fixture(params=["off", pytest.param("require", marks=pytest.mark.guest)])
def setting(request: pytest.FixtureRequest, issued: Issued, tmp_path: Path) -> Iterator[Setting]:
    client = issue(tmp_path / "client", names=["client.test"], client_only=True, intermediates=1)
    stranger = issue(tmp_path / "stranger", names=["client.test"])
    expired = issue(tmp_path / "expired", names=["client.test"], expired=True)
    authorities = tmp_path / "authorities.pem"
    authorities.write_bytes(client.ca.read_bytes() + expired.ca.read_bytes())
    text = "workers = 1\n"
    for name, rules in (
        ("open", ""),
        ("closed", f'client_ca = "{authorities}"'),
        ("ajar", f'client_ca = "{authorities}"\nclient_certificate = "request"'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.html").write_text(name)
        text += f'[[site]]\nroot = "{name}"\nnames = ["{name}.test"]\n{rules}\n'
    file = tmp_path / "kdaemon.toml"
    file.write_text(text)
    with serve(None, "--config", str(file), "--ktls", request.param, issued=issued) as daemon:
        yield Setting(daemon, client, stranger, expired, file)


def curl(setting: Setting, site: str, own: Issued | None, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    port = setting.daemon.port
    command = [
        "curl",
        "-sS",
        "-k",
        "--max-time",
        str(DEADLINE_S),
        "--connect-to",
        f"{site}.test:{port}:127.0.0.1:{port}",
    ]
    command += own.arguments if own else []
    return subprocess.run([*command, *arguments, f"https://{site}.test:{port}/"], capture_output=True, check=False)


def failures(daemon: Daemon) -> dict[str, int]:
    workers = status(daemon)["workers"]
    assert isinstance(workers, list)
    return dict(workers[0]["handshake_failures"])


def test_who_is_let_in(setting: Setting) -> None:
    daemon = setting.daemon
    for site, own, body in (
        ("open", None, b"open"), ("open", setting.stranger, b"open"), ("closed", setting.client, b"closed"),
        ("ajar", None, b"ajar"), ("ajar", setting.client, b"ajar"),
    ):  # fmt: skip
        done = curl(setting, site, own)
        assert (done.returncode, done.stdout) == (0, body), done.stderr
    for site, own, said, fact in (
        ("closed", None, b"certificate required", "CertificateRequired"),
        ("closed", setting.stranger, b"unknown ca", "UnknownCertificateAuthority"),
        ("ajar", setting.stranger, b"unknown ca", "UnknownCertificateAuthority"),
        ("closed", setting.expired, b"certificate expired", "CertificateExpired"),
    ):
        before = failures(daemon).get(fact, 0)
        done = curl(setting, site, own)
        assert done.returncode != 0
        assert done.stdout == b""
        assert said in done.stderr.lower()
        eventually(lambda fact=fact, before=before: failures(daemon).get(fact, 0) == before + 1, f"{fact} is counted")


def test_no_way_round_by_host(setting: Setting) -> None:
    """A connection that was made for another site, or without a name, gets none of this one's files."""
    done = curl(setting, "open", None, "-H", "Host: closed.test", "-w", "%{http_code}")
    assert done.stdout.endswith(b"421")
    assert b"closed" not in done.stdout
    for host in ("closed.test", "ajar.test"):
        nameless = subprocess.run(
            [
                "curl", "-sS", "-k", "--max-time", str(DEADLINE_S), "-H", f"Host: {host}", "-w", "%{http_code}",
                setting.daemon.url,
            ],
            capture_output=True, check=True,
        )  # fmt: skip
        assert nameless.stdout.endswith(b"421")
        assert host[:4].encode() not in nameless.stdout


def test_who_names_no_server_is_asked_by_the_nameless_site(issued: Issued, tmp_path: Path) -> None:
    client = issue(tmp_path / "client", names=["client.test"], client_only=True)
    (tmp_path / "index.html").write_text("all others")
    file = tmp_path / "kdaemon.toml"
    file.write_text(f'[[site]]\nroot = "."\nclient_ca = "{client.ca}"\n')
    with serve(None, "--workers", "1", "--config", str(file), issued=issued) as daemon:
        command = ["curl", "-sS", "-k", "--max-time", str(DEADLINE_S), daemon.url]
        refused = subprocess.run(command, capture_output=True, check=False)
        assert b"certificate required" in refused.stderr.lower()
        assert subprocess.run([*command, *client.arguments], capture_output=True, check=True).stdout == b"all others"


class Session(NamedTuple):
    resumed: bool
    session: ssl.SSLSession | None


def visit(
    setting: Setting, site: str, own: Issued | None, session: ssl.SSLSession | None, context: ssl.SSLContext
) -> Session:
    if own:
        context.load_cert_chain(own.certificate, own.key)
    with (
        socket.create_connection(setting.daemon.address, DEADLINE_S) as sock,
        context.wrap_socket(sock, server_hostname=f"{site}.test", session=session) as client,
    ):
        client.sendall(b"GET / HTTP/1.1\r\nHost: %b.test\r\nConnection: close\r\n\r\n" % site.encode())
        received = b""
        while part := client.recv(4096):
            received += part
        assert received.endswith(site.encode())
        return Session(bool(client.session_reused), client.session)


def client_context(ca: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(ca))
    context.check_hostname = False
    return context


def test_a_session_keeps_what_was_proved_and_no_more(setting: Setting) -> None:
    context = client_context(setting.daemon.ca)
    anonymous = visit(setting, "ajar", None, None, context)
    assert visit(setting, "ajar", None, anonymous.session, context).resumed
    first = visit(setting, "closed", setting.client, None, context)
    second = visit(setting, "closed", setting.client, first.session, context)
    assert (first.resumed, second.resumed) == (False, True)
    assert visit(setting, "closed", setting.client, second.session, context).resumed

    # Other authorities: what was proved to the old ones counts for nothing, and the full handshake fails by itself.
    text = setting.file.read_text()
    setting.file.write_text(text.replace("authorities.pem", "stranger/ca.pem"))
    assert control(setting.daemon, "reload").returncode == 0
    eventually(lambda: curl(setting, "closed", setting.stranger).stdout == b"closed", "the new authority counts")
    with pytest.raises(ssl.SSLError, match=r"(?i)unknown ca"):
        visit(setting, "closed", None, second.session, context)


def test_the_servers_hint_names_the_authorities(setting: Setting) -> None:
    target = f"127.0.0.1:{setting.daemon.port}"
    command = ["openssl", "s_client", "-connect", target, "-servername", "closed.test", "-tls1_3"]
    done = subprocess.run(command, input=b"", capture_output=True, check=False, timeout=DEADLINE_S)
    assert b"Acceptable client certificate CA names\nCN = kdaemon test root\n" in done.stdout


def test_connect_presents_a_certificate(setting: Setting, tmp_path: Path) -> None:
    request = b"GET / HTTP/1.1\r\nHost: closed.test\r\nConnection: close\r\n\r\n"
    command = [sys.executable, "-m", "kdaemon", "connect", f"127.0.0.1:{setting.daemon.port}", "--insecure"]
    command += ["--servername", "closed.test"]

    def run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [*command, *arguments], input=request, capture_output=True, check=False, timeout=DEADLINE_S,
            env=environment("connect", tmp_path),
        )  # fmt: skip

    done = run(*setting.client.arguments)
    assert done.returncode == 0
    assert done.stdout.endswith(b"closed")
    refused = run()
    assert refused.returncode == 1
    assert b"certificate_required" in refused.stderr
    mixed = run("--cert", str(setting.client.certificate), "--key", str(setting.stranger.key))
    assert mixed.returncode == 1
    assert b"does not belong" in mixed.stderr
    assert run("--cert", str(setting.client.certificate)).returncode == 2
