"""Listeners of one engine thread: multishot accept, and its pause when descriptors or memory run out.

The listening sockets belong to the supervisor; this side only takes connections from them. A connection gets its ULP right here, because the
kernel refuses it once the peer's FIN is there.
"""

from libc.errno cimport EBADF, EINVAL, EMFILE, ENFILE, ENOBUFS, ENOENT, ENOMEM, ENOTSOCK, EOPNOTSUPP
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t
from posix.unistd cimport close

from kdaemon_pyx cimport liburing as lu
from kdaemon_pyx.changeover cimport changeover_plain
from kdaemon_pyx.core cimport (
    CLOSE_LIMIT, LISTENERS_MAX, OPERATION_ACCEPT, OPERATION_NONE, SERVICES_MAX, Connection, Core, Listener, Service)
from kdaemon_pyx.ktls cimport ktls_attach
from kdaemon_pyx.lifecycle cimport (
    EVENT_KIND_ACCEPT_PAUSED, EVENT_KIND_CONNECTED, EVENT_KIND_UNLISTENED, connection_allocate, connection_handle, connection_mark, connection_terminate, event_push, operation_data)
from kdaemon_pyx.timers cimport timer_set
from kdaemon_pyx.uring cimport uring_sqe


cdef extern from "<sys/socket.h>" nogil:
    int SOCK_CLOEXEC
    int SOL_SOCKET
    int MSG_PEEK
    int MSG_DONTWAIT
    int setsockopt(int fd, int level, int name, const void* value, unsigned int length)
    int getsockopt(int fd, int level, int name, void* value, unsigned int* length)
    int accept4(int fd, void* address, unsigned int* length, int flags)
    ssize_t recv(int fd, void* data, size_t length, int flags)

cdef extern from "<netinet/tcp.h>" nogil:
    int TCP_NODELAY
    int SOL_TCP

cdef extern from "<asm/socket.h>" nogil:
    int SO_GET_FILTER

cdef enum:
    ACCEPT_RETRY_NS = 100000000    # after EMFILE, if no connection closes before


cdef void arm(Core* core, Listener* listener) noexcept nogil:
    cdef lu.io_uring_sqe* sqe = uring_sqe(&core.uring)
    lu.io_uring_prep_multishot_accept(sqe, listener.fd, NULL, NULL, SOCK_CLOEXEC)
    lu.io_uring_sqe_set_data64(sqe, operation_data(listener, OPERATION_ACCEPT))
    listener.armed = 1
    listener.paused = 0


cdef int listener_add(Core* core, int32_t number, int32_t fd, int64_t plain) noexcept nogil:
    """0, or -ENOBUFS if LISTENERS_MAX are in use. plain: LISTEN_TLS, LISTEN_LIMITED, or the service (high half) and site that get its connections without TLS."""
    cdef int i
    cdef int one = 1
    cdef Listener* listener
    for i in range(LISTENERS_MAX):
        listener = &core.listeners[i]
        if listener.fd < 0:
            listener.fd = fd
            listener.number = number
            listener.removing = 0
            listener.plain = plain >= 0
            listener.service = <uint32_t>(plain >> 32)
            listener.site = <uint32_t>plain
            listener.limited = plain == LISTEN_LIMITED
            # Accepted sockets inherit it: no system call per connection.
            setsockopt(fd, SOL_TCP, TCP_NODELAY, &one, sizeof(one))
            arm(core, listener)
            return 0
    return -ENOBUFS


cdef void accept_queued(Core* core, Listener* listener) noexcept nogil:
    """Draining: takes what is queued already, if the supervisor lets nothing more in (its filter on the socket says so).

    A socket that somebody else holds, too, has no filter: the queue is for whoever accepts from it next.
    """
    cdef unsigned int filter_length = 0
    cdef int fd
    if getsockopt(listener.fd, SOL_SOCKET, SO_GET_FILTER, NULL, &filter_length) < 0 or filter_length == 0:
        return
    while True:
        fd = accept4(listener.fd, NULL, NULL, SOCK_CLOEXEC)
        if fd < 0:
            return                                         # EAGAIN: listening sockets do not block
        connection_accepted(core, listener, fd)


cdef void unlistened(Core* core, Listener* listener) noexcept nogil:
    listener.fd = -1
    listener.paused = 0
    event_push(core, EVENT_KIND_UNLISTENED, listener.number, 0, 0, NULL, 0, False)


cdef void remove(Core* core, Listener* listener) noexcept nogil:
    cdef lu.io_uring_sqe* sqe
    if listener.removing:
        return
    listener.removing = 1
    # Now, and not when the cancellation has completed: while an accept is at work that may be much later.
    if core.draining and not core.stopping:
        accept_queued(core, listener)
    if not listener.armed:
        unlistened(core, listener)
        return
    sqe = uring_sqe(&core.uring)
    lu.io_uring_prep_cancel64(sqe, operation_data(listener, OPERATION_ACCEPT), 0)
    lu.io_uring_sqe_set_data64(sqe, OPERATION_NONE)


cdef void listener_remove(Core* core, int32_t number) noexcept nogil:
    cdef int i
    for i in range(LISTENERS_MAX):
        if core.listeners[i].fd >= 0 and core.listeners[i].number == number:
            remove(core, &core.listeners[i])


cdef void listeners_stop(Core* core) noexcept nogil:
    cdef int i
    for i in range(LISTENERS_MAX):
        if core.listeners[i].fd >= 0:
            remove(core, &core.listeners[i])


cdef bint listeners_armed(Core* core) noexcept nogil:
    cdef int i
    for i in range(LISTENERS_MAX):
        if core.listeners[i].armed:
            return True
    return False


cdef void listeners_resume(Core* core) noexcept nogil:
    """A descriptor is free again, or the retry timer fired."""
    cdef int i
    core.descriptors_short = 0
    for i in range(LISTENERS_MAX):
        if core.listeners[i].fd >= 0 and core.listeners[i].paused and not core.listeners[i].removing:
            arm(core, &core.listeners[i])


cdef void pause(Core* core, Listener* listener, int32_t error) noexcept nogil:
    listener.paused = 1
    core.descriptors_short = 1
    core.counters.accept_paused += 1
    # At most one event a second: a daemon at its limit pauses and resumes with every connection.
    if core.now_ns - core.accept_paused_ns >= 1000000000:
        core.accept_paused_ns = core.now_ns
        event_push(core, EVENT_KIND_ACCEPT_PAUSED, listener.number, error, 0, NULL, 0, False)
    timer_set(&core.timers, &core.accept_timer, core.now_ns + ACCEPT_RETRY_NS)


cdef void attach_ulp(Core* core, Connection* c) noexcept nogil:
    cdef int result
    if core.record_layer_mode != 2 and not core.ulp_missing:
        result = ktls_attach(c.fd)
        if result == 0:
            c.ulp_attached = 1
        elif result == -ENOENT:
            core.ulp_missing = 1


cdef void connection_adopt(Core* core, int32_t fd, int64_t cookie, bint foreign) noexcept nogil:
    """A connected socket of the control thread becomes a connection. Handle 0 in the event: refused, fd closed."""
    cdef Connection* c = NULL
    if not core.draining and not core.stopping:
        c = connection_allocate(core, fd, -1)
    if c == NULL:
        close(fd)
        event_push(core, EVENT_KIND_CONNECTED, 0, -EMFILE, cookie, NULL, 0, False)
        return
    c.client_role = 1
    c.foreign = foreign
    attach_ulp(core, c)
    c.engine_deadline_ns = core.now_ns + core.deadlines.handshake_ns
    connection_mark(c)
    event_push(core, EVENT_KIND_CONNECTED, connection_handle(c), 0, cookie, NULL, 0, False)


cdef bint admitted(Core* core, Connection* c) noexcept nogil:
    """Whether the services' limits let it in, before a handshake costs anything."""
    cdef const Service* service
    cdef int i
    for i in range(SERVICES_MAX):
        service = core.services[i]
        if service != NULL and service.on_accept != NULL:
            if not service.on_accept(service.context, c):
                return False
            c.admitted_by = service
    return True


cdef bint has_spoken(int32_t fd) noexcept nogil:
    """Something is there to be read."""
    cdef uint8_t byte
    return recv(fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) > 0


cdef void connection_accepted(Core* core, Listener* listener, int32_t fd) noexcept nogil:
    cdef Connection* c
    if core.stopping or (core.draining and not has_spoken(fd)):
        close(fd)
        return
    c = connection_allocate(core, fd, listener.number)
    if c == NULL:
        core.counters.refused += 1
        close(fd)
        return
    core.counters.accepted += 1
    if listener.limited and not admitted(core, c):
        core.counters.refused_by_limit += 1
        connection_terminate(c, CLOSE_LIMIT, 0)
        return
    attach_ulp(core, c)
    if listener.plain:
        changeover_plain(c, listener.service, listener.site)
        return
    c.receive_wanted = 1
    c.engine_deadline_ns = core.now_ns + core.deadlines.handshake_ns
    connection_mark(c)


cdef void listener_accepted(Core* core, Listener* listener, int32_t result, uint32_t flags) noexcept nogil:
    """Completion of the multishot accept."""
    if not (flags & lu.IORING_CQE_F_MORE):
        listener.armed = 0
    if result >= 0:
        connection_accepted(core, listener, result)
    elif result == -EMFILE or result == -ENFILE or result == -ENOBUFS or result == -ENOMEM:
        if not listener.armed and not listener.removing:
            pause(core, listener, -result)
    elif result == -EBADF or result == -EINVAL or result == -ENOTSOCK or result == -EOPNOTSUPP:
        listener.removing = 1
    if listener.armed:
        return
    if listener.removing:
        unlistened(core, listener)
    elif not listener.paused:
        arm(core, listener)
