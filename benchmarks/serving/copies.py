"""How often the kernel copies each byte that a server sends over kTLS, by probes in the kernel.

Counted: what a read copies from the page cache into the server's memory, and what the record layer copies from there
into a record of its own, instead of encrypting it from where it lies. Not counted: the encryption, which reads in one
place and writes in another anyway; copies inside the server, which are those of small bodies behind their heads.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from benchmarks.serving.cases import Case
from benchmarks.serving.conditions import Conditions, case_load
from benchmarks.serving.load import run
from benchmarks.serving.perf_counts import CountError
from benchmarks.serving.servers import Server

TRACING = Path("/sys/kernel/tracing")
GROUP = "kdaemon_benchmark"
# x86-64: the record layer's copy has its length in the fourth argument
PROBES = {
    "file": "r:{group}/file filemap_read copied=$retval:s64",
    "tmpfs": "r:{group}/tmpfs shmem_file_read_iter copied=$retval:s64",
    "record": "p:{group}/record sk_msg_memcopy_from_iter copied=%cx:u32",
}
SUM = "hist:keys=common_pid:vals=copied if copied > 0"


def _append(command: str) -> None:
    """To the list of probes. (Python's append mode seeks, which this file refuses.)"""
    descriptor = os.open(TRACING / "kprobe_events", os.O_WRONLY | os.O_APPEND)
    try:
        os.write(descriptor, command.encode() + b"\n")
    finally:
        os.close(descriptor)


class _Probes:
    """An account for load.run: bytes copied since the first call."""

    def __init__(self) -> None:
        if not (TRACING / "kprobe_events").exists():
            subprocess.run(["mount", "-t", "tracefs", "none", str(TRACING)], check=False, capture_output=True)
        try:
            for name, probe in PROBES.items():
                _append(probe.format(group=GROUP))
                self._event(name, "trigger").write_text(SUM)
        except OSError as error:
            self.close()
            raise CountError(f"this kernel cannot be probed ({error}): root, kprobes and kTLS are needed") from error
        self._counting = False

    @staticmethod
    def _event(name: str, file: str) -> Path:
        return TRACING / "events" / GROUP / name / file

    def __call__(self) -> float:
        if not self._counting:
            self._counting = True
            for name in PROBES:
                self._event(name, "trigger").write_text(SUM)  # opened to write, the file forgets the sum before
            return 0.0
        return float(
            sum(
                int(copied)
                for name in PROBES
                for copied in re.findall(r"copied:\s*(\d+)", self._event(name, "hist").read_text())
            )
        )

    def close(self) -> None:
        for name in PROBES:
            try:
                self._event(name, "trigger").write_text("")
            except OSError:
                pass
            try:
                _append(f"-:{GROUP}/{name}")
            except OSError:
                pass


def copies_per_byte(server: Server, case: Case, conditions: Conditions) -> float:
    probes = _Probes()
    try:
        result = run(conditions.generator, server.address, case_load(case, conditions), conditions.cpu, probes)
    finally:
        probes.close()
    return result.used / result.bytes
