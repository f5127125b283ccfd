"""What a worker does with records that are not application data, on connections that are established.

The engine hands such a record up together with the connection's secrets; nothing about the connection is kept here.
"""

from typing import Any

from kdaemon_pyx.engine import ConnectionKeys, Engine


class ControlRecords:
    """Post-handshake records of one worker. Used by the control thread only."""

    def __init__(self, engine: Engine, log: Any) -> None:
        self._engine = engine
        self._log = log

    def received(self, connection: int, content_type: int, data: bytes, keys: ConnectionKeys) -> None:
        """One record, decrypted."""
        self._engine.close(connection)

    def rekeyed(self, connection: int, direction: int, error: int) -> None:
        """The engine has the new keys, or could not take them and closes."""
