"""The client service against a fuzzing client beside an honest one; benchmarks/rings/fuzz.py runs it for longer."""

from __future__ import annotations

from typing import Any

import pytest
from kdaemon_pyx import client_abi as abi
from kdaemon_pyx.client_harness import Harness

ENTRIES = 1_000_000


def check(report: dict[str, Any]) -> None:
    """What holds for every run: enough was run, of every kind, and refused, for every reason."""
    assert report["entries"] >= 0.99 * ENTRIES
    assert report["accepted"] >= 0.3 * report["entries"]
    never = {opcode for opcode, count in enumerate(report["succeeded"]) if not count}
    assert not never, f"no success of {[abi.OPCODE_NAMES[opcode] for opcode in never]}"
    refusals = {
        "Invalid argument",
        "Bad file descriptor",
        "Device or resource busy",
        "Too many open files",
        "No buffer space available",
    }
    assert refusals | {"Operation canceled", "Connection timed out"} <= set(report["results"])
    assert report["cut_off"]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_mutated_submissions(seed: int) -> None:
    check(Harness().fuzz(ENTRIES, seed))


@pytest.mark.parametrize("seed", [4, 5])
def test_while_another_thread_rewrites_the_entries(seed: int) -> None:
    check(Harness().fuzz(ENTRIES, seed, rewrite=True))
