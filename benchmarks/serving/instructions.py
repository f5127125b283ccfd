"""Instructions per request in user mode: by perf where the machine counts them, else stepped one by one."""

from __future__ import annotations

import http.client
import os
import ssl
import subprocess
from pathlib import Path

from benchmarks.serving.cases import Case
from benchmarks.serving.conditions import Conditions
from benchmarks.serving.perf_counts import INSTRUCTIONS, CountError, can_count, per_unit
from benchmarks.serving.servers import Server

SOURCE = Path(__file__).with_name("instructions.c")
STEPPED_REQUESTS = 10  # one at a time, on one connection


def instructions_per_request(server: Server, case: Case, conditions: Conditions) -> float:
    if can_count(INSTRUCTIONS):
        return per_unit(server, case, conditions, INSTRUCTIONS)
    return _stepped(server, case, conditions)


def _stepped(server: Server, case: Case, conditions: Conditions) -> float:
    program = conditions.generator.with_name("instructions")
    if not program.exists():
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, "-std=gnu11", "-O2", "-o", str(program), str(SOURCE)], check=True)
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # what is served has been verified
    connection = http.client.HTTPSConnection(*server.address, context=context)

    def ask() -> None:
        connection.request("GET", f"/{case.file.name}")
        if len(connection.getresponse().read()) != case.file.size:
            raise CountError(f"{server.name} answered with something else")

    ask()
    with subprocess.Popen(
        [str(program), *map(str, server.account.pids())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # Beside what it stops and starts: from one core to another each step takes twice as long
        preexec_fn=lambda: os.sched_setaffinity(0, server.cpus),  # noqa: PLW1509 - this program has one thread
    ) as stepping:
        assert stepping.stdout is not None
        if stepping.stdout.readline() != "counting\n":
            raise CountError("the processes cannot be traced (ptrace)")
        for _ in range(STEPPED_REQUESTS):
            ask()
        counted, _ = stepping.communicate("\n")
    connection.close()
    return float(counted) / STEPPED_REQUESTS
