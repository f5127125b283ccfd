# Between the engine thread and the control thread: events up, commands down, and the tokens that name endpoints.
# Everything here takes the service's mutex itself and may be called from either thread.

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from kdaemon_pyx.client_types cimport Client, ClientBinding, ClientCommand, ClientEndpoint, ClientEvent, ClientService

cdef int client_control_initialize(ClientService* service, uint32_t bindings_max) noexcept nogil
cdef void client_control_destroy(ClientService* service) noexcept nogil

# A zeroed event about this client, NULL without memory. Owner: the caller until client_event_push().
cdef ClientEvent* client_event_new(Client* client, uint8_t kind) noexcept nogil
cdef void client_event_push(ClientService* service, ClientEvent* event) noexcept nogil
# All events so far, in order; the caller frees each with client_event_free().
cdef ClientEvent* client_events_take(ClientService* service) noexcept nogil
cdef void client_event_free(ClientEvent* event) noexcept nogil

cdef void client_command_push(ClientService* service, ClientCommand* command) noexcept nogil
cdef ClientCommand* client_commands_take(ClientService* service) noexcept nogil
cdef void client_command_free(ClientCommand* command) noexcept nogil

# Token for an endpoint; 0 when all are in use.
cdef uint32_t client_binding_new(ClientService* service, Client* client, ClientEndpoint* endpoint) noexcept nogil
# Token for one connection to come of a listener; takes a copy of info. 0: no such listener token, or no room.
cdef uint32_t client_binding_accepted(ClientService* service, uint32_t listener, const uint8_t* info, uint32_t length) noexcept nogil
# Attach what INFO will answer to an opening connection's token. 0 or a negative errno.
cdef int client_binding_describe(ClientService* service, uint32_t token, const uint8_t* info, uint32_t length) noexcept nogil
# Copy of the binding; False if the token is stale. With `consume` it is freed and its info belongs to the caller.
cdef bint client_binding_get(ClientService* service, uint32_t token, bint consume, ClientBinding* binding) noexcept nogil
cdef void client_binding_free(ClientService* service, uint32_t token) noexcept nogil
# Frees all bindings of a client.
cdef void client_binding_free_all(ClientService* service, uint32_t client_index, uint32_t client_generation) noexcept nogil
