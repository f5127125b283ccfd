"""CPU seconds and memory of all processes of one server together.

A control group (version 1 or 2) counts everything, short-lived processes, io_uring's kernel workers and kernel memory
included. Where none can be made, /proc is summed instead: CPU from each thread's stat, memory from each process's
proportional set size plus the growth of the whole system's slab, which is only right on a quiet machine.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def _fields(path: Path) -> dict[str, int]:
    """`name value` lines, as in memory.stat."""
    pairs = (line.split() for line in path.read_text().splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


class Account(ABC):
    """What one server has used."""

    method: str
    limits_memory = False

    def limit_memory(self, limit_bytes: int | None) -> None:
        """No more than that for all of it together, or as much as there is. Only where `limits_memory`."""
        raise NotImplementedError(self.method)

    @abstractmethod
    def enter(self) -> None:
        """Called in the server's first process between fork and exec."""

    def started(self, pid: int) -> None:  # noqa: B027 - most accounts need not know
        """Called with the first process's id, which leads a session."""

    @abstractmethod
    def pids(self) -> list[int]: ...

    @abstractmethod
    def cpu_seconds(self) -> float:
        """Used so far by all its processes, those that ended included."""

    @abstractmethod
    def memory_bytes(self) -> int:
        """Anonymous, shared and kernel memory (slab, stacks, page tables, rings), without files' page cache."""

    def disk_bytes(self) -> int:
        """Read from storage so far by the processes that are there."""
        total = 0
        for pid in self.pids():
            try:
                lines = Path(f"/proc/{pid}/io").read_text().splitlines()
            except OSError:
                continue
            total += sum(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))
        return total

    @abstractmethod
    def close(self) -> None:
        """Call when all processes have ended."""


def _own_group(controller: str) -> str:
    """The path of this process's group in the hierarchy of `controller` ("" is version 2's)."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _number, controllers, path = line.split(":", 2)
        if controller in controllers.split(",") if controllers else not controller:
            return path
    raise OSError(f"no control group hierarchy has the controller {controller!r}")


class CgroupV1(Account):
    """Two groups, in the hierarchies of cpuacct and memory."""

    method = "cgroup v1: cpuacct.usage, memory.usage_in_bytes less page cache"
    limits_memory = True

    def __init__(self, name: str) -> None:
        self._groups = []
        for controller in ("cpuacct", "memory"):
            group = _CGROUPS / controller / _own_group(controller).lstrip("/") / name
            group.mkdir()
            self._groups.append(group)
        self._cpu, self._memory = self._groups

    def enter(self) -> None:
        for group in self._groups:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    def pids(self) -> list[int]:
        return [int(pid) for pid in (self._cpu / "cgroup.procs").read_text().split()]

    def cpu_seconds(self) -> float:
        return int((self._cpu / "cpuacct.usage").read_text()) / 1e9

    def memory_bytes(self) -> int:
        usage = int((self._memory / "memory.usage_in_bytes").read_text())
        stat = _fields(self._memory / "memory.stat")
        return usage - (stat["total_cache"] - stat["total_shmem"])

    def limit_memory(self, limit_bytes: int | None) -> None:
        (self._memory / "memory.limit_in_bytes").write_text(str(-1 if limit_bytes is None else limit_bytes))

    def close(self) -> None:
        for group in self._groups:
            group.rmdir()


class CgroupV2(Account):
    """One group; the memory controller is enabled for the children of this process's group if it is not yet."""

    method = "cgroup v2: cpu.stat, memory.current less page cache"
    limits_memory = True

    def __init__(self, name: str) -> None:
        parent = _CGROUPS / _own_group("").lstrip("/")
        self._group = parent / name
        self._group.mkdir()
        try:
            if not (self._group / "memory.current").exists():
                (parent / "cgroup.subtree_control").write_text("+memory")
        except OSError:  # a group with processes of its own, other than the root, may not give controllers away
            self._group.rmdir()
            raise

    def enter(self) -> None:
        (self._group / "cgroup.procs").write_text(str(os.getpid()))

    def pids(self) -> list[int]:
        return [int(pid) for pid in (self._group / "cgroup.procs").read_text().split()]

    def cpu_seconds(self) -> float:
        return _fields(self._group / "cpu.stat")["usage_usec"] / 1e6

    def memory_bytes(self) -> int:
        stat = _fields(self._group / "memory.stat")
        return int((self._group / "memory.current").read_text()) - (stat["file"] - stat["shmem"])

    def limit_memory(self, limit_bytes: int | None) -> None:
        (self._group / "memory.max").write_text("max" if limit_bytes is None else str(limit_bytes))

    def close(self) -> None:
        self._group.rmdir()


class Proc(Account):
    """The server's first process, the session it leads and all their children, summed from /proc."""

    method = "sum over /proc: stat of processes and ended children, PSS, growth of the system's slab"

    def __init__(self) -> None:
        self._first = 0
        self._slab_before = self._slab_bytes()

    def enter(self) -> None:
        pass

    def started(self, pid: int) -> None:
        self._first = pid

    @staticmethod
    def _slab_bytes() -> int:
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        kib = {line[0].rstrip(":"): int(line[1]) for line in lines}
        return 1024 * (kib["Slab"] + kib["KernelStack"] + kib["PageTables"])

    def pids(self) -> list[int]:
        found = {self._first}
        parents: dict[int, int] = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] in "ZX":
                continue
            parents[int(entry.name)] = int(fields[1])
            if int(fields[3]) == self._first:
                found.add(int(entry.name))
        while more := {pid for pid, parent in parents.items() if parent in found and pid not in found}:
            found |= more
        return sorted(found & parents.keys())

    def cpu_seconds(self) -> float:
        ticks = 0
        for pid in self.pids():
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            ticks += sum(int(field) for field in fields[11:15])  # utime, stime, cutime, cstime
        return ticks / _TICKS_PER_SECOND

    def memory_bytes(self) -> int:
        total_kib = 0
        for pid in self.pids():
            rollup = _fields_of_rollup(Path(f"/proc/{pid}/smaps_rollup"))
            total_kib += rollup.get("Pss_Anon", 0) + rollup.get("Pss_Shmem", 0)
        return total_kib * 1024 + self._slab_bytes() - self._slab_before

    def close(self) -> None:
        pass


def _fields_of_rollup(path: Path) -> dict[str, int]:
    try:
        lines = [line.split() for line in path.read_text().splitlines()[1:]]
    except OSError:
        return {}
    return {line[0].rstrip(":"): int(line[1]) for line in lines}


def account(name: str) -> Account:
    """The best account this machine allows."""
    for kind in (CgroupV1, CgroupV2):
        try:
            return kind(name)
        except OSError:
            continue
    return Proc()
