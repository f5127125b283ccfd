"""Shows that the fuzzing client takes every branch of the client service's validation.

    python -m benchmarks.rings.branches [ENTRIES]

Builds the service with gcov's counters, fuzzes it, and looks at both outcomes of every condition in the functions that
judge what a client wrote. Exit status 1 names those that were never taken, except the ones that need a host out of
memory or a broken control thread.
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
# Where a client's submissions, parameters, handles and indices are judged and carried out.
VALIDATING = {
    "client_operations": None,  # all of it
    "client_queue": {"client_next_submission", "client_has_submissions", "client_fetch_parameters"},
    "client_endpoint": {
        "client_endpoint_new",
        "client_endpoint_find",
        "client_endpoint_free",
        "client_finish",
        "carry_out_close",
        "client_pump_writes",
        "fail_writes",
        "client_cancel_writes_behind",
        "client_match_accepts",
    },
}
# (function, what the line contains): an outcome of its condition that no client can bring about.
OUT_OF_REACH = {
    ("start_control", "event == NULL"): "no memory",
    ("start_control", "event.data == NULL"): "no memory",
    (
        "start_control",
        "opening.binding == 0:",
    ): "all 65,536 tokens are in use: more than the clients of a worker may have",
    ("start_close", "event == NULL"): "no memory",
    ("start_close", "event != NULL"): "no memory",
    ("cancel", "event == NULL"): "no memory",
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
            if functions is None or name in functions:
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
