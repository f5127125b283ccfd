"""Types of the echo service."""

from kdaemon_pyx.service import ServiceObject

class EchoService(ServiceObject):
    """Sends back what it gets."""
