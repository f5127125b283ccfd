#!/usr/bin/env python3
"""Writes docker/seccomp.json: the system calls a kdaemon container may make.

Docker's default profile allows what an ordinary program needs and forbids what administers the host; since Docker 25 it
forbids io_uring too, which kdaemon is built on. This profile keeps that policy and allows io_uring_setup,
io_uring_enter and io_uring_register. It is made from the system calls of the kernel's headers, less those that
administer the host: what is forbidden gives EPERM, and what is unknown to it ENOSYS, so that the C library falls back.

Usage: docker/make_seccomp.py [--without-io-uring] [--header FILE] >docker/seccomp.json
--without-io-uring gives the policy of Docker 25 and newer, to try what kdaemon doctor says there.
"""

import argparse
import json
import re
import sys
from pathlib import Path

HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
EPERM, ENOSYS = 1, 38
AF_VSOCK = 40
# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET of linux/sched.h: no new namespaces.
CLONE_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
# PER_LINUX, PER_LINUX32, UNAME26 with both, and the question 0xffffffff (linux/personality.h).
PERSONALITIES = (0x0, 0x0008, 0x20000, 0x20008, 0xFFFFFFFF)

FORBIDDEN = {
    # Administers the host: time, modules, power, swap, quotas, accounting, host name, ports.
    *("settimeofday", "clock_settime", "adjtimex", "clock_adjtime"),
    *("create_module", "init_module", "finit_module", "delete_module", "query_module", "get_kernel_syms"),
    *("kexec_load", "kexec_file_load", "reboot", "swapon", "swapoff", "quotactl", "quotactl_fd", "acct"),
    *("sethostname", "setdomainname", "iopl", "ioperm", "syslog", "vhangup", "nfsservctl", "_sysctl", "sysfs"),
    *("uselib", "ustat", "lookup_dcookie", "modify_ldt"),
    # Mounts and namespaces.
    *("mount", "umount2", "pivot_root", "chroot", "setns", "unshare", "fsopen", "fsconfig", "fsmount", "fspick"),
    *("move_mount", "open_tree", "mount_setattr", "open_by_handle_at", "name_to_handle_at", "fanotify_init"),
    # Other processes' memory and descriptors; tracing; keys of the kernel's key ring, which has no namespace.
    *("ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "kcmp", "pidfd_getfd"),
    *("bpf", "perf_event_open", "userfaultfd", "add_key", "request_key", "keyctl"),
    # Placement of memory on nodes.
    *("mbind", "set_mempolicy", "get_mempolicy", "move_pages", "migrate_pages", "set_mempolicy_home_node"),
}
IO_URING = ("io_uring_setup", "io_uring_enter", "io_uring_register")
# Allowed for some arguments only.
CONDITIONAL = {"clone", "clone3", "personality", "socket"}


def system_calls(header: Path) -> list[str]:
    names = re.findall(r"^#define __NR_(\w+)\s+\d+", header.read_text(), flags=re.MULTILINE)
    if "io_uring_setup" not in names:
        sys.exit(f"{header} knows no io_uring_setup: are these the headers of a kernel of 5.1 or newer?")
    return sorted(names)


def profile(names: list[str], io_uring: bool) -> dict[str, object]:
    forbidden = FORBIDDEN | (set() if io_uring else set(IO_URING))
    allowed = [name for name in names if name not in forbidden | CONDITIONAL]

    def condition(index: int, value: int, operator: str, value_two: int = 0) -> list[dict[str, object]]:
        return [{"index": index, "value": value, "valueTwo": value_two, "op": operator}]

    rules: list[dict[str, object]] = [
        {"names": allowed, "action": "SCMP_ACT_ALLOW"},
        {"names": sorted(forbidden & set(names)), "action": "SCMP_ACT_ERRNO", "errnoRet": EPERM},
        {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": condition(0, CLONE_NAMESPACES, "SCMP_CMP_MASKED_EQ")},
        # Its flags are behind a pointer that a filter cannot follow: ENOSYS makes the C library use clone.
        {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS},
        {"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": condition(0, AF_VSOCK, "SCMP_CMP_NE")},
    ]
    rules += [
        {"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": condition(0, value, "SCMP_CMP_EQ")}
        for value in PERSONALITIES
    ]
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": ENOSYS,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_AARCH64"],
        "syscalls": rules,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without-io-uring", action="store_true")
    parser.add_argument("--header", type=Path, default=HEADER)
    arguments = parser.parse_args()
    print(json.dumps(profile(system_calls(arguments.header), not arguments.without_io_uring), indent=1))


if __name__ == "__main__":
    main()
