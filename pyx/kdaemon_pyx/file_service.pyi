"""Types of the file service, the HTTP sessions and the file table as Python sees them."""

from collections.abc import Mapping, Sequence

from kdaemon_pyx.http_config import Limits, Site
from kdaemon_pyx.http_log import AccessLog
from kdaemon_pyx.mime import MimeTable

class FileService:
    """Serves files over the connections of one engine. The sites' order is that of install()'s site numbers."""

    def __init__(
        self,
        sites: Sequence[Site],
        limits: Limits | None = None,
        mime: MimeTable | None = None,
        log: AccessLog | None = None,
    ) -> None: ...
    def add_sites(self, sites: Sequence[Site]) -> int: ...
    def counters(self) -> Mapping[str, int]: ...
