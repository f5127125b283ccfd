"""What the processes of the daemon do to themselves: hardening, ties to their parent, change of user."""

import ctypes
import os
import pwd
import resource
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38

MCL_CURRENT = 1
MCL_FUTURE = 2
MCL_ONFAULT = 4

OOM_SCORE_MAX = 1000
SACRIFICE_WORKER = 500
SACRIFICE_KEYMGR = 100

_libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, argument: int | bytes) -> None:
    """prctl(2). Raises OSError."""
    value = ctypes.c_char_p(argument) if isinstance(argument, bytes) else ctypes.c_ulong(argument)
    if _libc.prctl(option, value, ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}): {os.strerror(error)}")


def set_name(name: str) -> None:
    """The name that ps and /proc/PID/comm show; at most 15 bytes."""
    prctl(PR_SET_NAME, name.encode()[:15])


def become_subreaper() -> None:
    """Orphaned descendants become children of this process (prctl(2), PR_SET_CHILD_SUBREAPER)."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int, signal_number: int) -> None:
    """The kernel sends `signal_number` to this process when `parent` dies; exits at once if that has happened already.

    Must be called after a change of user, which clears the setting.
    """
    prctl(PR_SET_PDEATHSIG, signal_number)
    if os.getppid() != parent:
        os._exit(0)


def harden() -> None:
    """No core dumps, no ptrace by other processes of the same user, no privileges gained by exec."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    prctl(PR_SET_DUMPABLE, 0)


def lock_memory() -> bool:
    """Keeps this process out of swap, page by page as it touches them; False if the limits do not allow it."""
    return bool(_libc.mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT) == 0)


def change_user(name: str) -> None:
    """Gives up root for the account `name`, for ever. Does nothing when `name` is empty or this is not root.

    Raises LookupError if there is no such account, OSError if the kernel refuses.
    """
    if not name or os.geteuid() != 0:
        return
    try:
        account = pwd.getpwnam(name)
    except KeyError:
        raise LookupError(f"no account is named {name!r}") from None
    os.initgroups(name, account.pw_gid)
    os.setresgid(account.pw_gid, account.pw_gid, account.pw_gid)
    os.setresuid(account.pw_uid, account.pw_uid, account.pw_uid)


def sacrifice(points: int) -> None:
    """When memory runs out the kernel kills this process, and what it forks, before those with fewer points.

    A worker costs its connections, the zygote nothing, keymgr a delay, the supervisor everything. Call before harden(),
    behind which only root may write the file (proc(5), oom_score_adj). Points are added: less would need privileges.
    """
    path = Path("/proc/self/oom_score_adj")
    try:
        path.write_text(str(min(OOM_SCORE_MAX, int(path.read_text()) + points)))
    except OSError:
        pass  # no /proc, or a read-only one: the kernel chooses by size alone


def ignore_terminal_signals() -> None:
    """Only the supervisor answers to signals; a Ctrl-C in the terminal reaches the whole process group."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def spawn_module(module: str, fd: int) -> int:
    """Starts `python -m module` in a fresh interpreter with `fd` as its descriptor 3; returns the pid.

    -P and an explicit PYTHONPATH: the working folder may be the one that is served; nothing in it may be imported.
    """
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    # Above 3, so that no action below overwrites the source of a later one
    source = os.dup(fd) if fd != 3 else fd
    try:
        return os.posix_spawn(
            sys.executable,
            [sys.executable, "-P", "-m", module],
            environment,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, source, 3),
                (os.POSIX_SPAWN_DUP2, null, 0),
                (os.POSIX_SPAWN_DUP2, null, 1),
            ],
            setsigdef=[signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE],
        )
    finally:
        os.close(null)
        if source != fd:
            os.close(source)
