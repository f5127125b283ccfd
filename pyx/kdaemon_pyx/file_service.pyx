"""The file service: HTTP/1.1 sessions (http_session) behind the Service table of the connection core."""

from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.string cimport memcpy, memset

from kdaemon_pyx.connection cimport (
    connection_close, connection_commit, connection_count_request, connection_deadlines, connection_file_position,
    connection_finish, connection_now_ns, connection_reserve, connection_room, connection_send_file, connection_set_deadline,
)
from kdaemon_pyx.core cimport RECORD_LAYER_KERNEL, Connection
from kdaemon_pyx.files cimport file_table_sweep
from kdaemon_pyx.http_address cimport Address, AddressTable, address_enter, address_leave, address_may_ask
from kdaemon_pyx.http_context cimport FileContext
from kdaemon_pyx.http_log cimport PeerAddress
from kdaemon_pyx.http_session cimport (
    HttpContext, HttpSession, session_free, session_on_data, session_on_deadline, session_on_drain,
    session_on_end_of_data, session_on_sent, session_open,
)

cdef extern from "<netinet/in.h>" nogil:
    struct sockaddr:
        pass
    struct sockaddr_storage:
        unsigned short ss_family
    struct sockaddr_in:
        unsigned int sin_addr
    struct sockaddr_in6:
        unsigned char sin6_addr[16]
    const int AF_INET
    const int AF_INET6

cdef extern from "<sys/socket.h>" nogil:
    int getpeername(int fd, sockaddr* address, unsigned int* length)

__all__ = ["FileService"]


cdef void peer_of(Connection* c, PeerAddress* peer) noexcept nogil:
    cdef sockaddr_storage address
    cdef unsigned int length = sizeof(address)
    cdef sockaddr_in* ipv4 = <sockaddr_in*>&address
    cdef sockaddr_in6* ipv6 = <sockaddr_in6*>&address
    peer.length = 0
    if getpeername(c.fd, <sockaddr*>&address, &length) != 0:
        return
    if address.ss_family == AF_INET:
        peer.length = 4
        memcpy(peer.bytes, &ipv4.sin_addr, 4)
    elif address.ss_family == AF_INET6:
        peer.length = 16
        memcpy(peer.bytes, &ipv6.sin6_addr, 16)


cdef bint on_accept(void* context, Connection* c) noexcept nogil:
    cdef AddressTable* arrivals = &(<HttpContext*>context).arrivals
    cdef Address* address
    cdef PeerAddress peer
    cdef bint allowed
    if arrivals.buckets == NULL:
        return True
    peer_of(c, &peer)
    address = address_enter(arrivals, &peer, c.core.now_ns, &allowed)
    if address == NULL:                                    # gone already, or no memory to count it
        return True
    if not allowed or not address_may_ask(arrivals, address, c.core.now_ns):
        address_leave(arrivals, address, c.core.now_ns)
        return False
    c.admission = address
    return True


cdef void on_gone(void* context, Connection* c) noexcept nogil:
    if c.admission != NULL:
        address_leave(&(<HttpContext*>context).arrivals, <Address*>c.admission, c.core.now_ns)
        c.admission = NULL


cdef int on_established(Connection* c) noexcept nogil:
    c.service_state = session_open(
        <HttpContext*>c.service.context, c, c.site, c.record_layer == RECORD_LAYER_KERNEL)
    return 0 if c.service_state != NULL else -ENOMEM


cdef int64_t on_data(Connection* c, const uint8_t* data, uint64_t length) noexcept nogil:
    return session_on_data(<HttpSession*>c.service_state, data, length)


cdef void on_sent(Connection* c) noexcept nogil:
    session_on_sent(<HttpSession*>c.service_state)


cdef void on_end_of_data(Connection* c) noexcept nogil:
    session_on_end_of_data(<HttpSession*>c.service_state)


cdef void on_deadline(Connection* c) noexcept nogil:
    session_on_deadline(<HttpSession*>c.service_state)


cdef void on_drain(Connection* c) noexcept nogil:
    session_on_drain(<HttpSession*>c.service_state)


cdef void on_closed(Connection* c) noexcept nogil:
    if c.service_state != NULL:
        session_free(<HttpSession*>c.service_state)
        c.service_state = NULL


cdef uint64_t on_timer(void* context, uint64_t now_ns) noexcept nogil:
    return file_table_sweep(&(<HttpContext*>context).table, now_ns)


cdef class FileService(FileContext):
    """Serves files over the connections of one engine: ``Engine(file_service=FileService([Site(root_fd)]))``.

    Parameters and errors are FileContext's. One engine per service: two engines need two services over the same sites.
    """

    def __cinit__(self, sites, limits=None, mime=None, log=None):
        self.context.transport.reserve = connection_reserve
        self.context.transport.commit = connection_commit
        self.context.transport.room = connection_room
        self.context.transport.send_file = connection_send_file
        self.context.transport.file_position = connection_file_position
        self.context.transport.finish = connection_finish
        self.context.transport.close = connection_close
        self.context.transport.set_deadline = connection_set_deadline
        self.context.transport.now_ns = connection_now_ns
        self.context.transport.deadlines = connection_deadlines
        self.context.transport.count_request = connection_count_request
        self.context.transport.peer = peer_of
        memset(&self.service, 0, sizeof(self.service))
        self.service.context = &self.context
        self.service.on_accept = on_accept
        self.service.on_gone = on_gone
        self.service.on_established = on_established
        self.service.on_data = on_data
        self.service.on_sent = on_sent
        self.service.on_end_of_data = on_end_of_data
        self.service.on_deadline = on_deadline
        self.service.on_drain = on_drain
        self.service.on_closed = on_closed
        self.service.on_timer = on_timer
