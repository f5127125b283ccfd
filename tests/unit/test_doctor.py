"""kdaemon doctor: what it says of this machine is what the machine does; each way to lack io_uring is told apart."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kdaemon_pyx import gcm

from kdaemon import doctor, ktls

ROOT = Path(__file__).resolve().parent.parent.parent


def run_doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "pyx")])}
    return subprocess.run(
        [sys.executable, "-m", "kdaemon", "doctor", *arguments],
        capture_output=True, text=True, env=environment, timeout=60, check=False,
    )  # fmt: skip


def test_json_and_text_say_the_same_and_the_status_follows() -> None:
    result = run_doctor("--json")
    document = json.loads(result.stdout)
    assert result.returncode == (0 if document["can_run"] else 1)
    assert document["can_run"] == (not any(finding["state"] == "lack" for finding in document["findings"]))
    assert document["kernel"] == os.uname().release
    text = run_doctor().stdout
    for finding in document["findings"]:
        assert finding["name"] in text
        assert (finding["state"] == "ok") == (finding["remedy"] == "")
        assert "\n" not in finding["remedy"]


def test_this_machine_can_run_the_daemon() -> None:
    """The development and CI machines have io_uring; every operation the engine submits is tried."""
    report = doctor.examine()
    assert report.can_run, [finding for finding in report.findings if finding.state == "lack"]
    assert report.facts["io_uring"]["operations_missing"] == []
    assert report.facts["io_uring"]["multishot_accept"] is None
    assert report.facts["io_uring"]["provided_buffer_ring"] is None


def test_what_seals_records_is_named() -> None:
    report = doctor.examine()
    assert report.facts["aes_gcm"] == gcm.IMPLEMENTATION
    (finding,) = [finding for finding in report.findings if finding.name == "AES-GCM"]
    assert ("libcrypto" in finding.detail) == (gcm.IMPLEMENTATION == "libcrypto")


def test_ktls_is_reported_as_probed() -> None:
    support = ktls.probe()
    facts = doctor.examine().facts["ktls"]
    assert facts["available"] == support.available
    assert facts["reason"] == support.reason
    assert len(facts["suites"]) == len(support.suites)


@pytest.mark.parametrize(
    ("error", "surroundings", "expected"),
    [
        (errno.EPERM, {"disabled": 2}, "io_uring_disabled is 2"),
        (errno.EPERM, {"disabled": 2, "filtered": True}, "io_uring_disabled is 2"),
        (errno.EPERM, {"disabled": 1, "group": 977}, "io_uring_group (977)"),
        (errno.EPERM, {"filtered": True}, "seccomp"),
        (errno.ENOSYS, {"filtered": True}, "seccomp"),
        (errno.ENOSYS, {"filtered": True, "known": False}, "has no io_uring"),
        (errno.ENOSYS, {"known": False}, "has no io_uring"),
        (errno.EPERM, {}, "security module"),
        (errno.ENOMEM, {"filtered": True}, "locked memory"),
        (errno.EINVAL, {}, "too old"),
        (errno.EMFILE, {}, "file descriptor"),
    ],
)
def test_each_way_to_lack_io_uring_is_told_apart(error: int, surroundings: dict[str, object], expected: str) -> None:
    given = {"disabled": 0, "group": -1, "filtered": False, "known": True} | surroundings
    what, remedy = doctor.explain_setup_error(error, **given)  # type: ignore[arg-type]
    assert expected in what
    assert remedy
    assert "\n" not in remedy


def test_a_seccomp_filter_is_recognised() -> None:
    """A real filter on io_uring_setup, put on the child by libseccomp's kernel interface, as Docker does."""
    filtered = """
import ctypes, struct, sys
# BPF: load the system call's number; io_uring_setup (425) gives EPERM, all else is allowed.
lines = [(0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]
program = b"".join(struct.pack("=HBBI", *line) for line in lines)
buffer = ctypes.create_string_buffer(program)
fprog = struct.pack("=HxxxxxxQ", 4, ctypes.addressof(buffer))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, fprog, 0, 0) == 0
sys.path[:0] = sys.argv[1:]
from kdaemon import doctor
sys.exit(doctor.main(True))
"""
    result = subprocess.run(
        [sys.executable, "-c", filtered, str(ROOT), str(ROOT / "pyx")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == 1, result.stderr
    [lack] = [finding for finding in json.loads(result.stdout)["findings"] if finding["state"] == "lack"]
    assert lack["name"] == "setup"
    assert "seccomp" in lack["detail"]
    assert "docker/seccomp.json" in lack["remedy"]


def test_too_few_open_files_is_a_note_for_an_ordinary_account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda _: (1024, 1024))
    [found] = [finding for finding in doctor.examine().findings if finding.name == "open files"]
    assert found.state == "note"
    assert "1024" in found.detail
    assert "LimitNOFILE" in found.remedy
