"""libtls clients as a service of the engine: their connections are the engine's, both record layers alike.

Kernel record layer: the socket reads and writes the client's arena itself; its memory is lent to the connection until the operation on it has ended,
whatever happens to the client. User record layer: READ is filled from what the core offers by ``on_data``, plaintext in private memory whose tag was
verified; WRITE is sealed from the arena into private memory, each byte read once, or, where it is small, copied into the open record. Once per loop turn the rings are
looked at; at its end what completed is published, and an idle turn says "asleep" to the clients and leaves a poll of the service's epoll fd
with the uring.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset, strlen
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from kdaemon_pyx cimport liburing as lu
from kdaemon_pyx.client_abi cimport (
    CLIENT_DETAIL_ALERT_RECEIVED, CLIENT_DETAIL_ALERT_SENT, CLIENT_DETAIL_TRUNCATED, CLIENT_RECORD_LAYER_KERNEL, CLIENT_RECORD_LAYER_USER,
    client_info,
)
from kdaemon_pyx.client_admission cimport Clients
from kdaemon_pyx.client_endpoint cimport (
    client_connection_closed, client_end_of_data, client_established, client_fill, client_filled, client_read_failed, client_received, client_sent,
)
from kdaemon_pyx.client_operations cimport client_run_ready
from kdaemon_pyx.client_service cimport (
    client_service_awake, client_service_detach_all, client_service_prepare_sleep, client_service_publish, client_service_turn, client_service_wake,
)
from kdaemon_pyx.client_types cimport CLIENT_ATTACHED, CLIENT_NONE, Client, ClientBackend, ClientEndpoint, ClientService
from kdaemon_pyx.connection cimport (
    connection_cancel_receive, connection_cancel_send, connection_close, connection_commit, connection_finish, connection_is_sending,
    connection_memory_sent, connection_receive_into, connection_reserve, connection_resume, connection_room, connection_send_memory,
)
from kdaemon_pyx.core cimport (
    CLOSE_CONTROL, CLOSE_DEADLINE, CLOSE_DRAIN, CLOSE_DRAIN_DEADLINE, CLOSE_KEY_UPDATE, CLOSE_LIMIT, CLOSE_PEER, CLOSE_RECORD,
    CLOSE_RESOURCES, CLOSE_SERVICE, CLOSE_TRUNCATED, OPERATION_NONE, OPERATION_POLL, RECORD_LAYER_KERNEL, RECORD_LAYER_NONE,
    RECORD_LAYER_USER, Connection, Core,
)
from kdaemon_pyx.handshake_io cimport record_layer_reason
from kdaemon_pyx.lifecycle cimport connection_handle, connection_mark
from kdaemon_pyx.liburing cimport io_uring_sqe
from kdaemon_pyx.service cimport ServiceObject
from kdaemon_pyx.transmit cimport transmit_alert, transmit_shutdown
from kdaemon_pyx.uring cimport uring_sqe

cdef extern from "errno.h" nogil:
    enum:
        EBADMSG
        ECONNABORTED
        ECONNRESET
        EKEYEXPIRED
        EMFILE
        ENOMEM
        EPROTO
        ESHUTDOWN
        ETIMEDOUT

cdef extern from "liburing.h" nogil:
    void io_uring_prep_poll_add(io_uring_sqe* sqe, int fd, unsigned int mask)

cdef extern from "poll.h" nogil:
    enum:
        POLLIN

cdef extern from "netinet/in.h" nogil:
    struct sockaddr:
        pass
    struct sockaddr_storage:
        unsigned short ss_family
    struct sockaddr_in:
        uint16_t sin_port
        uint32_t sin_addr
    struct sockaddr_in6:
        uint16_t sin6_port
        uint8_t sin6_addr[16]
    int AF_INET
    int AF_INET6
    uint16_t ntohs(uint16_t)

cdef extern from "sys/socket.h" nogil:
    int MSG_DONTWAIT
    int MSG_NOSIGNAL
    int getpeername(int fd, sockaddr* address, unsigned int* length)
    int getsockname(int fd, sockaddr* address, unsigned int* length)

cdef enum:
    SLEEPS_PER_TRIAL = 256     # where spinning did not pay
    SPIN_MIN_NS = 5000
    HOLD_US = 50               # what a message of a busy lane may wait for others
    HOLD_MANY_US = 150         # the same among MANY connections: where there are few, all have asked after that time and wait for answers
    MANY = 64
    BORROW_MIN = 4096          # bytes; user layer: less is copied, so that small WRITEs leave together
    TRASH_SIZE = 65536
    ALERT_CLOSE_NOTIFY = 0
    ALERT_BAD_RECORD_MAC = 20


# Where the kernel's record layer puts what comes after SHUTDOWN of reading. Never read.
cdef uint8_t[TRASH_SIZE] trash


# --- the backend: what the client service asks of a connection -----------------------------------------------------------

cdef void read_wanted(ClientEndpoint* endpoint) noexcept nogil:
    cdef Connection* c = <Connection*> endpoint.connection
    cdef Client* client = endpoint.client
    cdef uint32_t slot = endpoint.reads.head
    if c.record_layer != RECORD_LAYER_KERNEL:
        connection_resume(c)
    elif endpoint.read_shutdown:
        connection_receive_into(c, trash, TRASH_SIZE)
    elif slot != CLIENT_NONE and endpoint.read_lent == CLIENT_NONE:
        # The socket writes the arena itself.
        if connection_receive_into(c, client.arena + client.operations[slot].offset, client.operations[slot].length) == 0:
            endpoint.read_lent = slot


cdef void cancel_read(ClientEndpoint* endpoint) noexcept nogil:
    connection_cancel_receive(<Connection*> endpoint.connection)


cdef int64_t write(ClientEndpoint* endpoint, const uint8_t* data, uint32_t length) noexcept nogil:
    cdef Connection* c = <Connection*> endpoint.connection
    cdef uint32_t room
    cdef uint8_t* output
    if c.record_layer == RECORD_LAYER_KERNEL or (c.record_layer == RECORD_LAYER_USER and length >= BORROW_MIN):
        # The kernel reads the arena itself; or it is sealed from there, record by record, as the socket takes them.
        if connection_send_memory(c, data, length) < 0:
            return 0
        endpoint.write_lent = endpoint.write_next
        return length
    room = connection_room(c)
    if length > room:
        length = room
    if length == 0:
        return 0
    output = connection_reserve(c, length)
    if output == NULL:
        return 0
    memcpy(output, data, length)
    connection_commit(c, length)
    return length


cdef int64_t cancel_write(ClientEndpoint* endpoint) noexcept nogil:
    return connection_cancel_send(<Connection*> endpoint.connection)


cdef uint64_t sent(ClientEndpoint* endpoint) noexcept nogil:
    return connection_memory_sent(<Connection*> endpoint.connection)


cdef bint is_sent(ClientEndpoint* endpoint) noexcept nogil:
    return not connection_is_sending(<Connection*> endpoint.connection)


cdef int shutdown(ClientEndpoint* endpoint) noexcept nogil:
    cdef Connection* c = <Connection*> endpoint.connection
    cdef int error
    if c.record_layer == RECORD_LAYER_NONE:
        transmit_shutdown(c)
        return 0
    if c.alert_sent:
        return 0
    error = transmit_alert(c, ALERT_CLOSE_NOTIFY)
    if error == 0:
        c.alert_sent = 1           # no second close_notify at the end (RFC 8446 section 6.1)
        connection_mark(c)
    return error


cdef uint64_t name(ClientEndpoint* endpoint) noexcept nogil:
    return connection_handle(<Connection*> endpoint.connection)


cdef void close(ClientEndpoint* endpoint, bint orderly) noexcept nogil:
    cdef Connection* c = <Connection*> endpoint.connection
    if not orderly and (endpoint.read_lent != CLIENT_NONE or endpoint.write_lent != CLIENT_NONE):
        connection_close(c, CLOSE_SERVICE)             # on_closed() tells, when nothing touches the client's memory any more
        return
    c.service_state = NULL         # it lingers, or is joined, on its own: nothing of the client is touched any more
    if orderly:
        connection_finish(c, CLOSE_SERVICE)
    else:
        connection_close(c, CLOSE_SERVICE)
    client_connection_closed(endpoint, 0 if orderly else -ECONNRESET, 0)


cdef void ring(Client* client) noexcept nogil:
    """In the submission that carries the turn's sends, behind them: on a shared CPU the program runs when those are out."""
    cdef Core* core = <Core*> client.service.engine
    cdef io_uring_sqe* sqe = uring_sqe(&core.uring)
    # A full socket means that a ring is on its way already; a closed one is seen by the hang-up. Never waits, so nothing has to be joined.
    lu.io_uring_prep_send(sqe, client.doorbell_fd, <void*> b"!", 1, MSG_DONTWAIT | MSG_NOSIGNAL)
    lu.io_uring_sqe_set_flags(sqe, lu.IOSQE_CQE_SKIP_SUCCESS)
    lu.io_uring_sqe_set_data64(sqe, OPERATION_NONE)


# --- the service: what the engine tells of a connection -------------------------------------------------------------------

cdef int on_established(Connection* c) noexcept nogil:
    cdef ClientService* clients = <ClientService*> c.service.context
    cdef ClientEndpoint* endpoint = client_established(clients, c.site, c, c.record_layer == RECORD_LAYER_NONE)
    c.service_state = endpoint
    if endpoint == NULL:
        return -ECONNABORTED
    if endpoint.info != NULL and endpoint.info_length >= sizeof(client_info):
        describe(c, <client_info*> endpoint.info)
    settle(endpoint.client)
    return 0


# What INFO answers beside what the handshake knows.
cdef void describe(Connection* c, client_info* info) noexcept nogil:
    cdef sockaddr_storage address
    cdef unsigned int length = sizeof(address)
    cdef const char* reason = record_layer_reason(c.reason)
    if c.record_layer != RECORD_LAYER_NONE:
        info.record_layer = CLIENT_RECORD_LAYER_KERNEL if c.record_layer == RECORD_LAYER_KERNEL else CLIENT_RECORD_LAYER_USER
        if info.reason_length == 0:
            info.reason_length = <uint16_t> strlen(reason)
            memcpy(info.reason, reason, info.reason_length)
    if getpeername(c.fd, <sockaddr*> &address, &length) == 0:
        info.peer_port = write_address(&address, info.peer_address)
    length = sizeof(address)
    if getsockname(c.fd, <sockaddr*> &address, &length) == 0:
        info.local_port = write_address(&address, info.local_address)


# The port; the address as IPv6, an IPv4 one mapped into that (RFC 4291 section 2.5.5.2).
cdef uint16_t write_address(const sockaddr_storage* address, uint8_t* ipv6) noexcept nogil:
    if address.ss_family == AF_INET6:
        memcpy(ipv6, &(<const sockaddr_in6*> address).sin6_addr, 16)
        return ntohs((<const sockaddr_in6*> address).sin6_port)
    if address.ss_family != AF_INET:
        return 0
    ipv6[10] = ipv6[11] = 0xff
    memcpy(&ipv6[12], &(<const sockaddr_in*> address).sin_addr, 4)
    return ntohs((<const sockaddr_in*> address).sin_port)


# Operations that waited behind a barrier start at once; what completed is published by on_rest(), once per turn and client.
cdef void settle(Client* client) noexcept nogil:
    if client.state == CLIENT_ATTACHED and client.ready_head != CLIENT_NONE:
        client_run_ready(client)


cdef void tell_end(Connection* c, ClientEndpoint* endpoint) noexcept nogil:
    if endpoint.read_lent != CLIENT_NONE:
        connection_cancel_receive(c)               # nothing is in flight behind the end: it comes back at once
    if c.end_of_data:
        client_end_of_data(endpoint)
    elif c.alert_received:
        client_read_failed(endpoint, -EPROTO, CLIENT_DETAIL_ALERT_RECEIVED | c.alert_received)
    else:
        client_read_failed(endpoint, -ECONNRESET, CLIENT_DETAIL_TRUNCATED)


cdef bint is_sated(ClientEndpoint* endpoint) noexcept nogil:
    return endpoint.reads.head == CLIENT_NONE and not endpoint.read_shutdown


cdef int64_t on_data(Connection* c, const uint8_t* data, uint64_t length) noexcept nogil:
    cdef ClientEndpoint* endpoint = <ClientEndpoint*> c.service_state
    cdef uint64_t taken = length
    if endpoint == NULL:
        return <int64_t> length
    if endpoint.read_lent != CLIENT_NONE or data == trash:
        client_received(endpoint, length)
        if c.end_told and c.input == NULL and c.service_state != NULL:
            tell_end(c, endpoint)                      # both had come before the first READ: what was kept is taken now
        settle(endpoint.client)
        return 0
    taken = client_fill(endpoint, data, length)
    c.sated = is_sated(endpoint)
    if taken == length and c.end_told:
        tell_end(c, endpoint)
    settle(endpoint.client)
    return <int64_t> taken


cdef void on_sent(Connection* c) noexcept nogil:
    cdef ClientEndpoint* endpoint = <ClientEndpoint*> c.service_state
    if endpoint != NULL:
        client_sent(endpoint)
        settle(endpoint.client)


cdef void on_end_of_data(Connection* c) noexcept nogil:
    # Plaintext that no READ asked for yet comes first: on_data tells the end then.
    cdef ClientEndpoint* endpoint = <ClientEndpoint*> c.service_state
    if c.input == NULL and endpoint != NULL:
        tell_end(c, endpoint)
        settle(endpoint.client)


cdef void on_deadline(Connection* c) noexcept nogil:
    pass                           # the program's operations carry the deadlines; none is set here


cdef void on_drain(Connection* c) noexcept nogil:
    cdef ClientEndpoint* endpoint = <ClientEndpoint*> c.service_state
    if endpoint == NULL or endpoint.writes.head == CLIENT_NONE:
        connection_finish(c, CLOSE_DRAIN)


cdef void on_closed(Connection* c) noexcept nogil:
    cdef ClientEndpoint* endpoint = <ClientEndpoint*> c.service_state
    cdef int32_t error = 0
    cdef uint32_t detail = 0
    cdef uint8_t reason = c.close_reason
    if endpoint == NULL:
        return
    c.service_state = NULL
    if c.alert_received:               # that is why, whatever came of it
        error, detail = -EPROTO, CLIENT_DETAIL_ALERT_RECEIVED | c.alert_received
    elif reason == CLOSE_TRUNCATED:
        error, detail = -ECONNRESET, CLIENT_DETAIL_TRUNCATED
    elif reason == CLOSE_DEADLINE:
        error = -ETIMEDOUT
    elif reason == CLOSE_RECORD:
        error, detail = -EBADMSG, CLIENT_DETAIL_ALERT_SENT | ALERT_BAD_RECORD_MAC
    elif reason == CLOSE_KEY_UPDATE:
        error = -EKEYEXPIRED
    elif reason == CLOSE_LIMIT:
        error = -EPROTO
    elif reason == CLOSE_DRAIN or reason == CLOSE_DRAIN_DEADLINE:
        error = -ESHUTDOWN
    elif reason == CLOSE_RESOURCES:
        error = -ENOMEM
    elif reason == CLOSE_CONTROL:
        error = -ECONNABORTED
    elif endpoint.close_timed_out or (reason != CLOSE_PEER and reason != CLOSE_SERVICE):
        error = -ECONNRESET
    client_connection_closed(endpoint, error, detail)
    settle(endpoint.client)


cdef uint64_t clock_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t> now.tv_sec * 1000000000 + <uint64_t> now.tv_nsec


cdef void on_turn(Core* core) noexcept nogil:
    cdef ClientService* clients = <ClientService*> core.services[SERVICE_INDEX].context
    clients.engine = core
    core.hold_us = 0
    if clients.clients_used and core.uring.features & lu.IORING_FEAT_MIN_TIMEOUT:
        core.hold_us = HOLD_MANY_US if core.counters.connections >= MANY else HOLD_US
    if core.stopping:
        client_service_detach_all(clients)
    elif clients.said_asleep:
        clients.said_asleep = False
        if clients.poll_armed:
            client_service_awake(clients)            # something else woke the engine
        else:
            client_service_wake(clients)
    clients.worked = client_service_turn(clients) != 0


cdef bint is_crowded(Core* core) noexcept nogil:
    """Waits are held for company, and there is much of it: to look again at once would cut the batches up."""
    return core.holding and core.counters.connections >= MANY


cdef bint spin(ClientService* clients) noexcept nogil:
    """Whether idle rings are looked at once more. That pays only where the program runs on another CPU meanwhile, so it is tried now and then
    and kept up as long as it finds something."""
    cdef uint64_t now_ns
    if clients.worked:
        if clients.idle_since_ns:
            clients.spin_budget_ns = clients.spin_ns
        clients.idle_since_ns = 0
    if clients.spin_budget_ns == 0:
        if clients.sleeps % SLEEPS_PER_TRIAL:
            return False
        clients.spin_budget_ns = clients.spin_ns
    now_ns = clock_ns()
    if clients.idle_since_ns == 0:
        clients.idle_since_ns = now_ns
    if now_ns - clients.idle_since_ns < clients.spin_budget_ns:
        return True
    clients.spin_budget_ns = clients.spin_budget_ns // 4 if clients.spin_budget_ns > SPIN_MIN_NS else 0
    return False


cdef bint finish_filled(Client* client) noexcept nogil:
    """READs that got something are told, except while the socket is known to have more: the next receive fills them up in the next turn. True: there
    are such."""
    cdef bint more = False
    cdef uint32_t index = client.filling_head
    cdef ClientEndpoint* endpoint
    cdef Connection* c
    while index != CLIENT_NONE:
        endpoint = &client.endpoints[index]
        index = endpoint.filling_next
        c = <Connection*> endpoint.connection
        if c == NULL or not (c.receiving and c.socket_nonempty):
            client_filled(endpoint)
            if c != NULL:
                c.sated = is_sated(endpoint)
        else:
            more = True
    return more


cdef bint on_rest(Core* core) noexcept nogil:
    cdef ClientService* clients = <ClientService*> core.services[SERVICE_INDEX].context
    cdef io_uring_sqe* sqe
    cdef uint32_t i
    cdef bint more = False
    if core.stopping:
        return False
    for i in range(clients.clients_used):
        if clients.clients[i] != NULL and clients.clients[i].filling_head != CLIENT_NONE:
            more |= finish_filled(clients.clients[i])
            settle(clients.clients[i])
    if more or (clients.spin_ns and clients.clients_used and not is_crowded(core) and spin(clients)):
        client_service_publish(clients)
        return True
    if client_service_prepare_sleep(clients):
        return True
    clients.idle_since_ns = 0
    clients.sleeps += 1
    clients.said_asleep = True
    if not clients.poll_armed:
        clients.poll_armed = 1
        sqe = uring_sqe(&core.uring)
        io_uring_prep_poll_add(sqe, clients.epoll_fd, POLLIN)
        lu.io_uring_sqe_set_data64(sqe, <uint64_t> clients | OPERATION_POLL)
    return False


cdef enum:
    SERVICE_INDEX = 1

#: Index under which Engine(services=...) must hold a ClientConnections: the ``service`` of install().
SERVICE_CLIENTS = SERVICE_INDEX

cdef ClientBackend backend
backend.read_wanted = read_wanted
backend.cancel_read = cancel_read
backend.write = write
backend.cancel_write = cancel_write
backend.sent = sent
backend.is_sent = is_sent
backend.shutdown = shutdown
backend.name = name
backend.close = close
backend.ring = ring


cdef class ClientConnections(ServiceObject):
    """The service that carries the connections of ``clients``; ``install(site=token)`` gives one to its client.

    Goes into ``Engine(services={SERVICE_CLIENTS: ...})``, one per engine, before run(). spin_ns: how long the engine looks at idle rings before
    it sleeps; 0 where the program has no CPU of its own to answer from.
    """

    cdef readonly Clients clients

    def __init__(self, clients: Clients, *, spin_ns: int = 0) -> None:
        self.clients = clients
        clients.service.backend = &backend
        clients.service.spin_ns = spin_ns
        memset(&self.table, 0, sizeof(self.table))
        self.table.context = clients.service
        self.table.on_established = on_established
        self.table.on_data = on_data
        self.table.asks = True
        self.table.on_sent = on_sent
        self.table.on_end_of_data = on_end_of_data
        self.table.on_deadline = on_deadline
        self.table.on_drain = on_drain
        self.table.on_closed = on_closed
        self.table.on_turn = on_turn
        self.table.on_rest = on_rest
