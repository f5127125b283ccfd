"""A file that nobody asks for any more is let go of, though no request comes: a deleted file gives its space back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from interop.process_support import pid_of
from support.clients import fetch
from support.daemon import Daemon, status
from support.waiting import eventually

Serve = Callable[..., Daemon]


def held(pid: int, name: str) -> list[str]:
    links = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            links.append(str(descriptor.readlink()))
        except OSError:  # closed meanwhile
            continue
    return [link for link in links if name in link]


def test_an_idle_daemon_closes_files(kdaemon: Serve, site: Path, tmp_path: Path) -> None:
    configuration = tmp_path / "kdaemon.toml"
    configuration.write_text("[http]\nentry_unused_ms = 300\n")
    daemon = kdaemon("--workers", "1", "--config", str(configuration))
    worker = pid_of(daemon, "worker")
    assert fetch(daemon.address, daemon.ca, "/large.bin").status == 200
    assert fetch(daemon.address, daemon.ca, "/is-not-there").status == 404
    (site / "large.bin").unlink()
    eventually(lambda: not held(worker, "large.bin"), "the deleted file is closed")

    def remembered() -> int:
        files = status(daemon)["workers"][0]["files"]  # type: ignore[index]
        return int(files["file_entries"] + files["file_names_missing"])

    eventually(lambda: remembered() == 0, "nothing is remembered")
    assert fetch(daemon.address, daemon.ca, "/large.bin").status == 404


def test_what_is_asked_for_is_kept(kdaemon: Serve) -> None:
    daemon = kdaemon("--workers", "1")
    worker = pid_of(daemon, "worker")
    assert fetch(daemon.address, daemon.ca, "/large.bin").status == 200
    assert held(worker, "large.bin")
