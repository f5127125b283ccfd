"""Configuration: strict, with file, line and key in every complaint, and documented."""

import dataclasses
import json
import re
import tomllib
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.certificates import Issued

from kdaemon import cli, config
from kdaemon.config import Config, ConfigError
from kdaemon.control import PATH_SIZE_MAX

ROOT = Path(__file__).parent.parent.parent
MANUAL = (ROOT / "docs" / "configuration.md").read_text()


def write(folder: Path, text: str) -> Path:
    path = folder / "kdaemon.toml"
    path.write_text(text)
    return path


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    assert config.load(write(tmp_path, "")) == Config()


def test_everything_can_be_set_and_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "www").mkdir()
    for name in ("chain.pem", "key.pem", "ocsp.der"):
        (tmp_path / name).write_text("")
    loaded = config.load(
        write(
            tmp_path,
            """
            workers = 3
            ktls = "off"
            socket = "/run/kd.sock"
            [[listen]]
            address = "[::]:443"
            [[site]]
            root = "www"
            names = ["example.org", "*.example.org"]
            [[certificate]]
            chain = "chain.pem"
            key = "key.pem"
            ocsp = "ocsp.der"
            [deadlines]
            drain_ms = 5000
            [log]
            format = "json"
            """,
        )
    )
    assert loaded.workers == 3
    assert loaded.ktls == "off"
    assert loaded.socket == "/run/kd.sock"
    assert loaded.site[0].root == str(tmp_path / "www")
    assert loaded.site[0].names == ("example.org", "*.example.org")
    assert loaded.certificate[0].key == str(tmp_path / "key.pem")
    assert loaded.deadlines.drain_ms == 5000
    assert loaded.deadlines.handshake_ms == 10_000
    assert loaded.log.format == "json"


@pytest.mark.parametrize(
    ("text", "line", "complaint"),
    [
        ("worker = 1\n", 1, "worker: unknown key"),
        ("# comment\n\nworkers = 'x'\n", 3, "workers: must be an integer"),
        ("workers = true\n", 1, "workers: must be an integer"),
        ("workers = -1\n", 1, "workers: -1 is not in 0..1024"),
        ("ktls = 'maybe'\n", 1, "ktls: 'maybe' is not one of 'auto', 'require', 'off'"),
        ("workers = 1\n[deadlines]\nidle_ms = 5\n", 3, "deadlines.idle_ms: 5 is not in"),
        ("[[listen]]\naddress = '127.0.0.1:0'\n[[listen]]\naddress = '::1:443'\n", 4, "listen.address: '::1:443'"),
        ("[[listen]]\naddress = '127.0.0.1:8443'\n[[listen]]\naddress = '127.0.0.1:8443'\n", 4, "listed twice"),
        ("[[site]]\nnames = [\n  'a',\n  1,\n]\nroot = '.'\n", 2, "site.names: must be a string, not 1"),
        ("[[site]]\nnames = ['a']\n", 1, "site.root: is required and missing"),
        ("[[site]]\nroot = 'nowhere'\n", 2, "is not a folder"),
        ("[[site]]\nroot = ''\n", 2, "site.root: '' is not a folder"),
        ("[[listen]]\naddress = 'localhost:443'\n", 2, "listen.address: 'localhost:443': 'localhost' is not an IP"),
        ("site = 3\n", 1, "site: must be an array"),
        ("deadlines = 3\n", 1, "deadlines: must be a table"),
        ("[tickets]\nlifetime_s = 100\nrotation_s = 200\n", 3, "tickets.rotation_s: must not be longer"),
        ("[[certificate]]\nchain = 'a'\nkey = 'b'\n", 2, "certificate.chain: "),
        ("[access_log]\npath = 'none/a.log'\n", 2, "none' is not a folder"),
        ("[http]\nranges_max = 65\n", 2, "http.ranges_max: 65 is not in 0..64"),
        ("[http]\ncharset = 'a\\nb'\n", 2, "http.charset: "),
        ("[http]\n\ndefault_type = 'text'\n", 3, "http.default_type: 'text' is not a media type: such as"),
        ("[[media_type]]\nsuffix = 'tar.gz'\ntype = 'a/b'\n", 2, "media_type.suffix: suffix 'tar.gz': what is"),
        ("[[media_type]]\nsuffix = 'x'\ntype = \"a/b\\r\\nX: y\"\n", 3, "media_type.type: "),
        ("[[site]]\nroot = '.'\nnames = ['http://a']\n", 3, "site.names: 'http://a' is not a host name: such as"),
        ("[[site]]\nroot = '.'\nnames = ['bücher.test']\n", 3, "'xn--bcher-kva.test'; write it so"),
        ("[[site]]\nroot = '.'\nindex = ['a/b']\n", 3, "site.index: index 'a/b': a plain file name"),
        ("[[site]]\nroot = '.'\nfallback = 'a'\n", 3, "site.fallback: page 'a': the path of a file"),
        (
            "[[site]]\nroot = '.'\nnames = ['A.test']\n[[site]]\nroot = '.'\nnames = ['b', 'a.test']\n",
            6,
            "site.names: 'a.test' is the name of another site, too",
        ),
        ("[[site]]\nroot = '.'\n[[site]]\nroot = '.'\n", 3, "site.names: only one site may leave out names"),
        (
            "[[site]]\nroot = '.'\n[[site.header]]\nname = 'Content-Length'\nvalue = '5'\n",
            4,
            "site.header.name: Content-Length is written by the server itself; leave it out",
        ),
        ("[[site]]\nroot = '.'\n[[site.header]]\nname = 'X'\nvalue = \"a\\r\\nb\"\n", 5, "no control characters"),
        ("[[site]]\nroot = '.'\n[[site.header]]\nname = 'X'\nvalue = ''\npath = '/?'\n", 6, "site.header.path: "),
        (
            "[[site]]\nroot = '.'\n[[site.redirect]]\npath = '/a'\nto = '/b'\n\n"
            "[[site.redirect]]\npath = 'b'\nto = '/'\n",
            8,
            "site.redirect.path: redirect 'b': a path pattern begins with",
        ),
        ("[[site]]\nroot = '.'\n[[site.error_page]]\nstatus = 200\npath = '/x'\n", 4, "not an error status"),
        ("[[site]]\nroot = '.'\n[[site.redirect]]\npath = '/'\nto = 'x'\n", 5, "site.redirect.to: redirect to 'x'"),
        ("[[site]]\nroot = '.'\n[[site.redirect]]\npath = '/'\nto = '/'\nstatus = 5\n", 6, "site.redirect.status: "),
        ("[[site]]\nroot = '.'\n[[site.error_page]]\nstatus = 404\npath = 'x'\n", 5, "site.error_page.path: page 'x'"),
        (
            "[[site]]\nroot = '.'\n" + "[[site.error_page]]\nstatus = 404\npath = '/x'\n" * 2,
            7,
            "site.error_page.status: status 404 has a page already",
        ),
        (
            "[[site]]\nroot = '.'\n" + "[[site.header]]\nname = 'X'\nvalue = 'y'\n" * 33,
            3,
            "site.header: more than 32 header rules in one site",
        ),
    ],
)
def test_a_mistake_is_named_with_file_line_and_key(tmp_path: Path, text: str, line: int, complaint: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_not_toml_is_said_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not TOML: .*line 2"):
        config.load(write(tmp_path, "workers = 1\nktls = \n"))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        config.load(tmp_path / "none.toml")


def test_a_configuration_survives_json(tmp_path: Path) -> None:
    loaded = config.load(write(tmp_path, f"workers = 2\n[[site]]\nroot = '{tmp_path}'\nnames = ['a', 'b']\n"))
    assert config.from_mapping(json.loads(json.dumps(config.to_mapping(loaded)))) == loaded


@pytest.mark.parametrize("address", ["", "127.0.0.1", ":443", "127.0.0.1:x", "127.0.0.1:65536", "::1:443"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        config.parse_address(address)


def test_addresses() -> None:
    assert config.parse_address("127.0.0.1:0") == ("127.0.0.1", 0)
    assert config.parse_address("[::1]:8443") == ("::1", 8443)


def keys(kind: type, prefix: str = "") -> list[str]:
    found = []
    hints = typing.get_type_hints(kind)
    for entry in dataclasses.fields(kind):
        hint = hints[entry.name]
        inner = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint
        if dataclasses.is_dataclass(inner):
            found += keys(typing.cast(type, inner), f"{prefix}{entry.name}.")
        else:
            found.append(prefix + entry.name)
    return found


@pytest.mark.parametrize("key", keys(Config))
def test_every_key_is_documented(key: str) -> None:
    assert f"| `{key}` |" in MANUAL


def test_every_default_in_the_documentation_is_the_default() -> None:
    model = dict(defaults(Config))
    shown = dict(re.findall(r"^\| `([\w.]+)` \| (\S.*?) \| ", MANUAL, re.MULTILINE))
    for key, cell in shown.items():
        if key in ("socket", "listen.address"):
            continue  # said in words
        if cell == "required":
            assert model[key] is dataclasses.MISSING, key
        else:
            assert tomllib.loads(f"x = {cell.strip('`')}")["x"] == model[key], key


def defaults(kind: type, prefix: str = "") -> Iterator[tuple[str, object]]:
    hints = typing.get_type_hints(kind)
    for entry in dataclasses.fields(kind):
        hint = hints[entry.name]
        inner = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint
        if dataclasses.is_dataclass(inner):
            yield from defaults(typing.cast(type, inner), f"{prefix}{entry.name}.")
        else:
            yield f"{prefix}{entry.name}", list(entry.default) if isinstance(entry.default, tuple) else entry.default


@pytest.mark.parametrize("example", re.findall(r"```toml\n(.*?)```", MANUAL, re.DOTALL))
def test_every_example_of_the_documentation_is_a_configuration(example: str) -> None:
    mapping = tomllib.loads(example)
    for site in mapping.get("site", []):
        site["root"] = str(ROOT)
    mapping.pop("certificate", None)  # its files are not here
    loaded = config.from_mapping(mapping)
    config.check(loaded)
    assert loaded != Config()


def test_check_says_ok_or_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(write(tmp_path, "workers = 1\n"))]) == 0
    assert "ok" in capsys.readouterr().out
    assert cli.main(["check", str(write(tmp_path, "wokers = 1\n"))]) == 2
    assert ":1: wokers: unknown key" in capsys.readouterr().err


def test_check_reads_certificates_and_knows_the_accounts_of_the_host(
    make_issued: Callable[..., Issued], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    issued, other = make_issued(), make_issued(expired=True)
    (tmp_path / "not.der").write_bytes(b"0")

    def complaint(text: str) -> str:
        assert cli.main(["check", str(write(tmp_path, text))]) == 2
        return capsys.readouterr().err

    pair = f"[[certificate]]\nchain = '{issued.certificate}'\nkey = '{issued.key}'\n"
    assert ":3: certificate.key: " in complaint(pair.replace(str(issued.key), str(other.key)))
    assert ":2: certificate.chain: " in complaint(pair.replace(str(issued.certificate), str(issued.key)))
    assert ":4: certificate.ocsp: " in complaint(pair + "ocsp = 'not.der'\n")
    assert ":2: users.keymgr: no account is named 'no-such'" in complaint("[users]\nkeymgr = 'no-such'\n")
    assert ":2: clients.users: no account is named 'no-such'" in complaint("[clients]\nusers = ['0', 'no-such']\n")
    assert ":2: clients.groups: no group is named 'no-such'" in complaint("[clients]\ngroups = ['no-such', '0']\n")
    assert ":1: keylog: " in complaint("keylog = 'none/keys'\n")
    assert f":1: socket: longer than the {PATH_SIZE_MAX} bytes" in complaint(f"socket = '{'s' * 200}'\n")
    expired = f"[[certificate]]\nchain = '{other.certificate}'\nkey = '{other.key}'\n"
    assert cli.main(["check", str(write(tmp_path, pair + expired + "[clients]\nusers = ['root', '5']\n"))]) == 0
    said = capsys.readouterr()
    assert said.out.endswith(": ok\n")
    assert said.err.startswith(f"kdaemon: warning: {other.certificate}: the certificate expired on ")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("command", ["serve", "run", "check", "connect", "ctl"])
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    assert f"example:\n  {'printf' if command == 'connect' else f'kdaemon {command}'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["serve", "--listen", "nonsense"],
        ["serve", "--cert", "a.pem"],
        ["serve", "/nowhere/at/all"],
        ["ctl", "fly"],
        ["connect", "localhost:1", "--alpn", ""],
        ["connect", "localhost:1", "--alpn", "a" * 256],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    try:
        status = cli.main(arguments)
    except SystemExit as error:
        status = typing.cast(int, error.code)
    assert status == 2


@pytest.mark.parametrize("host", ["a" * 64, "a..test"])
def test_connecting_to_what_is_no_host_name_fails_in_one_line(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["connect", f"{host}:443", "--insecure", "--ktls", "off"]) == 1
    assert capsys.readouterr().err == f"kdaemon: {host}:443: the name cannot be resolved: it is no host name\n"


def test_keylog_needs_its_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SSLKEYLOGFILE", raising=False)
    assert cli.main(["serve", str(tmp_path), "--keylog"]) == 2
