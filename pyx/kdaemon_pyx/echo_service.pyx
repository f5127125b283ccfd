"""A service that sends back what it gets: the smallest user of the contract in connection.pxd. Tests and benchmarks of the engine use it."""

from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from kdaemon_pyx.connection cimport (
    CLOSE_DEADLINE, CLOSE_DRAIN, CLOSE_PEER, Connection, connection_close, connection_commit, connection_deadlines, connection_finish,
    connection_now_ns, connection_receive_into, connection_reserve, connection_room, connection_send_memory, connection_set_deadline)
from kdaemon_pyx.service cimport ServiceObject


cdef void arm_deadline(Connection* c) noexcept nogil:
    connection_set_deadline(c, connection_now_ns(c) + connection_deadlines(c).idle_ns)


cdef int on_established(Connection* c) noexcept nogil:
    arm_deadline(c)
    return 0


cdef int64_t on_data(Connection* c, const uint8_t* data, uint64_t length) noexcept nogil:
    cdef uint64_t done = 0
    cdef uint32_t piece
    cdef uint8_t* room
    arm_deadline(c)
    while done < length:
        piece = connection_room(c)
        if piece > length - done:
            piece = <uint32_t>(length - done)
        room = connection_reserve(c, piece)
        if piece == 0 or room == NULL:
            break
        memcpy(room, data + done, piece)
        connection_commit(c, piece)
        done += piece
    return <int64_t>done


cdef void on_sent(Connection* c) noexcept nogil:
    arm_deadline(c)


cdef void on_end_of_data(Connection* c) noexcept nogil:
    connection_finish(c, CLOSE_PEER)


cdef void on_deadline(Connection* c) noexcept nogil:
    connection_close(c, CLOSE_DEADLINE)


cdef void on_drain(Connection* c) noexcept nogil:
    connection_finish(c, CLOSE_DRAIN)


cdef void on_closed(Connection* c) noexcept nogil:
    pass


# --- the same in pull style: one block of memory per connection, received into and sent from -------------------------------

cdef enum:
    BLOCK = 50000


cdef int pull_on_established(Connection* c) noexcept nogil:
    c.service_state = malloc(BLOCK)
    if c.service_state == NULL:
        return -ENOMEM
    arm_deadline(c)
    return connection_receive_into(c, <uint8_t*>c.service_state, BLOCK)


cdef int64_t pull_on_data(Connection* c, const uint8_t* data, uint64_t length) noexcept nogil:
    arm_deadline(c)
    return connection_send_memory(c, data, length)


cdef void pull_on_sent(Connection* c) noexcept nogil:
    arm_deadline(c)
    connection_receive_into(c, <uint8_t*>c.service_state, BLOCK)


cdef void pull_on_closed(Connection* c) noexcept nogil:
    free(c.service_state)


cdef class EchoService(ServiceObject):
    """Echoes plaintext; closes a connection that is idle for the ``idle`` deadline. ``pull``: by the pull-style calls."""

    def __cinit__(self, *, bint pull=False):
        memset(&self.table, 0, sizeof(self.table))
        self.table.on_established = on_established
        self.table.on_data = on_data
        self.table.on_sent = on_sent
        self.table.on_end_of_data = on_end_of_data
        self.table.on_deadline = on_deadline
        self.table.on_drain = on_drain
        self.table.on_closed = on_closed
        if pull:
            self.table.on_established = pull_on_established
            self.table.on_data = pull_on_data
            self.table.on_sent = pull_on_sent
            self.table.on_closed = pull_on_closed
