"""Configuration: a TOML file, or the command line of ``kdaemon serve``, as frozen dataclasses.

Strict: an unknown key, a wrong type or a value out of range is a `ConfigError` that names file, line and key.
A `Config` crosses process boundaries as plain values (`to_mapping`, `from_mapping`); every process checks what it gets.
docs/configuration.md describes every key.
"""

import dataclasses
import ipaddress
import os
import tomllib
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kdaemon.site_settings import (
    AccessLog,
    Http,
    MediaType,
    SettingError,
    Site,
    bounded,
    check_names,
    http_limits,
    media_types,
    site_rules,
)

RecordLayerPolicy = Literal["auto", "require", "off"]

# Keys that a reload leaves as they are.
NEEDS_RESTART = (
    "listen", "redirect_listen", "workers", "ktls", "socket", "limits", "users", "deadlines", "http", "media_type",
    "access_log",
)  # fmt: skip


class ConfigError(Exception):
    """A configuration that cannot be used; the message is one line: where, which key, what is wrong."""


def _path(default: str = "") -> str:
    return field(default=default, metadata={"path": True})


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    address: str  # "ADDR:PORT", "[ADDR]:PORT"; port 0: the kernel chooses


@dataclass(frozen=True, slots=True, kw_only=True)
class RedirectListener:
    address: str  # plain HTTP there is redirected to HTTPS
    port: int = bounded(443, 1, 65535)  # where HTTPS is, as clients see it


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    chain: str = field(metadata={"path": True})  # PEM, the leaf first
    key: str = field(metadata={"path": True})  # PEM, unencrypted; read by keymgr only
    ocsp: str = _path()  # DER OCSP response to staple


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """Every wait has one of these; milliseconds."""

    handshake_ms: int = bounded(10_000, 100, 600_000)
    header_ms: int = bounded(60_000, 100, 3_600_000)
    body_ms: int = bounded(60_000, 100, 3_600_000)
    send_ms: int = bounded(60_000, 100, 3_600_000)
    idle_ms: int = bounded(75_000, 100, 86_400_000)
    close_ms: int = bounded(5_000, 10, 600_000)
    signing_ms: int = bounded(5_000, 100, 600_000)
    drain_ms: int = bounded(60_000, 0, 86_400_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    connections_max: int = bounded(65_536, 1, 1_048_576)  # per worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Tickets:
    count: int = bounded(1, 0, 8)  # per full handshake; 0: no resumption
    lifetime_s: int = bounded(7_200, 60, 604_800)
    rotation_s: int = bounded(3_600, 60, 604_800)


@dataclass(frozen=True, slots=True, kw_only=True)
class Clients:
    """Programs that use libtls: who may attach, for which roles, with how much."""

    roles: tuple[Literal["client", "server"], ...] = ("client", "server")  # none: nobody can attach
    users: tuple[str, ...] = ()  # names or numbers, besides root and the daemon's own user
    groups: tuple[str, ...] = ()
    clients_max: int = bounded(64, 1, 4096)  # per worker
    connections_max: int = bounded(4096, 1, 1_048_576)  # of one client, listeners included
    operations_max: int = bounded(4096, 1, 65_536)  # in flight, of one client
    arena_mib_max: int = bounded(64, 1, 2048)
    sessions_max: int = bounded(256, 0, 65_536)  # servers that a worker remembers for them; 0: no resumption


@dataclass(frozen=True, slots=True, kw_only=True)
class Users:
    """Accounts to change to when started as root; empty: stay."""

    worker: str = ""
    keymgr: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    listen: tuple[Listener, ...] = (Listener(address="127.0.0.1:8443"), Listener(address="[::1]:8443"))
    redirect_listen: tuple[RedirectListener, ...] = ()
    site: tuple[Site, ...] = ()
    certificate: tuple[Certificate, ...] = ()
    workers: int = bounded(0, 0, 1024)  # 0: one per CPU this process may use
    ktls: RecordLayerPolicy = "auto"
    keylog: str = _path()  # traffic secrets in the NSS key log format; for debugging only
    socket: str = _path()  # control and libtls socket; empty: see default_socket_path()
    deadlines: Deadlines = Deadlines()
    limits: Limits = Limits()
    tickets: Tickets = Tickets()
    clients: Clients = Clients()
    users: Users = Users()
    log: Log = Log()
    http: Http = field(default_factory=Http)
    media_type: tuple[MediaType, ...] = ()
    access_log: AccessLog = field(default_factory=AccessLog)


def load(path: str | Path, check_further: Callable[["Config"], None] | None = None) -> Config:
    """Reads and checks the TOML file at `path`. Relative paths in it are relative to its own folder.

    `check_further` may raise KeyProblem, too. Raises ConfigError; an unreadable file is one too.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode()
        mapping = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    try:
        config = from_mapping(mapping, base=path.resolve().parent)
        check(config)
        if check_further is not None:
            check_further(config)
    except KeyProblem as problem:
        line = _line_of(text, problem.keys)
        raise ConfigError(f"{path}:{line}: {problem}") from None
    return config


def from_mapping(mapping: Mapping[str, Any], base: Path | None = None) -> Config:
    """Builds a Config from nested plain values; relative paths are taken from the folder `base` (None: left alone)."""
    return typing.cast(Config, _build(Config, mapping, (), base))


def to_mapping(config: Config) -> dict[str, Any]:
    """Plain values that survive JSON and give the same Config through from_mapping()."""
    return dataclasses.asdict(config)


def check(config: Config) -> None:
    """Checks what types cannot say. Raises ConfigError."""
    seen: dict[tuple[str, int], int] = {}
    addresses = [("listen", index, listener.address) for index, listener in enumerate(config.listen)]
    addresses += [("redirect_listen", index, entry.address) for index, entry in enumerate(config.redirect_listen)]
    for index, (table, number, text) in enumerate(addresses):
        keys = (table, number, "address")
        try:
            address = parse_address(text)
        except ValueError as error:
            raise KeyProblem(keys, str(error)) from None
        if address[1] and address in seen:
            raise KeyProblem(keys, f"{text!r} is listed twice")
        seen[address] = index
    for index, site in enumerate(config.site):
        if not site.root or not Path(site.root).is_dir():
            raise KeyProblem(("site", index, "root"), f"{site.root!r} is not a folder")
        try:
            site_rules(site, -1)
        except SettingError as error:
            raise KeyProblem(("site", index, *error.keys), str(error)) from None
        _check_client_ca(index, site)
    try:
        check_names(config.site)
    except SettingError as error:
        raise KeyProblem(("site", *error.keys), str(error)) from None
    try:
        media_types(config.http, config.media_type)
    except SettingError as error:
        raise KeyProblem(error.keys, str(error)) from None
    try:
        http_limits(config.http)
    except ValueError as error:
        raise KeyProblem(("http",), str(error)) from None
    for index, certificate in enumerate(config.certificate):
        for name in ("chain", "key", "ocsp"):
            value = getattr(certificate, name)
            if (value or name != "ocsp") and not Path(value).is_file():
                raise KeyProblem(("certificate", index, name), f"{value!r} is not a file")
    folder = Path(config.access_log.path).parent
    if config.access_log.path and not folder.is_dir():
        raise KeyProblem(("access_log", "path"), f"{str(folder)!r} is not a folder: make it, or name another")
    if config.tickets.rotation_s > config.tickets.lifetime_s:
        raise KeyProblem(("tickets", "rotation_s"), "must not be longer than lifetime_s")


def _check_client_ca(index: int, site: Site) -> None:
    if site.client_ca:
        from kdaemon import client_trust  # noqa: PLC0415 - cryptography, which most configurations do without here

        try:
            client_trust.load(site)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "no certificates in PEM"
            raise KeyProblem(("site", index, "client_ca"), f"{site.client_ca!r}: {reason}") from None
    elif site.client_certificate != "require":
        raise KeyProblem(("site", index, "client_certificate"), "needs client_ca: whose certificates are accepted")


def parse_address(address: str) -> tuple[str, int]:
    """ "127.0.0.1:8443" or "[::1]:8443" -> (host, port). Raises ValueError."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{address!r} is not ADDRESS:PORT, such as 0.0.0.0:443")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{address!r}: write an IPv6 address in brackets, [{host}]:{port}")
    if not host:
        raise ValueError(f"{address!r} has no address; use 0.0.0.0 or [::] for all")
    try:
        ipaddress.ip_address(host)
    except ValueError:
        raise ValueError(f"{address!r}: {host!r} is not an IP address") from None
    return host, int(port)


def default_socket_path() -> str:
    """Where the daemon's UNIX socket is when nothing else was said (docs/configuration.md)."""
    if path := os.environ.get("KDAEMON_SOCKET"):
        return path
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if not runtime:
        runtime = "/run" if os.geteuid() == 0 else f"/run/user/{os.geteuid()}"
        if not os.access(runtime, os.W_OK):
            runtime = os.environ.get("TMPDIR", "/tmp")
            return f"{runtime}/kdaemon-{os.geteuid()}.sock"
    return f"{runtime}/kdaemon.sock"


class KeyProblem(ConfigError):
    """A problem at one key; `keys` is its path (table names, indices, key)."""

    def __init__(self, keys: tuple[str | int, ...], message: str) -> None:
        name = ".".join(str(key) for key in keys if isinstance(key, str))
        super().__init__(f"{name}: {message}")
        self.keys = keys


_TYPE_NAMES = {str: "a string", int: "an integer", bool: "true or false"}


def _build(kind: Any, value: Any, keys: tuple[str | int, ...], base: Path | None) -> Any:
    """Checks `value` against the type `kind` and converts it."""
    if dataclasses.is_dataclass(kind):
        return _build_table(kind, value, keys, base)
    origin = typing.get_origin(kind)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise KeyProblem(keys, "must be an array")
        item = typing.get_args(kind)[0]
        return tuple(_build(item, entry, (*keys, index), base) for index, entry in enumerate(value))
    if origin is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise KeyProblem(keys, f"{value!r} is not one of {', '.join(map(repr, choices))}")
        return value
    # bool is a subclass of int, but "workers = true" is a mistake
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise KeyProblem(keys, f"must be {_TYPE_NAMES[kind]}, not {value!r}")
    return value


def _build_table(kind: Any, value: Any, keys: tuple[str | int, ...], base: Path | None) -> Any:
    if not isinstance(value, Mapping):
        raise KeyProblem(keys, "must be a table")
    fields = {entry.name: entry for entry in dataclasses.fields(kind)}
    types_ = typing.get_type_hints(kind)
    arguments: dict[str, Any] = {}
    for name, entry in value.items():
        here = (*keys, name)
        if name not in fields:
            raise KeyProblem(here, f"unknown key; known here: {', '.join(fields)}")
        result = _build(types_[name], entry, here, base)
        metadata = fields[name].metadata
        if "minimum" in metadata and not metadata["minimum"] <= result <= metadata["maximum"]:
            raise KeyProblem(here, f"{result} is not in {metadata['minimum']}..{metadata['maximum']}")
        if metadata.get("path") and result and base is not None:
            result = str(base / result)
        arguments[name] = result
    missing = [
        name
        for name, entry in fields.items()
        if name not in arguments
        and isinstance(entry.default, type(dataclasses.MISSING))
        and isinstance(entry.default_factory, type(dataclasses.MISSING))
    ]
    if missing:
        raise KeyProblem((*keys, missing[0]), "is required and missing")
    return kind(**arguments)


def _line_of(text: str, keys: tuple[str | int, ...]) -> int:
    """Line (from 1) on which the value at `keys` begins.

    tomllib gives no positions, but it can say of every prefix of the file what it holds: the value ends where the
    shortest prefix that holds it ends, and begins behind the prefix before. Errors are rare and files short.
    """
    lines = text.splitlines(keepends=True)
    for depth in range(len(keys), 0, -1):  # a missing key is reported at the table that lacks it
        begin = 0
        for end in range(1, len(lines) + 1):
            try:
                mapping = tomllib.loads("".join(lines[:end]))
            except tomllib.TOMLDecodeError:
                continue  # in the middle of a value that spans lines
            if _holds(mapping, keys[:depth]):
                return begin + 1
            begin = end
    return 1


def _holds(value: Any, keys: tuple[str | int, ...]) -> bool:
    for key in keys:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return False
    return True
