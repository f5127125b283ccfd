"""`kdaemon doctor`: what this host gives the daemon, found by trying, and what to do about each lack.

Three kinds of findings: `ok`; `lack`, which keeps the daemon from running; `note`, with which it runs, but with less.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import resource
import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from kdaemon import ktls

State = Literal["ok", "note", "lack"]

NOFILE_COMFORTABLE = 65536
IO_URING_DISABLED = Path("/proc/sys/kernel/io_uring_disabled")
IO_URING_GROUP = Path("/proc/sys/kernel/io_uring_group")
SETUP_SCRIPT = "scripts/setup_ktls.sh"


@dataclass(frozen=True)
class Finding:
    """One fact. remedy: one line, empty for `ok`."""

    group: str
    name: str
    state: State
    detail: str
    remedy: str = ""


@dataclass
class Report:
    """Everything found; `facts` is for machines, `findings` for people and machines."""

    facts: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def can_run(self) -> bool:
        return not any(finding.state == "lack" for finding in self.findings)

    def ok(self, group: str, name: str, detail: str) -> None:
        self.findings.append(Finding(group, name, "ok", detail))

    def note(self, group: str, name: str, detail: str, remedy: str) -> None:
        self.findings.append(Finding(group, name, "note", detail, remedy))

    def lack(self, group: str, name: str, detail: str, remedy: str) -> None:
        self.findings.append(Finding(group, name, "lack", detail, remedy))


def examine() -> Report:
    """Runs every probe. Raises nothing; takes well under a second on an idle machine."""
    report = Report()
    _kernel(report)
    _io_uring(report)
    _ktls(report)
    _record_layer(report)
    _limits(report)
    return report


def _kernel(report: Report) -> None:
    release = platform.release()
    report.facts["kernel"] = release
    report.facts["machine"] = platform.machine()
    # Orientation only: what counts is tried below.
    report.ok("kernel", "release", f"Linux {release} on {platform.machine()}")


# --- io_uring --------------------------------------------------------------------------------------------------------


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _seccomp_filtered() -> bool:
    """Whether a seccomp filter is on this process (proc(5), Seccomp: 2)."""
    try:
        return "Seccomp:\t2" in Path("/proc/self/status").read_text()
    except OSError:
        return False


def _kernel_knows_io_uring() -> bool:
    if IO_URING_DISABLED.exists():
        return True
    with contextlib.suppress(OSError), Path("/proc/kallsyms").open() as symbols:
        return any(" __x64_sys_io_uring_setup" in line or " __do_sys_io_uring_setup" in line for line in symbols)
    return False


def explain_setup_error(
    error: int, *, disabled: int | None, group: int | None, filtered: bool, known: bool
) -> tuple[str, str]:
    """(what keeps io_uring_setup from working, remedy), from its errno and what surrounds it.

    disabled: the sysctl kernel.io_uring_disabled (since 6.6; 0: open, 1: for the group of kernel.io_uring_group and
    for CAP_SYS_ADMIN, 2: nobody); group: that sysctl; None where they are missing.
    filtered: a seccomp filter is on this process. known: the kernel has io_uring.
    """
    name = errno.errorcode.get(error, str(error))
    if error == errno.EPERM and disabled == 2:
        return (
            "the sysctl kernel.io_uring_disabled is 2: off for everybody",
            "as root: sysctl -w kernel.io_uring_disabled=0",
        )
    if error == errno.EPERM and disabled == 1:
        return (
            f"the sysctl kernel.io_uring_disabled is 1: only for members of kernel.io_uring_group ({group})",
            "as root: sysctl -w kernel.io_uring_group=GID, a group of the daemon's account; or io_uring_disabled=0",
        )
    if filtered and (error in (errno.EPERM, errno.EACCES) or (error == errno.ENOSYS and known)):
        return (
            f"a seccomp filter forbids it ({name}), as Docker's default profile does since version 25",
            "docker run --security-opt seccomp=docker/seccomp.json (systemd: SystemCallFilter=@io-uring)",
        )
    if error in (errno.EPERM, errno.EACCES):
        return f"a security module forbids it ({name})", "allow io_uring in SELinux, AppArmor or the sandbox"
    if error == errno.ENOMEM:
        return (
            "the limit on locked memory is too small (ENOMEM)",
            "raise RLIMIT_MEMLOCK: ulimit -l, systemd LimitMEMLOCK=, docker run --ulimit memlock=-1",
        )
    if error == errno.ENOSYS:
        return "this kernel has no io_uring (ENOSYS)", "boot a kernel built with CONFIG_IO_URING, 6.1 or newer"
    if error == errno.EINVAL:
        return "this kernel's io_uring is too old (EINVAL)", "boot a kernel of 6.1 or newer"
    if error in (errno.EMFILE, errno.ENFILE):
        return f"no file descriptor is left ({name})", "raise the limit on open files: ulimit -n"
    return f"io_uring_setup gives {name}", "see io_uring_setup(2)"


def _io_uring(report: Report) -> None:
    facts: dict[str, Any] = {
        "disabled_sysctl": _read_number(IO_URING_DISABLED),
        "group_sysctl": _read_number(IO_URING_GROUP),
        "seccomp_filter": _seccomp_filtered(),
    }
    report.facts["io_uring"] = facts
    try:
        from kdaemon_pyx import probe  # noqa: PLC0415 - a missing engine is a finding, not a traceback
    except ImportError as error:
        report.lack("io_uring", "engine", f"the compiled engine cannot be loaded: {error}", "build it: pip install .")
        return
    failed, features = probe.setup(probe.SETUP_ENGINE)
    facts["defer_taskrun"] = not failed
    if failed == errno.EINVAL:
        failed, features = probe.setup(probe.SETUP_LEAST)
    facts["setup_errno"] = failed
    facts["features"] = features
    if failed:
        what, remedy = explain_setup_error(
            failed,
            disabled=facts["disabled_sysctl"],
            group=facts["group_sysctl"],
            filtered=facts["seccomp_filter"],
            known=_kernel_knows_io_uring(),
        )
        report.lack("io_uring", "setup", what, remedy)
        return
    if features & probe.FEATURES_NEEDED != probe.FEATURES_NEEDED:
        report.lack("io_uring", "setup", f"too old (features {features:#x})", "boot a kernel of 6.1 or newer")
        return
    if facts["defer_taskrun"]:
        report.ok("io_uring", "setup", "with SINGLE_ISSUER and DEFER_TASKRUN")
    else:
        report.note("io_uring", "setup", "without DEFER_TASKRUN: completions interrupt", "boot 6.1 or newer")
    _operations(report, probe, facts)
    _used_features(report, probe, facts)


def _operations(report: Report, probe: ModuleType, facts: dict[str, Any]) -> None:
    try:
        missing = probe.operations_missing()
    except OSError as error:
        report.lack("io_uring", "operations", f"cannot be listed: {error.strerror}", "boot a kernel of 6.1 or newer")
        return
    facts["operations_missing"] = missing
    if missing:
        report.lack("io_uring", "operations", f"missing: {', '.join(missing)}", "boot a kernel of 6.1 or newer")
    else:
        report.ok("io_uring", "operations", f"all {len(probe.OPERATIONS)} that the engine submits")


@contextlib.contextmanager
def _listener() -> Iterator[socket.socket]:
    """A listening socket on the loopback interface, IPv4 or else IPv6. Raises OSError without either."""
    try:
        listener = socket.create_server(("127.0.0.1", 0))
    except OSError:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    with listener:
        listener.settimeout(2)
        yield listener


@contextlib.contextmanager
def _connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    with _listener() as listener, socket.create_connection(listener.getsockname()[:2], timeout=2) as client:
        server, _ = listener.accept()
        with server:
            yield client, server


def _used_features(report: Report, probe: ModuleType, facts: dict[str, Any]) -> None:
    def accept() -> int:
        with _listener() as listener, contextlib.ExitStack() as clients:
            address = listener.getsockname()[:2]
            return int(
                probe.multishot_accept(
                    listener.fileno(), lambda: clients.enter_context(socket.create_connection(address, timeout=2))
                )
            )

    def receive(**how: bool) -> int:
        with _connected() as (client, server):
            return int(probe.receive(server.fileno(), client.sendall, **how))

    def send_zc() -> int:
        with _connected() as (client, _):
            return int(probe.send_zc(client.fileno()))

    def setsockopt() -> int:
        with _connected() as (client, _):
            return int(probe.socket_setsockopt(client.fileno(), socket.IPPROTO_TCP, socket.TCP_NODELAY, 1))

    needed: list[tuple[str, Callable[[], int]]] = [("multishot accept", accept), ("provided buffer ring", receive)]
    useful: list[tuple[str, Callable[[], int], str]] = [
        ("multishot receive", lambda: receive(multishot=True), "6.0"),
        ("zero-copy send", send_zc, "6.0"),
        ("setsockopt as an operation", setsockopt, "6.7"),
        ("receive bundles", lambda: receive(bundle=True), "6.10"),
    ]
    for name, probing in needed:
        failed = facts[name.replace(" ", "_")] = _tried(probing)
        if failed:
            report.lack("io_uring", name, f"fails with {failed}", "boot a kernel of 6.1 or newer")
        else:
            report.ok("io_uring", name, "works")
    for name, probing, since in useful:
        failed = facts[name.replace(" ", "_").replace("-", "_")] = _tried(probing)
        if failed:
            report.note("io_uring", name, f"not here ({failed})", f"nothing needs it; mainline has it since {since}")
        else:
            report.ok("io_uring", name, "works")


def _tried(probing: Callable[[], int]) -> str | None:
    """None if it works, else the errno's name."""
    try:
        failed = probing()
    except OSError as error:
        failed = error.errno or errno.EIO
    return errno.errorcode.get(failed, str(failed)) if failed else None


# --- kTLS ------------------------------------------------------------------------------------------------------------


def _ktls(report: Report) -> None:
    support = ktls.probe()
    report.facts["ktls"] = {
        "available": support.available,
        "reason": support.reason,
        "suites": [ktls.SUITE_NAMES[suite] for suite in sorted(support.suites)],
        "refused": {ktls.SUITE_NAMES[suite]: why for suite, why in support.refused.items()},
        "rekey": support.rekey,
        "expect_no_pad": support.expect_no_pad,
        "tx_zerocopy_ro": support.tx_zerocopy_ro,
        "tx_max_payload": support.tx_max_payload,
        "ulps": ktls.available_ulps(),
    }
    if not support.available:
        remedies = {
            "no-ulp": f"{SETUP_SCRIPT} says which: load the module (modprobe tls) or boot a kernel with CONFIG_TLS",
            "forbidden": "allow setsockopt(TCP_ULP) in the container's or service's sandbox",
            "no-cipher": f"load the kernel's AEAD modules: {SETUP_SCRIPT}",
            "no-loopback": "bring the loopback interface up: ip link set lo up",
        }
        report.note("ktls", "record layer", f"user space only: {support.detail}", remedies[support.reason])
        return
    report.ok("ktls", "record layer", "the kernel's")
    for suite, name in ktls.SUITE_NAMES.items():
        if suite in support.suites:
            report.ok("ktls", name, "both directions")
        else:
            report.note("ktls", name, f"not here ({support.refused[suite]})", f"load its module: {SETUP_SCRIPT}")
    options = [
        ("rekey", support.rekey, "a KeyUpdate is followed", "a KeyUpdate ends the connection in order", "6.14"),
        ("expect_no_pad", support.expect_no_pad, "records are decrypted in place", "one copy more per record", "6.0"),
        ("tx_max_payload", support.tx_max_payload, "the kernel can limit its record size", "not limited", "6.19"),
    ]
    for option, available, with_it, without, since in options:
        if available:
            report.ok("ktls", option, with_it)
        else:
            report.note("ktls", option, without, f"mainline has it since {since}")


# --- limits ----------------------------------------------------------------------------------------------------------


def _record_layer(report: Report) -> None:
    """What seals records by AES-GCM where the kernel does not."""
    try:
        from kdaemon_pyx import gcm  # noqa: PLC0415 - a missing engine is a finding of its own
    except ImportError as error:
        report.note("record layer", "AES-GCM", str(error), "build the engine; set KDAEMON_GCM to avx2 or libcrypto")
        return
    report.facts["aes_gcm"] = gcm.IMPLEMENTATION
    if gcm.IMPLEMENTATION == "libcrypto":
        report.note(
            "record layer", "AES-GCM", "by libcrypto", "for less CPU on x86-64: apt install libipsec-mb1 (needs AVX2)"
        )
    else:
        report.ok("record layer", "AES-GCM", f"by libIPSec_MB ({gcm.IMPLEMENTATION})")


def _limits(report: Report) -> None:
    facts: dict[str, Any] = {}
    report.facts["limits"] = facts
    for name, number in (("nofile", resource.RLIMIT_NOFILE), ("memlock", resource.RLIMIT_MEMLOCK)):
        soft, hard = (None if value == resource.RLIM_INFINITY else value for value in resource.getrlimit(number))
        facts[name] = {"soft": soft, "hard": hard}
    hard_files = facts["nofile"]["hard"]
    if hard_files is None or hard_files >= NOFILE_COMFORTABLE or os.geteuid() == 0:
        report.ok("limits", "open files", f"{_shown(facts['nofile']['soft'])}, may be raised to {_shown(hard_files)}")
    else:
        report.note(
            "limits", "open files", f"at most {hard_files}: one is used per connection",
            f"{SETUP_SCRIPT}; systemd: LimitNOFILE={NOFILE_COMFORTABLE}; docker: --ulimit nofile={NOFILE_COMFORTABLE}",
        )  # fmt: skip
    # Since 5.12 a uring's own memory is the cgroup's; only registered buffers count against this limit.
    report.ok("limits", "locked memory", f"{_shown(facts['memlock']['hard'])} bytes")
    facts["cpus"] = len(os.sched_getaffinity(0))
    report.ok("limits", "CPUs", f"{facts['cpus']} usable: as many workers by default")


def _shown(value: int | None) -> str:
    return "unlimited" if value is None else str(value)


# --- output ----------------------------------------------------------------------------------------------------------


def as_json(report: Report) -> str:
    document = {"can_run": report.can_run, **report.facts, "findings": [asdict(finding) for finding in report.findings]}
    return json.dumps(document, indent=2)


def as_text(report: Report) -> str:
    lines = []
    width = max(len(finding.name) for finding in report.findings)
    group = ""
    for finding in report.findings:
        if finding.group != group:
            group = finding.group
            lines.append(group)
        lines.append(f"  {finding.state:<5} {finding.name:<{width}}  {finding.detail}")
        if finding.remedy:
            lines.append(f"  {'':<5} {'':<{width}}  -> {finding.remedy}")
    backend = "the kernel's record layer" if report.facts["ktls"]["available"] else "its own record layer in user space"
    lines.append(f"kdaemon can run here, with {backend}" if report.can_run else "kdaemon cannot run here: see lack")
    return "\n".join(lines)


def main(json_wanted: bool) -> int:
    """Prints the report. Exit status: 0 if the daemon can run here, 1 if not."""
    report = examine()
    print(as_json(report) if json_wanted else as_text(report))
    return 0 if report.can_run else 1
