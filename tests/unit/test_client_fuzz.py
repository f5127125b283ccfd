"""The client service against a fuzzing client (invariant 6); benchmarks/rings/fuzz runs the same for longer."""

from __future__ import annotations

import pytest
from kdaemon_pyx import client_abi as abi
from kdaemon_pyx.client_harness import Harness

ENTRIES = 1_000_000


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_mutated_submissions(seed: int) -> None:
    report = Harness().fuzz(ENTRIES, seed)
    accepted, entries = report["accepted"], report["entries"]
    assert isinstance(accepted, int)
    assert isinstance(entries, int)
    assert accepted >= 0.3 * entries
    succeeded = report["succeeded"]
    assert isinstance(succeeded, list)
    never = {opcode for opcode, count in enumerate(succeeded) if not count} - {abi.EXPORT}
    assert not never, f"no success of {[abi.OPCODE_NAMES[opcode] for opcode in never]}"
    results = report["results"]
    assert isinstance(results, dict)
    assert {"Invalid argument", "Bad file descriptor", "Device or resource busy", "Operation canceled"} <= set(results)
    assert report["cut_off"]


def test_while_another_thread_rewrites_the_entries() -> None:
    report = Harness().fuzz(ENTRIES // 5, 4, rewrite=True)
    assert isinstance(report["entries"], int)
    assert report["entries"] >= 0.9 * ENTRIES // 5
