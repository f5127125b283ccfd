"""Fixtures for every kind of test; the parts are in tests/support.

Works under pytest-xdist: test processes share nothing, and the kernel chooses every port.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
if importlib.util.find_spec("kdaemon") is None:  # not installed: the checkout itself, built in place
    sys.path[:0] = [str(ROOT), str(ROOT / "pyx")]
elif importlib.util.find_spec("kdaemon_pyx") is None:
    sys.path.insert(0, str(ROOT / "pyx"))

from support.certificates import Issued, issue  # noqa: E402
from support.content import pattern  # noqa: E402
from support.daemon import Daemon, serve  # noqa: E402

Serve = Callable[..., Daemon]


def kernel_has_ktls() -> bool:
    """Whether TCP_ULP "tls" can be attached: asked of the kernel, which may load its module to answer."""
    tcp_ulp = 31
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as client:
        try:
            client.setsockopt(socket.IPPROTO_TCP, tcp_ulp, b"tls")
        except OSError:
            return False
    return True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `guest` need a kernel with kTLS: elsewhere they are deselected (scripts/guest runs them).

    With KDAEMON_REQUIRE_KTLS=1, as in the guests, they are kept even then, so that a guest without kTLS fails loudly.
    """
    if os.environ.get("KDAEMON_REQUIRE_KTLS") == "1" or kernel_has_ktls():
        return
    deselected = [item for item in items if item.get_closest_marker("guest")]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if not item.get_closest_marker("guest")]


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Several runs of one suite, each in a guest of its own, share its files: with KDAEMON_SHARE=DIRECTORY each takes
    the next file that no other has taken yet, which mkdir(2) decides.
    """
    directory = os.environ.get("KDAEMON_SHARE")
    if directory is None or session.testsfailed or session.config.option.collectonly:
        return None
    files: dict[Path, list[pytest.Item]] = {}
    for item in session.items:
        files.setdefault(item.path, []).append(item)
    for path, items in files.items():
        try:
            Path(directory, "-".join(path.relative_to(ROOT).parts)).mkdir()
        except FileExistsError:
            continue
        for item, following in zip(items, [*items[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)
    return True


@pytest.fixture(scope="session")
def issued(tmp_path_factory: pytest.TempPathFactory) -> Issued:
    """An ECDSA P-256 certificate for localhost and the root that signed it."""
    return issue(tmp_path_factory.mktemp("certificate"))


@pytest.fixture
def make_issued(tmp_path: Path) -> Callable[..., Issued]:
    """`issue()` into a new directory each time: `make_issued("rsa", expired=True)`."""
    numbers = iter(range(1000))

    def make(kind: str = "ecdsa-p256", **options: object) -> Issued:
        return issue(tmp_path / f"certificate-{next(numbers)}", kind, **options)  # type: ignore[arg-type]

    return make


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A directory to serve: `index.html`, `small.txt` (1 KiB), `large.bin` (1 MiB plus 1 byte)."""
    directory = tmp_path / "site"
    directory.mkdir()
    (directory / "index.html").write_bytes(b"<!doctype html><title>kdaemon</title>\n")
    (directory / "small.txt").write_bytes(pattern(1024))
    (directory / "large.bin").write_bytes(pattern((1 << 20) + 1))
    return directory


@pytest.fixture
def kdaemon(site: Path, issued: Issued) -> Iterator[Serve]:
    """Starts daemons: `kdaemon()` serves `site` with `issued`; any argument of `support.daemon.serve` may be given.

    Each is stopped at the end of the test, last first, and its clean end asserted.
    """
    with contextlib.ExitStack() as stack:

        def start(*arguments: str, directory: Path = site, issued: Issued | None = issued, **options: object) -> Daemon:
            return stack.enter_context(serve(directory, *arguments, issued=issued, **options))  # type: ignore[arg-type]

        yield start


@pytest.fixture
def daemon(kdaemon: Serve) -> Daemon:
    """One `kdaemon serve` of `site` with two workers."""
    return kdaemon("--workers", "2")
