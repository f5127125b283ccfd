"""Sites as a configuration file says them: names and 421, rules, reload, the access log and SIGUSR1."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import subprocess
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from interop.process_support import pid_of
from support.certificates import Issued, issue
from support.clients import MemoryClient, Response, receive_to_end
from support.curl import curl
from support.daemon import Daemon, control, serve
from support.peers import program
from support.waiting import DEADLINE_S, eventually


def ask(daemon: Daemon, server_name: str, target: str, host: str = "", *headers: str) -> Response:
    """One request with `server_name` as SNI and `host` (default: the same) as Host; any certificate will do."""
    context = ssl.create_default_context(cafile=str(daemon.ca))
    context.check_hostname = False
    lines = [f"GET {target} HTTP/1.1", f"Host: {host or server_name}", "Connection: close", *headers, "", ""]
    with MemoryClient(daemon.address, daemon.ca, context=context, server_hostname=server_name) as client:
        client.handshake(send_finished=True)
        client.request("\r\n".join(lines).encode())
        client.send()
        return client.response()


@pytest.fixture
def sites(tmp_path: Path) -> Path:
    """A configuration file with two sites; its folder has the sites' folders."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.html").write_text(name)
    (tmp_path / "one" / "404.html").write_text("own page")
    (tmp_path / "one" / "a.weird").write_text("weird")
    (tmp_path / "one" / "sub").mkdir()
    path = tmp_path / "kdaemon.toml"
    path.write_text(
        f"""
        [[site]]
        root = "{tmp_path}/one"
        names = ["one.test", "*.one.test"]
        listing = true
        [[site.error_page]]
        status = 404
        path = "/404.html"
        [[site.header]]
        name = "Strict-Transport-Security"
        value = "max-age=31536000"
        [[site.redirect]]
        path = "/old/*"
        to = "https://new.test/*"
        status = 308
        [[site]]
        root = "{tmp_path}/two"
        [[media_type]]
        suffix = "weird"
        type = "text/x-weird"
        [access_log]
        path = "{tmp_path}/access.log"
        format = "json"
        """
    )
    return path


def serve_file(sites: Path, issued: Issued) -> AbstractContextManager[Daemon]:
    return serve(None, "--workers", "2", "--config", str(sites), issued=issued)


def logged(sites: Path, name: str = "access.log") -> list[dict[str, object]]:
    path = sites.with_name(name)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_sites_and_their_rules(sites: Path, issued: Issued) -> None:
    with serve_file(sites, issued) as daemon:
        assert ask(daemon, "one.test", "/").body == b"one"
        assert ask(daemon, "a.one.test", "/").body == b"one"
        assert ask(daemon, "other.test", "/").body == b"two"
        assert ask(daemon, "one.test", "/", "two.test").status == 421
        missing = ask(daemon, "one.test", "/none")
        assert (missing.status, missing.body) == (404, b"own page")
        assert missing.headers["strict-transport-security"] == "max-age=31536000"
        moved = ask(daemon, "one.test", "/old/x")
        assert (moved.status, moved.headers["location"]) == (308, "https://new.test/x")
        assert ask(daemon, "one.test", "/a.weird").headers["content-type"] == "text/x-weird"
        listing = ask(daemon, "one.test", "/sub/", "", "Accept: application/json")
        assert (listing.status, json.loads(listing.body)) == (200, [])
        assert ask(daemon, "two.test", "/none").body.startswith(b"404")


def test_sites_change_at_a_reload(sites: Path, issued: Issued) -> None:
    with serve_file(sites, issued) as daemon:
        assert ask(daemon, "one.test", "/").body == b"one"
        text = sites.read_text()
        third = sites.with_name("three")
        third.mkdir()
        (third / "index.html").write_text("three")
        sites.write_text(f'[[site]]\nroot = "{third}"\nnames = ["three.test"]\n' + text)
        assert control(daemon, "reload").returncode == 0
        eventually(lambda: ask(daemon, "three.test", "/").body == b"three", "the new site is served")
        assert ask(daemon, "one.test", "/").body == b"one"
        assert ask(daemon, "other.test", "/").body == b"two"


def test_a_link_to_the_next_release_counts_from_a_reload_on(tmp_path: Path, issued: Issued) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.html").write_text(name)
    link, file = tmp_path / "current", tmp_path / "kdaemon.toml"
    link.symlink_to("first")
    file.write_text('[[site]]\nroot = "current"\n')
    with serve(None, "--workers", "1", "--config", str(file), issued=issued) as daemon:
        assert curl(daemon, "/").body == b"first"
        (tmp_path / "next").symlink_to("second")
        (tmp_path / "next").rename(link)
        assert control(daemon, "reload").returncode == 0
        eventually(lambda: curl(daemon, "/").body == b"second", "the link's new target is served")
        for _ in range(2):
            keymgr = pid_of(daemon, "keymgr")
            assert control(daemon, "reload").returncode == 0
            eventually(lambda keymgr=keymgr: pid_of(daemon, "keymgr") != keymgr, "the reload is done")
        assert curl(daemon, "/").body == b"second"
        worker = Path(f"/proc/{pid_of(daemon, 'worker')}/fd")
        kept = [str(fd.readlink()) for fd in worker.iterdir()]
        assert kept.count(str(tmp_path / "second")) == 1, "an unchanged folder is not kept twice"


def test_access_log_and_its_reopening(sites: Path, issued: Issued) -> None:
    with serve_file(sites, issued) as daemon:
        for number in range(4):
            ask(daemon, "one.test", f"/{number}", "", "User-Agent: test")
        eventually(lambda: len(logged(sites)) == 4, "four lines are in the log")
        entry = logged(sites)[0]
        assert (entry["status"], entry["client"], entry["user_agent"]) == (404, "127.0.0.1", "test")
        sites.with_name("access.log").rename(sites.with_name("access.log.1"))
        daemon.signal(signal.SIGUSR1)
        eventually(lambda: sites.with_name("access.log").exists(), "the log is there again")
        ask(daemon, "one.test", "/after")
        eventually(lambda: logged(sites) or len(logged(sites, "access.log.1")) == 5, "the line is written")
        for number in range(6):
            ask(daemon, "one.test", f"/again{number}")
    lines = logged(sites) + logged(sites, "access.log.1")
    assert len(lines) == 11
    assert len(logged(sites)) >= 6


def test_plain_http_is_redirected(sites: Path, issued: Issued) -> None:
    sites.write_text('[[redirect_listen]]\naddress = "127.0.0.1:0"\nport = 8443\n' + sites.read_text())
    with serve_file(sites, issued) as daemon:
        completed = control(daemon, "status", "--json")
        host, _, port = json.loads(completed.stdout)["redirect_listeners"][0].partition(":")
        plain = f"http://one.test:{port}"
        moved = curl(daemon, "/a%20b?q=1", origin=plain)
        assert (moved.status, moved.headers["location"]) == (301, "https://one.test:8443/a%20b?q=1")
        assert curl(daemon, "/", "--data", "x", origin=plain).status == 308
        assert curl(daemon, "/", "-H", "Host:", origin=plain).status == 400
        assert curl(daemon, "/", "-H", "Host: a/b@c", origin=plain).status == 400
        old = curl(daemon, "/x", "--http1.0", "-H", "Host:", origin=plain)
        assert old.headers["location"] == "https://127.0.0.1:8443/x"
        for number in range(10):
            with socket.create_connection((host, int(port)), DEADLINE_S) as client:
                client.sendall(f"GET /{number}?q HTTP/1.1\r\nHost: one.test\r\n\r\n".encode())
                response = receive_to_end(client)
            assert response.startswith(b"HTTP/1.1 301 ")
            assert f"\r\nLocation: https://one.test:8443/{number}?q\r\n".encode() in response
        assert ask(daemon, "one.test", "/").body == b"one"


def test_each_site_has_its_own_root_and_certificate(sites: Path) -> None:
    """curl verifies each name against the authority of its own certificate alone."""
    issued = {name: issue(sites.with_name(f"of-{name}"), names=[f"{name}.test"]) for name in ("one", "two")}
    certificates = "".join(
        f'[[certificate]]\nchain = "{each.certificate}"\nkey = "{each.key}"\n' for each in issued.values()
    )
    sites.write_text(certificates + sites.read_text())
    with serve(None, "--workers", "1", "--config", str(sites)) as daemon:
        for name, each in issued.items():
            url = f"https://{name}.test:{daemon.port}/"
            resolve = ("--resolve", f"{name}.test:{daemon.port}:{daemon.host}")
            answer = [program("curl"), "--silent", "--show-error", "--cacert", str(each.ca), *resolve, url]
            assert subprocess.run(answer, capture_output=True, check=True).stdout.decode() == name
