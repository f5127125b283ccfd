"""Adds up the JUnit files of several pytest runs and prints one summary, as pytest prints its own.

Usage: summary.py SECONDS NAME=FILE... NAME!=REASON...    NAME!=REASON is a phase that failed as a whole.
Exit status: 0 if something passed and nothing failed, 1 otherwise.
"""

import sys
from collections import Counter
from xml.etree import ElementTree


def add_up(name: str, path: str, counts: Counter[str], failures: list[str]) -> None:
    try:
        cases = list(ElementTree.parse(path).iter("testcase"))
    except (OSError, ElementTree.ParseError) as error:
        counts["error"] += 1
        failures.append(f"ERROR {name}: no results ({error})")
        return
    for case in cases:
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        outcome = {"failure": "failed", "error": "error", "skipped": "skipped"}[min(kinds)] if kinds else "passed"
        counts[outcome] += 1
        if outcome in ("failed", "error"):
            failures.append(f"{outcome.upper()} [{name}] {case.get('classname')}::{case.get('name')}")


def main() -> int:
    seconds, *phases = sys.argv[1:]
    counts: Counter[str] = Counter()
    failures: list[str] = []
    for phase in phases:
        name, _, value = phase.partition("=")
        if name.endswith("!"):
            counts["failed"] += 1
            failures.append(f"FAILED {name[:-1]}: {value}")
        else:
            add_up(name, value, counts, failures)
    print(*failures, sep="\n", end="\n" if failures else "")
    bad = counts["failed"] + counts["error"]
    shown = [f"{counts[kind]} {kind}" for kind in ("failed", "passed", "skipped", "error") if counts[kind]]
    text = ", ".join(shown) or "no tests ran"
    print(f" {text} in {seconds}s ".center(100, "="))
    return 0 if counts["passed"] and not bad else 1


if __name__ == "__main__":
    sys.exit(main())
