"""scripts/setup_ktls.sh on a kernel whose TLS modules are not loaded yet: told, loaded, told again."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdaemon import ktls

pytestmark = [pytest.mark.guest, pytest.mark.guest_core]

SCRIPT = Path(__file__).resolve().parent.parent.parent / "scripts" / "setup_ktls.sh"
PERSISTENT = Path("/etc/modules-load.d/kdaemon-ktls.conf")
MODULES = ("tls", "chacha20poly1305")


def setup_ktls(*arguments: str) -> tuple[int, list[str]]:
    result = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert result.stderr == ""
    return result.returncode, result.stdout.splitlines()


def loaded() -> set[str]:
    return {line.split()[0] for line in Path("/proc/modules").read_text().splitlines()}


@pytest.fixture
def unprepared() -> Iterator[None]:
    """Unloads the modules. Only ever in a guest, whose files and modules are thrown away."""
    if "KDAEMON_GUEST" not in os.environ:
        pytest.skip("would unload modules of this machine")
    PERSISTENT.unlink(missing_ok=True)
    subprocess.run(["modprobe", "-r", *MODULES], check=True)
    assert not loaded() & set(MODULES)
    yield
    subprocess.run(["modprobe", "-a", *MODULES], check=True)


def test_it_prepares_once_and_then_has_nothing_to_do(unprepared: None) -> None:
    status, first = setup_ktls()
    assert status == 0, first
    assert any(line.startswith("did   loaded the module chacha20poly1305") for line in first)
    assert any(line.startswith("did   wrote /etc/modules-load.d/") for line in first)
    assert first[-1] == "this host is ready for kernel TLS"
    assert PERSISTENT.read_text().split("\n")[1:] == ["tls", "gcm", "chacha20poly1305", ""]
    assert ktls.probe().available

    before = PERSISTENT.stat()
    status, second = setup_ktls()
    assert status == 0, second
    assert not [line for line in second if line.startswith(("did", "lack"))]
    assert PERSISTENT.stat().st_mtime_ns == before.st_mtime_ns


def test_check_changes_nothing(unprepared: None) -> None:
    status, lines = setup_ktls("--check")
    assert not PERSISTENT.exists()
    assert "chacha20poly1305" not in loaded()
    assert not [line for line in lines if line.startswith("did")]
    # Trying a socket may have made the kernel load tls by itself: then nothing is lacking.
    assert status in (0, 1)
    lacks = [index for index, line in enumerate(lines) if line.startswith("lack")]
    assert bool(lacks) == (status == 1)
    for index in lacks:
        assert lines[index + 1].strip().startswith("remedy: ")


def test_a_wrong_argument_is_a_usage_error() -> None:
    result = subprocess.run([SCRIPT, "--chekc"], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert "--chekc" in result.stderr
