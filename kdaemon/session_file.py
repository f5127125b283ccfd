"""The file of `kdaemon connect --session`: tickets of a server to resume with, and the group that it asked for.

Whoever reads it can resume those sessions: it is its owner's alone. What is in it holds for one scope, the server and
how it was believed; another scope begins anew.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdaemon.credentials import replace_file
from kdaemon.tls.key_schedule import SUITES
from kdaemon.tls.session import TICKETS_PER_SERVER_MAX, SessionTicket


class SessionFile:
    """What the file at `path` says for `scope`. One program's at a time; the last one to write wins.

    Raises OSError, or ValueError if there is a file of another kind: it is not overwritten.
    """

    def __init__(self, path: str, scope: str) -> None:
        self._path = Path(path)
        self._scope = scope
        self._tickets: list[SessionTicket] = []
        self.group: int | None = None
        try:
            content = json.loads(self._path.read_bytes())
            if content["scope"] == scope:
                self._tickets = [_ticket(entry) for entry in content["tickets"]]
                self.group = content["group"]
        except FileNotFoundError:
            pass
        except (KeyError, TypeError, ValueError):
            raise ValueError("a file of another kind") from None

    def take(self, now_s: float) -> SessionTicket | None:
        """The newest usable ticket, which is in the file no longer: tickets are for one use (RFC 8446 §C.4)."""
        while self._tickets:
            ticket = self._tickets.pop()
            if ticket.usable(now_s):
                self._save()
                return ticket
        return None

    def keep(self, tickets: Sequence[SessionTicket]) -> None:
        """Adds tickets that have come. Raises OSError."""
        self._tickets += tickets
        self._save()

    def prefer(self, group: int) -> None:
        """The server has asked for this group. Raises OSError."""
        self.group = group
        self._save()

    def _save(self) -> None:
        content = {
            "scope": self._scope,
            "group": self.group,
            "tickets": [
                ticket._replace(psk=ticket.psk.hex(), ticket=ticket.ticket.hex())._asdict()  # type: ignore[arg-type]
                for ticket in self._tickets[-TICKETS_PER_SERVER_MAX:]
            ],
        }
        replace_file(self._path, json.dumps(content, indent=1).encode() + b"\n", 0o600)


def _ticket(entry: dict[str, Any]) -> SessionTicket:
    if entry["cipher_suite"] not in SUITES:
        raise ValueError(f"the cipher suite {entry['cipher_suite']}")
    return SessionTicket(**{**entry, "psk": bytes.fromhex(entry["psk"]), "ticket": bytes.fromhex(entry["ticket"])})
