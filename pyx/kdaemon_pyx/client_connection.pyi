"""libtls clients as a service of the engine."""

from typing import Final

from kdaemon_pyx.client_admission import Clients
from kdaemon_pyx.service import ServiceObject

SERVICE_CLIENTS: Final[int]  # index under which Engine(services=...) must hold a ClientConnections

class ClientConnections(ServiceObject):
    """The service that carries the connections of ``clients``; ``install(site=token)`` gives one to its client."""

    clients: Clients
    def __init__(self, clients: Clients, *, spin_ns: int = 0) -> None: ...
