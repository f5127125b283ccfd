"""What a worker does with records that are not application data, on connections that are established.

The engine hands such a record up together with the connection's secrets. Kept here is only the flood budget, and
only for connections that ever received such a record.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from kdaemon_pyx.engine import Engine

from kdaemon.tls.constants import ContentType
from kdaemon.tls.post_handshake import ConnectionSecrets, ControlState, NewKeys, handle_control_record, start_key_update
from kdaemon.tls.session import SessionTicket
from kdaemon.tls.signing import Role

if TYPE_CHECKING:
    from kdaemon_pyx.engine import ConnectionKeys  # a name of the .pyi only

RX, TX = 0, 1  # directions of Engine.rekey


class ControlRecords:
    """Post-handshake records of one worker. Used by the control thread only."""

    def __init__(self, engine: Engine, log: Any) -> None:
        self._engine = engine
        self._log = log
        self._states: dict[int, ControlState] = {}
        self.key_updates = 0
        self.rekeys_refused = 0
        self.errors: dict[str, int] = {}  # connections ended here, by the name of the fact

    def received(
        self, connection: int, content_type: int, data: bytes, keys: ConnectionKeys, role: Role = Role.SERVER
    ) -> tuple[SessionTicket, ...]:
        """One record, decrypted: a KeyUpdate is followed, an alert or a breach of protocol ends the connection.

        Returns the tickets in it.
        """
        state = self._states.setdefault(connection, ControlState())
        reaction = handle_control_record(
            role, content_type, data, ConnectionSecrets(*keys), state=state, now_s=time.time()
        )
        if reaction.error is not None:
            name = type(reaction.error).__name__
            self.errors[name] = self.errors.get(name, 0) + 1
            self._log.debug("connection ended", reason=str(reaction.error))
            if reaction.alert:
                self._engine.send_control(connection, ContentType.ALERT, reaction.alert)
            self._engine.close(connection)
            return ()
        if reaction.tx is not None:
            # Before the other direction: the next record that the engine opens comes up with this secret already.
            self._rekey(connection, TX, reaction.tx, reaction.messages)
        if reaction.rx is not None:
            self.key_updates += 1
            self._rekey(connection, RX, reaction.rx)
        return reaction.tickets

    def key_limit(self, connection: int, keys: ConnectionKeys) -> None:
        """Our sending key nears its AEAD limit (RFC 8446, section 5.5): a KeyUpdate, and new keys behind it."""
        reaction = start_key_update(ConnectionSecrets(*keys))
        assert reaction.tx is not None
        self._rekey(connection, TX, reaction.tx, reaction.messages)

    def rekeyed(self, connection: int, direction: int, error: int) -> None:
        """The engine has the new keys; or the kernel cannot take them, and it ends the connection in an orderly way."""
        if error:
            self.rekeys_refused += 1
            self._log.info("KeyUpdate cannot be followed in the kernel", direction=("rx", "tx")[direction], errno=error)

    def closed(self, connection: int) -> None:
        """Forgets a connection."""
        self._states.pop(connection, None)

    def _rekey(self, connection: int, direction: int, keys: NewKeys, key_update: bytes = b"") -> None:
        self._engine.rekey(connection, direction, keys.key, keys.iv, keys.secret, key_update)
