# A backend without TLS or sockets: every connection echoes into itself. For the harness.

from kdaemon_pyx.client_types cimport ClientBackend, ClientService

cdef const ClientBackend* client_loopback_backend() noexcept nogil
# Play the control thread: answer all queued events. Deterministic, in the calling thread.
cdef void client_loopback_control(ClientService* service) noexcept nogil
cdef unsigned long client_loopback_connections() noexcept nogil
