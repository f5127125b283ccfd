"""What `kdaemon check` looks at besides the file: certificates with their keys, accounts and folders of this host.

The daemon meets the same things at its start, each where it belongs: keys in keymgr, accounts in who changes to them.
"""

import grp
import pwd
from collections.abc import Callable
from pathlib import Path

from kdaemon import credentials
from kdaemon.config import Config, KeyProblem
from kdaemon.control import PATH_SIZE_MAX


def check_host(config: Config) -> list[str]:
    """Raises KeyProblem for what would keep the daemon from starting; gives what it would warn of."""
    warnings: list[str] = []
    for index, certificate in enumerate(config.certificate):
        try:
            warnings += credentials.load(certificate).warnings
        except credentials.CredentialError as error:
            raise KeyProblem(("certificate", index, error.what), str(error)) from None
    for key, account in (("worker", config.users.worker), ("keymgr", config.users.keymgr)):
        if account and not _known(account, pwd.getpwnam):
            raise KeyProblem(("users", key), f"no account is named {account!r}")
    for index, user in enumerate(config.clients.users):
        if not user.isdecimal() and not _known(user, pwd.getpwnam):
            raise KeyProblem(("clients", "users", index), f"no account is named {user!r}")
    for index, group in enumerate(config.clients.groups):
        if not group.isdecimal() and not _known(group, grp.getgrnam):
            raise KeyProblem(("clients", "groups", index), f"no group is named {group!r}")
    folder = Path(config.keylog).parent
    if config.keylog and not folder.is_dir():
        raise KeyProblem(("keylog",), f"{str(folder)!r} is not a folder: make it, or name another")
    if len(config.socket.encode()) > PATH_SIZE_MAX:
        raise KeyProblem(("socket",), f"longer than the {PATH_SIZE_MAX} bytes a UNIX socket path may have")
    return warnings


def _known(name: str, look_up: Callable[[str], object]) -> bool:
    try:
        look_up(name)
    except KeyError:
        return False
    return True
