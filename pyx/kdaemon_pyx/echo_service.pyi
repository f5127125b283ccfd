"""Types of the echo service."""

from kdaemon_pyx.service import ServiceObject

class EchoService(ServiceObject):
    """Sends back what it gets. ``pull``: by connection_receive_into and connection_send_memory."""

    def __init__(self, *, pull: bool = False) -> None: ...
