"""Counts events of running processes: system calls and instructions with perf, system calls with strace without it."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
from collections.abc import Sequence

from benchmarks.serving.cases import Case
from benchmarks.serving.conditions import Conditions, case_load
from benchmarks.serving.load import run
from benchmarks.serving.servers import Server

_DEADLINE_S = 30.0


SYSTEM_CALLS = "raw_syscalls:sys_enter"
INSTRUCTIONS = "instructions:u"


class CountError(Exception):
    """perf is not there, or may not count."""


class PerfAccount:
    """An account for load.run: the first call begins to count `event`, the second ends it and returns the number."""

    def __init__(self, pids: Sequence[int], event: str) -> None:
        if shutil.which("perf") is None:
            raise CountError("perf is not installed (Debian package linux-perf)")
        self._event = event
        self._begun = False
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        command = ["perf", "stat", "-x", ",", "-e", event, "-p", ",".join(map(str, pids))]
        self._process = subprocess.Popen(
            [*command, "-D", "-1", "--control", f"fd:{commands},{answers}"],  # begins when told, and says so
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=(commands, answers),
        )
        os.close(commands)
        os.close(answers)

    def __call__(self) -> float:
        if not self._begun:
            self._begun = True
            os.write(self._commands, b"enable\n")
            readable, _, _ = select.select([self._answers], [], [], _DEADLINE_S)
            if not readable or not os.read(self._answers, 16):
                self.close()
                raise CountError(f"perf does not answer: may this user count {self._event}?")
            return 0.0
        self._process.send_signal(signal.SIGINT)
        _, said = self._process.communicate(timeout=_DEADLINE_S)
        self.close()
        counts = [line.split(",")[0] for line in said.splitlines() if self._event in line]
        if len(counts) != 1 or not counts[0].isdigit():
            raise CountError(f"perf counted nothing: {said.strip()}")
        return float(counts[0])

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for descriptor in (self._commands, self._answers):
            os.close(descriptor)


class StraceAccount:
    """The same for system calls by strace -c, where the kernel has no tracepoints: it stops at each one."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._command = ["strace", "-c", "-f", *(part for pid in pids for part in ("-p", str(pid)))]
        self._process: subprocess.Popen[str] | None = None

    def __call__(self) -> float:
        if self._process is None:
            self._process = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True)
            assert self._process.stderr is not None
            if "attached" not in (line := self._process.stderr.readline()):
                raise CountError(f"strace says: {line.strip()}")
            return 0.0
        self._process.send_signal(signal.SIGINT)
        _, said = self._process.communicate(timeout=_DEADLINE_S)
        totals = [line.split() for line in said.splitlines() if line.endswith(" total")]
        if len(totals) != 1:
            raise CountError(f"strace counted nothing: {said.strip()}")
        return float(totals[0][3])


def can_count(event: str) -> bool:
    """A virtual machine may have no performance counters."""
    if shutil.which("perf") is None:
        return False
    said = subprocess.run(["perf", "stat", "-x", ",", "-e", event, "true"], capture_output=True, text=True, check=False)
    return any(event in line and line.split(",")[0].isdigit() for line in said.stderr.splitlines())


def per_unit(server: Server, case: Case, conditions: Conditions, event: str) -> float:
    """Events in all the server's processes for one unit of the case's work, in one run of its own."""
    pids = server.account.pids()
    by_strace = event == SYSTEM_CALLS and not can_count(event)
    counting = StraceAccount(pids) if by_strace else PerfAccount(pids, event)
    result = run(conditions.generator, server.address, case_load(case, conditions), conditions.cpu, counting)
    return result.used / case.work(result)
