"""Media types by file name suffix."""

from collections.abc import Mapping

class MimeTable:
    """Suffixes and their media types; ``types`` (suffix without dot -> type) win over the built-in table."""

    def __init__(
        self,
        types: Mapping[str, str] | None = None,
        default_type: str = "application/octet-stream",
        charset: str = "",
    ) -> None: ...
    def lookup(self, path: bytes) -> bytes: ...
