"""Shows that the fuzzing client takes every branch of the client service's validation.

    python -m benchmarks.rings.branches [ENTRIES]

Builds the service with gcov's counters, fuzzes it, and looks at both outcomes of every condition in the functions that
judge what a client wrote. Exit status 1 names those that were never taken, except the ones that no client can bring
about (OUT_OF_REACH, each with its reason).
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.rings import variants

ENTRIES = 3_000_000
# Where submissions, parameters, handles and indices of a client are judged.
VALIDATING = {
    "client_operations": {
        "opcode_accepts",
        "validate",
        "client_submit",
        "parameters_valid",
        "start_control",
        "cancel_target",
        "client_expire",
        "run_held",
        "client_run_ready",
    },
    "client_queue": {"client_next_submission", "client_fetch_parameters"},
    "client_endpoint": {"client_endpoint_new", "client_endpoint_find"},
}
_NO_MEMORY = "the host has no memory"
_NO_TOKEN = "all 65,536 tokens are in use: more than the clients of a worker may have"
# (function, what the line contains): what no client can bring about.
OUT_OF_REACH = {
    ("start_control", "event == NULL"): _NO_MEMORY,
    ("start_control", "event.data == NULL"): _NO_MEMORY,
    ("start_control", "-ENOMEM"): _NO_MEMORY,
    ("start_control", "return"): _NO_MEMORY,
    ("start_control", "error = -EMFILE"): _NO_TOKEN,
    ("start_control", "opening.binding == 0:"): _NO_TOKEN,
    ("start_control", "if on_ring:"): _NO_TOKEN,
    ("start_control", "client_endpoint_free(client, opening)"): _NO_TOKEN,
    ("start_control", "event.timeout_ns ="): "a deadline that has passed ends the operation before it starts",
}
_FUNCTION = re.compile(r"cdef .*?(\w+)\(.*(?:nogil:|,|\($)")


def counters(folder: Path, module: str) -> list[tuple[str, int, int, list[int]]]:
    """(function, line, how often it ran, how often each branch was taken) of a module's Cython source."""
    notes = next((folder / "kdaemon_pyx").glob(f"*-{module}.gcno"))
    command = ["gcov", "--json-format", "--stdout", "--branch-probabilities", str(notes)]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    report: dict[str, Any] = json.loads(done.stdout)
    file = next(file for file in report["files"] if file["file"] == f"kdaemon_pyx/{module}.pyx")
    starts = {}
    source = (variants.SOURCES / f"{module}.pyx").read_text().splitlines()
    for line_number, text in enumerate(source, 1):
        if match := _FUNCTION.match(text):
            starts[line_number] = match.group(1)
    result = []
    for line in file["lines"]:
        start = max((number for number in starts if number < line["line_number"]), default=0)
        # A function's first line, and those behind the file's end, are what Cython adds.
        if start and line["line_number"] not in starts and line["line_number"] <= len(source):
            branches = [branch["count"] for branch in line["branches"]]
            result.append((starts[start], line["line_number"], line["count"], branches))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entries", type=int, nargs="?", default=ENTRIES)
    parser.add_argument("--folder", type=Path, help="where the build is kept")
    arguments = parser.parse_args()
    folder = (arguments.folder or Path(tempfile.mkdtemp(prefix="kdaemon-coverage-"))).resolve()
    for old in folder.glob("kdaemon_pyx/*.gcda"):
        old.unlink()
    variants.build("coverage", folder)
    half = str(arguments.entries // 2)
    for options in ([], ["--rewrite"]):
        variants.run("coverage", folder, ["-m", "benchmarks.rings.fuzz", half, "1", *options])
    taken, missed = 0, []
    for module, functions in VALIDATING.items():
        source = (variants.SOURCES / f"{module}.pyx").read_text().splitlines()
        outcomes: dict[tuple[str, int], list[int]] = defaultdict(list)
        for name, number, count, branches in counters(folder, module):
            if name in functions:
                outcomes[name, number] += branches or [count]
        for (name, number), counts in sorted(outcomes.items()):
            text = source[number - 1].strip()
            taken += sum(count > 0 for count in counts)
            if 0 in counts and not any(name == function and part in text for function, part in OUT_OF_REACH):
                missed.append(f"{module}.pyx:{number}: {name}: {counts.count(0)} of {len(counts)} never: {text}")
    print(f"{taken} branches taken by {arguments.entries:,} entries")
    for line in missed:
        print(line)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
