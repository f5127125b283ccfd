"""The `kdaemon` command: argument parsing, and the way into each of its subcommands."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from kdaemon import __version__
from kdaemon.config import Certificate, Config, ConfigError, Listener, check, load, parse_address
from kdaemon.site_settings import Site

EXIT_OK, EXIT_FAILURE, EXIT_USAGE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status (2: usage or configuration)."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.function
    try:
        return command(options)
    except ConfigError as error:
        print(f"kdaemon: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return 128 + 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kdaemon", description="TLS 1.3 as a Linux system service: HTTPS file server and TLS daemon."
    )
    parser.add_argument("--version", action="version", version=f"kdaemon {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(
        name: str, function: Callable[[argparse.Namespace], int], text: str, example: str
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=f"example:\n{example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(function=function)
        return command

    serve = add(
        "serve",
        _serve,
        "serves a folder over HTTPS",
        "  kdaemon serve ~/Public --listen 127.0.0.1:8443\n"
        "  curl --cacert ~/.local/state/kdaemon/localhost.crt https://localhost:8443/",
    )
    serve.add_argument("directory", nargs="?", metavar="DIR", help="the folder (default: the present one)")
    serve.add_argument(
        "--listen",
        action="append",
        type=_address,
        metavar="ADDR:PORT",
        help="may be repeated; port 0: the kernel chooses (default: 127.0.0.1:8443 and [::1]:8443)",
    )
    serve.add_argument("--cert", metavar="FILE", help="certificate chain, PEM (default: self-signed for localhost)")
    serve.add_argument("--key", metavar="FILE", help="its private key, PEM")
    serve.add_argument("--workers", type=_count, metavar="N", help="worker processes (default: one per CPU)")
    serve.add_argument("--config", metavar="FILE", help="TOML file; options given here win over it")
    serve.add_argument("--socket", metavar="PATH", help="UNIX socket for ctl and libtls (default: $KDAEMON_SOCKET)")
    serve.add_argument("--drain-ms", type=_count, metavar="N", help="time that connections get to finish at the end")
    serve.add_argument("--log-level", choices=("debug", "info", "warning", "error"))
    _add_ktls(serve)
    _add_keylog(serve)

    run = add("run", _run, "runs the daemon as a configuration file says", "  kdaemon run --config /etc/kdaemon.toml")
    run.add_argument("--config", required=True, metavar="FILE", help="TOML file, see docs/configuration.md")
    _add_keylog(run)

    validate = add("check", _check, "validates a configuration file", "  kdaemon check /etc/kdaemon.toml")
    validate.add_argument("file", metavar="FILE")

    connect = add(
        "connect",
        _connect,
        "connects standard input and output to a TLS server",
        "  printf 'GET / HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: close\\r\\n\\r\\n' \\\n"
        "    | kdaemon connect localhost:8443 --cafile ~/.local/state/kdaemon/localhost.crt",
    )
    connect.add_argument("peer", metavar="HOST:PORT", type=_peer)
    connect.add_argument("--cafile", metavar="FILE", help="trust these certificates, PEM (default: the system's)")
    connect.add_argument("--servername", metavar="NAME", help="name to ask for and to verify (default: HOST)")
    connect.add_argument("--cert", metavar="FILE", help="our own certificate chain, PEM, for servers that ask for one")
    connect.add_argument("--key", metavar="FILE", help="its private key, PEM")
    connect.add_argument(
        "--alpn", action="append", type=_protocol, metavar="PROTOCOL", help="offer this protocol, may be repeated"
    )
    connect.add_argument("--session", metavar="FILE", help="resume with a ticket from this file, keep new ones there")
    connect.add_argument("--insecure", action="store_true", help="do not verify the certificate")
    _add_ktls(connect)
    _add_keylog(connect)

    doctor = add("doctor", _doctor, "says what this host lacks for the daemon, by trying", "  kdaemon doctor --json")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")

    control = add("ctl", _ctl, "talks to a running daemon", "  kdaemon ctl status --json")
    control.add_argument(
        "command",
        choices=("status", "reload", "drain", "stop"),
        help="status: counters; reload: read the configuration again; drain: end when all is answered; stop: end now",
    )
    control.add_argument("--socket", metavar="PATH", default="", help="the daemon's socket (default: $KDAEMON_SOCKET)")
    control.add_argument("--json", action="store_true", help="print the answer as JSON")
    return parser


def _add_ktls(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ktls",
        choices=("auto", "require", "off"),
        help="records in the kernel: where possible, always, never (default: auto)",
    )


def _add_keylog(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--keylog", action="store_true", help="write traffic secrets to the file $SSLKEYLOGFILE; for debugging only"
    )


def _doctor(options: argparse.Namespace) -> int:
    from kdaemon import doctor  # noqa: PLC0415 - its probes are not for the daemon

    return doctor.main(options.json)


def _serve(options: argparse.Namespace) -> int:
    if (options.cert is None) != (options.key is None):
        raise ConfigError("--cert and --key belong together: give both, or neither for a self-signed certificate")
    return _daemon(lambda: _serve_config(options))


def _serve_config(options: argparse.Namespace) -> Config:
    config = load(options.config) if options.config else Config()
    changes: dict[str, object] = {}
    if options.directory is not None or not config.site:
        root = Path(options.directory or ".").resolve()
        if not root.is_dir():
            raise ConfigError(f"{options.directory}: not a folder")
        changes["site"] = (Site(root=str(root)),)
    if options.listen:
        changes["listen"] = tuple(Listener(address=address) for address in options.listen)
    if options.cert:
        pair = (Path(options.cert).absolute(), Path(options.key).absolute())
        changes["certificate"] = (Certificate(chain=str(pair[0]), key=str(pair[1])),)
    if options.workers is not None:
        changes["workers"] = options.workers
    if options.ktls:
        changes["ktls"] = options.ktls
    if options.socket:
        changes["socket"] = str(Path(options.socket).absolute())
    if options.log_level:
        changes["log"] = dataclasses.replace(config.log, level=options.log_level)
    if options.drain_ms is not None:
        changes["deadlines"] = dataclasses.replace(config.deadlines, drain_ms=options.drain_ms)
    if options.keylog:
        changes["keylog"] = _keylog_path()
    config = dataclasses.replace(config, **changes)  # type: ignore[arg-type]
    check(config)
    return config


def _run(options: argparse.Namespace) -> int:
    def load_config() -> Config:
        config = load(options.config)
        return dataclasses.replace(config, keylog=_keylog_path()) if options.keylog else config

    return _daemon(load_config)


def _daemon(load_config: Callable[[], Config]) -> int:
    config = load_config()
    # Lazily: `kdaemon ctl` and `check` need none of it
    from kdaemon.ktls import probe  # noqa: PLC0415
    from kdaemon.listeners import ListenError  # noqa: PLC0415
    from kdaemon.observe import configure_logging  # noqa: PLC0415
    from kdaemon.supervisor import StartError, Supervisor  # noqa: PLC0415

    configure_logging(config.log, "supervisor")
    try:
        return Supervisor(config, probe(), load_config).run()
    except StartError as error:
        print(f"kdaemon: {error}", file=sys.stderr)
        return error.status
    except ListenError as error:
        print(f"kdaemon: {error}", file=sys.stderr)
        return EXIT_FAILURE


def _check(options: argparse.Namespace) -> int:
    from kdaemon.host_check import check_host  # noqa: PLC0415 - cryptography, which other commands do without

    warnings: list[str] = []
    load(options.file, lambda config: warnings.extend(check_host(config)))
    for warning in warnings:
        print(f"kdaemon: warning: {warning}", file=sys.stderr)
    print(f"{options.file}: ok")
    return EXIT_OK


def _connect(options: argparse.Namespace) -> int:
    from kdaemon import connect  # noqa: PLC0415

    if (options.cert is None) != (options.key is None):
        raise ConfigError("--cert and --key belong together: give both, or neither")
    host, port = options.peer
    return connect.main(
        host,
        port,
        cafile=options.cafile,
        servername=options.servername,
        certificate=(options.cert, options.key) if options.cert else None,
        alpn=tuple(options.alpn or ()),
        insecure=options.insecure,
        policy=options.ktls or "auto",
        keylog=_keylog_path() if options.keylog else "",
        session=options.session or "",
    )


def _ctl(options: argparse.Namespace) -> int:
    from kdaemon import control  # noqa: PLC0415

    try:
        result = control.request(options.command, options.socket)
    except control.ControlError as error:
        print(f"kdaemon: {error}", file=sys.stderr)
        return EXIT_FAILURE
    if options.json:
        print(json.dumps(result))
    elif options.command == "status":
        print(control.format_status(result))
    return EXIT_OK


def _keylog_path() -> str:
    path = os.environ.get("SSLKEYLOGFILE", "")
    if not path:
        raise ConfigError("--keylog needs the environment variable SSLKEYLOGFILE to name a file")
    return str(Path(path).absolute())


def _address(text: str) -> str:
    try:
        parse_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _peer(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _protocol(text: str) -> str:
    if not 1 <= len(text.encode()) <= 255:  # RFC 7301, section 3.1
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a protocol: it has 1 to 255 bytes")
    return text


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return int(text)
