"""Life of a connection's slot: allocation, handles, events, deadlines, and the three-step close (terminate, join, close)."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

from kdaemon_pyx.core cimport CloseReason, Connection, Core, File, Operation

cdef enum:
    EVENT_KIND_RECORDS = 1
    EVENT_KIND_END_OF_FILE = 2
    EVENT_KIND_CONTROL_RECORD = 3
    EVENT_KIND_INSTALLED = 4
    EVENT_KIND_CLOSED = 5
    EVENT_KIND_ACCEPT_PAUSED = 6
    EVENT_KIND_UNLISTENED = 7
    EVENT_KIND_DRAINED = 8
    EVENT_KIND_REKEYED = 9
    EVENT_KIND_KEY_LIMIT = 10
    EVENT_KIND_CONNECTED = 11
    EVENT_KIND_EXPORTED = 12


cdef inline uint64_t operation_data(void* object_, Operation operation) noexcept nogil:
    return <uint64_t>object_ | <uint64_t>operation

cdef inline void connection_mark(Connection* c) noexcept nogil:
    """To be advanced before the next submission."""
    if not c.dirty:
        c.dirty = 1
        c.dirty_next = c.core.dirty
        c.core.dirty = c

cdef inline uint64_t connection_handle(Connection* c) noexcept nogil:
    return <uint64_t>c.generation << 32 | c.index

cdef int core_connections_setup(Core* core, uint32_t connections_max) noexcept nogil
cdef void core_connections_teardown(Core* core) noexcept nogil
cdef Connection* connection_allocate(Core* core, int32_t fd, int32_t listener) noexcept nogil
cdef Connection* connection_find(Core* core, uint64_t handle) noexcept nogil
cdef void connection_terminate(Connection* c, CloseReason reason, int32_t error) noexcept nogil
cdef bint connection_would_block(Connection* c) noexcept nogil
cdef void connection_join(Connection* c) noexcept nogil
cdef void connection_cancel_all(Connection* c) noexcept nogil
cdef void connection_exported(Connection* c) noexcept nogil
cdef void connection_closed(Connection* c) noexcept nogil
cdef void connection_update_timer(Connection* c) noexcept nogil
cdef void file_release(File* file) noexcept nogil

cdef void event_push(
    Core* core, int32_t kind, uint64_t connection, int32_t a, int64_t b, uint8_t* data, uint32_t length,
    bint secret) noexcept nogil
cdef void event_push_keys(Connection* c, int32_t kind, int32_t a, const uint8_t* data, uint32_t length) noexcept nogil
