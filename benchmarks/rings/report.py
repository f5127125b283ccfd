"""Tables of what was measured."""

from __future__ import annotations

from benchmarks.rings.measure import BUSY, Measured

MARK = 1.5  # libtls through Python, work per CPU-second to that of uvloop with ssl


def table(found: list[Measured]) -> str:
    """A row per case; the first program's own figure, then the others as ratios to it. `!`: the load was too busy."""
    if not found:
        return ""
    names = list(found[0].rounds)
    head = ["case", f"{names[0]} per CPU-s", *names[1:]]
    lines = [head, ["---"] * len(head)]
    for measured in found:
        row = [measured.case.name, _figure(measured, names[0])]
        for name in names[1:]:
            busy = max(one.load_busy for one in measured.rounds[name]) > BUSY
            row.append(f"{measured.ratio(name, names[0]):.2f}{'!' if busy else ''}")
        lines.append(row)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables(found: list[Measured]) -> str:
    """A table per mode: not every program has every mode."""
    modes = dict.fromkeys(measured.case.mode for measured in found)
    return "\n\n".join(table([measured for measured in found if measured.case.mode == mode]) for mode in modes)


def system_calls(cases: list[str], calls: list[dict[str, float]]) -> str:
    """Per operation: a message is two, one READ and one WRITE."""
    lines = [["system calls per operation", *calls[0]], ["---"] * (1 + len(calls[0]))]
    lines += [[case, *(f"{count:.3f}" for count in row.values())] for case, row in zip(cases, calls, strict=True)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _figure(measured: Measured, name: str) -> str:
    work = measured.work(name)
    if measured.case.mode == "echo":
        return f"{work:,.0f} messages"
    return f"{work / 1e6:,.0f} MB ({1e9 / work:.2f} s/GB)"
