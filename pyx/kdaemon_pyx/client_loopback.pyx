"""A backend for the client service whose connections echo into themselves, and a control thread that says yes.

It drives the whole of the client service (rings, queues, barriers, cancel, deadlines, attach and detach) without sockets, TLS or an
engine. Conventions: OPEN to an odd port stays under way until it is cancelled; LISTEN brings ``port`` modulo 8 connections; START_TLS with an
odd port fails; EXPORT is refused if its user_data is odd.
"""

from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from kdaemon_pyx.client_abi cimport (
    CLIENT_ADOPT, CLIENT_CONNECT, CLIENT_EXPORT, CLIENT_LISTEN, CLIENT_OPEN, CLIENT_PARAMETER_PLAIN, CLIENT_START_TLS,
)
from kdaemon_pyx.client_control cimport client_binding_accepted, client_binding_describe, client_event_free, client_events_take
from kdaemon_pyx.client_endpoint cimport (
    client_connection_closed, client_deliver, client_end_of_data, client_established, client_writable,
)
from kdaemon_pyx.client_operations cimport client_control_complete
from kdaemon_pyx.client_queue cimport client_ring
from kdaemon_pyx.client_types cimport (
    CLIENT_ATTACHED, CLIENT_EVENT_CANCEL, CLIENT_EVENT_OPERATION, Client, ClientBackend, ClientCommand, ClientEndpoint,
    ClientEvent, ClientService,
)

cdef extern from "errno.h" nogil:
    enum:
        ECONNRESET
        EOPNOTSUPP
        EPROTO

cdef enum:
    LOOPBACK_SIZE = 16384

cdef struct Loopback:
    uint32_t begin
    uint32_t end
    bint ended
    uint8_t[LOOPBACK_SIZE] data

cdef unsigned long connections = 0


cdef void deliver(ClientEndpoint* endpoint, Loopback* loopback) noexcept nogil:
    loopback.begin += <uint32_t> client_deliver(endpoint, loopback.data + loopback.begin, loopback.end - loopback.begin)
    if loopback.begin == loopback.end:
        loopback.begin = loopback.end = 0
        if loopback.ended and not endpoint.end_of_data:
            client_end_of_data(endpoint)


cdef void loopback_read_wanted(ClientEndpoint* endpoint) noexcept nogil:
    cdef Loopback* loopback = <Loopback*> endpoint.connection
    cdef bint was_full = loopback.end == LOOPBACK_SIZE
    deliver(endpoint, loopback)
    if was_full and loopback.end == 0:
        client_writable(endpoint)


cdef int64_t loopback_write(ClientEndpoint* endpoint, const uint8_t* data, uint32_t length) noexcept nogil:
    cdef Loopback* loopback = <Loopback*> endpoint.connection
    if length > LOOPBACK_SIZE - loopback.end:
        length = LOOPBACK_SIZE - loopback.end
    memcpy(loopback.data + loopback.end, data, length)
    loopback.end += length
    deliver(endpoint, loopback)
    return length


cdef int64_t loopback_cancel_write(ClientEndpoint* endpoint) noexcept nogil:
    return 0


cdef uint64_t loopback_sent(ClientEndpoint* endpoint) noexcept nogil:
    return 0


cdef bint loopback_is_sent(ClientEndpoint* endpoint) noexcept nogil:
    return True


cdef int loopback_shutdown(ClientEndpoint* endpoint) noexcept nogil:
    cdef Loopback* loopback = <Loopback*> endpoint.connection
    loopback.ended = True
    deliver(endpoint, loopback)
    return 0


cdef void loopback_close(ClientEndpoint* endpoint, bint orderly) noexcept nogil:
    global connections
    free(endpoint.connection)
    connections -= 1
    client_connection_closed(endpoint, 0 if orderly else -ECONNRESET, 0)


cdef uint64_t loopback_name(ClientEndpoint* endpoint) noexcept nogil:
    return <uint64_t> endpoint.connection


cdef ClientBackend backend
backend.read_wanted = loopback_read_wanted
backend.cancel_read = loopback_read_wanted         # nothing is ever lent
backend.write = loopback_write
backend.cancel_write = loopback_cancel_write
backend.sent = loopback_sent
backend.is_sent = loopback_is_sent
backend.shutdown = loopback_shutdown
backend.name = loopback_name
backend.close = loopback_close
backend.ring = client_ring


cdef const ClientBackend* client_loopback_backend() noexcept nogil:
    return &backend


cdef unsigned long client_loopback_connections() noexcept nogil:
    return connections


cdef bint establish(ClientService* service, uint32_t token, bint plain) noexcept nogil:
    global connections
    cdef Loopback* loopback = <Loopback*> calloc(1, sizeof(Loopback))
    if loopback == NULL:
        return False
    if client_established(service, token, loopback, plain) == NULL:
        free(loopback)
        return False
    connections += 1
    return True


cdef void answer(ClientService* service, ClientEvent* event) noexcept nogil:
    cdef ClientCommand command
    cdef Client* client = service.clients[event.client_index]
    cdef ClientEndpoint* endpoint
    cdef uint8_t[4] info = [1, 2, 3, 4]
    cdef bint plain
    cdef int _
    if client == NULL or client.generation != event.client_generation or client.state != CLIENT_ATTACHED:
        return
    memset(&command, 0, sizeof(command))
    command.slot = event.slot
    command.sequence = event.sequence
    if event.kind == CLIENT_EVENT_CANCEL:
        command.result = -<int64_t> event.reason
        client_control_complete(client, &command)
        return
    if event.kind != CLIENT_EVENT_OPERATION:
        return
    if event.opcode == CLIENT_OPEN and event.parameters.port & 1:
        return
    if event.opcode == CLIENT_LISTEN:
        client_control_complete(client, &command)
        for _ in range(event.parameters.port % 8):
            if event.parameters.flags & CLIENT_PARAMETER_PLAIN:
                establish(service, event.binding, True)
            else:
                establish(service, client_binding_accepted(service, event.binding, info, sizeof(info)), False)
        return
    endpoint = &client.endpoints[<uint32_t> event.handle]
    if event.opcode == CLIENT_EXPORT or event.opcode == CLIENT_START_TLS:
        if event.connection != <uint64_t> endpoint.connection:
            return                                 # would be a bug of the client service: the operation hangs and the test sees it
        if event.opcode == CLIENT_EXPORT and event.user_data & 1:
            command.result = -EOPNOTSUPP           # refused: the connection goes on
            client_control_complete(client, &command)
            return
        loopback_close(endpoint, True)             # the connection leaves its client, for the handshake or for good
        if event.opcode == CLIENT_EXPORT or event.parameters.port & 1:
            command.result = 0 if event.opcode == CLIENT_EXPORT else -EPROTO
            client_control_complete(client, &command)
            return
    plain = event.opcode == CLIENT_CONNECT or event.opcode == CLIENT_ADOPT
    if not plain:
        client_binding_describe(service, event.binding, info, sizeof(info))
    if not establish(service, event.binding, plain):
        command.result = -ENOMEM
        client_control_complete(client, &command)


cdef void client_loopback_control(ClientService* service) noexcept nogil:
    cdef ClientEvent* event = client_events_take(service)
    cdef ClientEvent* following
    while event != NULL:
        following = event.next
        answer(service, event)
        client_event_free(event)
        event = following
