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


def _figure(measured: Measured, name: str) -> str:
    work = measured.work(name)
    if measured.case.mode == "echo":
        return f"{work:,.0f} messages"
    return f"{work / 1e6:,.0f} MB ({1e9 / work:.2f} s/GB)"
