"""Counts the system calls of running processes with perf's tracepoint, far cheaper than stopping at each."""

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


class SystemCallsError(Exception):
    """perf is not there, or may not count."""


class SystemCallAccount:
    """An account for load.run: the first call begins to count, the second ends it and returns how many there were."""

    def __init__(self, pids: Sequence[int]) -> None:
        if shutil.which("perf") is None:
            raise SystemCallsError("perf is not installed (Debian package linux-perf)")
        self._begun = False
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        command = ["perf", "stat", "-x", ",", "-e", "raw_syscalls:sys_enter", "-p", ",".join(map(str, pids))]
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
                raise SystemCallsError("perf does not answer: may this user use the tracepoint raw_syscalls:sys_enter?")
            return 0.0
        self._process.send_signal(signal.SIGINT)
        _, said = self._process.communicate(timeout=_DEADLINE_S)
        self.close()
        counts = [line.split(",")[0] for line in said.splitlines() if "sys_enter" in line]
        if len(counts) != 1 or not counts[0].isdigit():
            raise SystemCallsError(f"perf counted nothing: {said.strip()}")
        return float(counts[0])

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for descriptor in (self._commands, self._answers):
            os.close(descriptor)


def system_calls_per_unit(server: Server, case: Case, conditions: Conditions) -> float:
    """System calls of all the server's processes for one unit of the case's work, in one run of its own."""
    counting = SystemCallAccount(server.account.pids())
    result = run(conditions.generator, server.address, case_load(case, conditions), conditions.cpu, counting)
    return result.used / case.work(result)
