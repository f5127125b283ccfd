"""Life of a connection's slot.

A slot's generation grows with every use, so a handle that the control thread kept too long names nothing. A slot is reused only after
the CLOSE of its fd has completed, and that is submitted only when no operation of the connection is outstanding: the address in an
operation's user_data is therefore always that of the connection which started it.

Closing is three steps: ``connection_terminate`` (state CLOSING, one cancel for everything on the fd), ``connection_join`` (until the last
outstanding operation has completed; then buffers, file and keys are given back and CLOSE is submitted), ``connection_closed``.
"""

from libc.errno cimport EAGAIN, ECONNRESET, EINVAL, ENOMEM
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap

from kdaemon_pyx cimport liburing as lu
from kdaemon_pyx.buffers cimport pool_give
from kdaemon_pyx.core cimport (
    CLOSE_RESOURCES, CLOSE_SERVICE, CONNECTION_CLOSING, CONNECTION_EXPORTED, CONNECTION_FREE, CONNECTION_HANDSHAKE, CONNECTION_STRIDE, OPERATION_CANCEL, OPERATION_CLOSE, CloseReason, Connection, Core, File, Item, KeyMaterial)
from kdaemon_pyx.libcrypto cimport OPENSSL_cleanse
from kdaemon_pyx.record cimport record_keys_clear
from kdaemon_pyx.spsc cimport Message, queue_push
from kdaemon_pyx.timers cimport TIMER_CONNECTION, timer_cancel, timer_set
from kdaemon_pyx.uring cimport uring_sqe


cdef extern from "<fcntl.h>" nogil:
    int fcntl(int fd, int command, ...)
    int F_GETFL
    int F_SETFL
    int O_NONBLOCK

cdef extern from "<sys/socket.h>" nogil:
    struct linger:
        int l_onoff
        int l_linger
    int SOL_SOCKET
    int SO_LINGER
    int setsockopt(int fd, int level, int name, const void* value, unsigned int length)

cdef enum:
    WOULD_BLOCK_MAX = 64


cdef int core_connections_setup(Core* core, uint32_t connections_max) noexcept nogil:
    """Maps the slots; a page is touched when its first connection comes. 0, -ENOMEM, or -EINVAL if CONNECTION_STRIDE is too small."""
    cdef void* memory
    if sizeof(Connection) > CONNECTION_STRIDE:
        return -EINVAL
    memory = mmap(NULL, <size_t>connections_max * CONNECTION_STRIDE, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if memory == MAP_FAILED:
        return -ENOMEM
    core.connections = <uint8_t*>memory
    core.connections_max = connections_max
    core.connections_fresh = connections_max
    return 0


cdef void core_connections_teardown(Core* core) noexcept nogil:
    if core.connections != NULL:
        munmap(core.connections, <size_t>core.connections_max * CONNECTION_STRIDE)
        core.connections = NULL


cdef Connection* connection_allocate(Core* core, int32_t fd, int32_t listener) noexcept nogil:
    """A slot in the state HANDSHAKE that owns ``fd``, or NULL if all are in use."""
    cdef Connection* c = core.free_connections
    cdef uint32_t generation, index
    if c != NULL:
        core.free_connections = c.live_next
        generation = c.generation
        index = c.index
    elif core.connections_fresh:
        index = core.connections_max - core.connections_fresh
        core.connections_fresh -= 1
        c = <Connection*>(core.connections + <size_t>index * CONNECTION_STRIDE)
        generation = 0
    else:
        return NULL
    memset(c, 0, sizeof(Connection))
    c.core = core
    c.index = index
    c.generation = (generation + 1) & 0x7fffffff or 1
    c.fd = fd
    c.listener = listener
    c.state = CONNECTION_HANDSHAKE
    c.timer.kind = TIMER_CONNECTION
    c.live_next = core.live
    if core.live != NULL:
        core.live.live_previous = c
    core.live = c
    core.counters.connections += 1
    return c


cdef Connection* connection_find(Core* core, uint64_t handle) noexcept nogil:
    """The connection of a handle, or NULL if it is gone."""
    cdef uint64_t index = <uint32_t>handle
    cdef Connection* c
    if index >= core.connections_max - core.connections_fresh:
        return NULL
    c = <Connection*>(core.connections + <size_t>index * CONNECTION_STRIDE)
    if c.state == CONNECTION_FREE or c.generation != handle >> 32:
        return NULL
    return c


cdef void connection_terminate(Connection* c, CloseReason reason, int32_t error) noexcept nogil:
    """First step; what is not sent yet is lost. The first reason stays, unless the connection was finishing in good order."""
    if c.state == CONNECTION_CLOSING or c.state == CONNECTION_FREE:
        return
    if not c.finishing:
        c.close_reason = <uint8_t>reason
        c.close_errno = error
    c.state = CONNECTION_CLOSING
    connection_mark(c)


cdef bint connection_would_block(Connection* c) noexcept nogil:
    """An operation failed with EAGAIN: io_uring waits by itself, except on a socket with O_NONBLOCK. An adopted one shares its flags with the
    program that passed it: the flag is taken off, and who keeps setting it loses the connection instead of making the engine spin. True: try again."""
    c.would_block += 1
    if c.would_block > WOULD_BLOCK_MAX:
        connection_terminate(c, CLOSE_RESOURCES, EAGAIN)
        return False
    fcntl(c.fd, F_SETFL, fcntl(c.fd, F_GETFL) & ~O_NONBLOCK)
    return True


cdef void file_release(File* file) noexcept nogil:
    file.references -= 1
    if file.references == 0 and file.release != NULL:
        file.release(file)


cdef void give_back(Connection* c) noexcept nogil:
    """Everything the connection owns except its fd. No operation is outstanding."""
    cdef Item* item
    timer_cancel(&c.core.timers, &c.timer)
    if c.established:
        c.established = 0
        c.service.on_closed(c)
    if c.admitted_by != NULL:
        c.admitted_by.on_gone(c.admitted_by.context, c)
        c.admitted_by = NULL
    if c.output != NULL:
        pool_give(&c.core.pool, c.output)
    if c.sending != NULL and c.sending != &c.window:
        pool_give(&c.core.pool, c.sending)
    if c.cipher != NULL:
        pool_give(&c.core.pool, c.cipher)
    if c.input != NULL:
        pool_give(&c.core.pool, c.input)
    if c.control_send != NULL:
        pool_give(&c.core.pool, c.control_send)
    if c.control_receive != NULL:
        pool_give(&c.core.pool, c.control_receive)
    c.output = NULL
    c.sending = NULL
    c.cipher = NULL
    c.input = NULL
    c.control_send = NULL
    c.control_receive = NULL
    if c.file != NULL:
        file_release(c.file)
        c.file = NULL
    while c.items != NULL:
        item = c.items
        c.items = item.next
        OPENSSL_cleanse(item, sizeof(Item) + item.length)
        free(item)
    free(c.fragment)
    c.fragment = NULL
    if c.install_material != NULL:
        OPENSSL_cleanse(c.install_material, sizeof(KeyMaterial))
        free(c.install_material)
        c.install_material = NULL
    record_keys_clear(&c.transmit_keys)
    record_keys_clear(&c.receive_keys)
    OPENSSL_cleanse(&c.secrets, sizeof(c.secrets))


cdef void connection_cancel_all(Connection* c) noexcept nogil:
    """One cancel for everything on the fd."""
    cdef lu.io_uring_sqe* sqe = uring_sqe(&c.core.uring)
    c.cancelling = 1
    lu.io_uring_prep_cancel_fd(sqe, c.fd, lu.IORING_ASYNC_CANCEL_ALL)
    lu.io_uring_sqe_set_data64(sqe, operation_data(c, OPERATION_CANCEL))
    c.operations += 1


cdef void close_fd(Connection* c) noexcept nogil:
    cdef lu.io_uring_sqe* sqe
    cdef linger no_linger
    if c.foreign:
        # Whoever passed the socket may have set SO_LINGER, and then the last close of it waits for the peer. It is taken off; who sets it
        # again just now keeps a thread of the kernel waiting, not this one.
        no_linger.l_onoff = 0
        no_linger.l_linger = 0
        setsockopt(c.fd, SOL_SOCKET, SO_LINGER, &no_linger, sizeof(no_linger))
    sqe = uring_sqe(&c.core.uring)
    lu.io_uring_prep_close(sqe, c.fd)
    if c.foreign:
        lu.io_uring_sqe_set_flags(sqe, lu.IOSQE_ASYNC)
    lu.io_uring_sqe_set_data64(sqe, operation_data(c, OPERATION_CLOSE))
    c.operations = 1
    c.fd = -1


cdef void connection_join(Connection* c) noexcept nogil:
    """Second step, repeated until no operation is outstanding."""
    if c.operations == 0:
        give_back(c)
        close_fd(c)
    elif not c.cancelling and c.fd >= 0:
        connection_cancel_all(c)


cdef void connection_closed(Connection* c) noexcept nogil:
    """Third step: the fd is closed. The slot is free from here on."""
    if c.exporting:
        event_push(c.core, EVENT_KIND_EXPORTED, connection_handle(c), -ECONNRESET, c.export_cookie, NULL, 0, False)
    event_push(c.core, EVENT_KIND_CLOSED, connection_handle(c), c.close_reason, c.close_errno, NULL, 0, False)
    c.core.counters.closed[c.close_reason] += 1
    slot_free(c)


cdef void connection_exported(Connection* c) noexcept nogil:
    """Instead of a close: no operation is outstanding, the fd goes to the control thread, everything else is given back or wiped."""
    c.state = CONNECTION_EXPORTED
    c.close_reason = CLOSE_SERVICE
    give_back(c)
    # Whoever gets it expects a socket that blocks.
    fcntl(c.fd, F_SETFL, fcntl(c.fd, F_GETFL) & ~O_NONBLOCK)
    event_push(c.core, EVENT_KIND_EXPORTED, connection_handle(c), c.fd, c.export_cookie, NULL, 0, False)
    c.fd = -1
    c.core.counters.exported += 1
    slot_free(c)


cdef void slot_free(Connection* c) noexcept nogil:
    cdef Core* core = c.core
    core.counters.connections -= 1
    if c.live_previous != NULL:
        c.live_previous.live_next = c.live_next
    else:
        core.live = c.live_next
    if c.live_next != NULL:
        c.live_next.live_previous = c.live_previous
    c.state = CONNECTION_FREE
    c.live_next = core.free_connections
    core.free_connections = c


cdef void connection_update_timer(Connection* c) noexcept nogil:
    """The wheel's deadline is the earliest of the engine's, the one of what is being sent, and the service's."""
    cdef uint64_t deadline_ns = c.engine_deadline_ns
    if c.send_deadline_ns != 0 and (deadline_ns == 0 or c.send_deadline_ns < deadline_ns):
        deadline_ns = c.send_deadline_ns
    if c.service_deadline_ns != 0 and (deadline_ns == 0 or c.service_deadline_ns < deadline_ns):
        deadline_ns = c.service_deadline_ns
    if deadline_ns != c.timer.deadline_ns:
        timer_set(&c.core.timers, &c.timer, deadline_ns)


cdef void event_push(
        Core* core, int32_t kind, uint64_t connection, int32_t a, int64_t b, uint8_t* data, uint32_t length,
        bint secret) noexcept nogil:
    """Queues an event for the control thread; ``data`` is malloc'd and changes hands. Without memory for a queue chunk the engine stops."""
    cdef Message message
    message.kind = kind
    message.connection = connection
    message.a = a
    message.b = b
    message.data = data
    message.length = length
    message.secret = secret
    message.c = 0
    if queue_push(&core.events, &message) < 0:
        core.uring.error = -ENOMEM
        free(data)
        return
    core.counters.events += 1
    core.events_published = 1


cdef void event_push_keys(Connection* c, int32_t kind, int32_t a, const uint8_t* data, uint32_t length) noexcept nogil:
    """An event whose data begins with the connection's secrets: the control thread keeps none of an established connection."""
    cdef uint32_t total = sizeof(c.secrets) + length
    cdef uint8_t* copy = <uint8_t*>malloc(total)
    if copy == NULL:
        connection_terminate(c, CLOSE_RESOURCES, ENOMEM)
        return
    memcpy(copy, &c.secrets, sizeof(c.secrets))
    if length:
        memcpy(copy + sizeof(c.secrets), data, length)
    event_push(c.core, kind, connection_handle(c), a, 0, copy, total, True)
