# The connection: what the engine core gives to the services above it (file_service, later client_service, http2 ...).
#
# Layers:  uring, record, ktls  <-  connection  <-  services  <-  engine.   A service never touches a socket, an sqe or a key:
# it is handed plaintext and says what to send. The same calls work with both record layers.
#
# Thread-safety: everything here runs in the one engine thread that owns the connection's uring.

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

# The structures (File, Connection, Service, CloseReason, ...) are in core.pxd; take them from here or from there.
from kdaemon_pyx.core cimport (
    CLOSE_CONTROL, CLOSE_DEADLINE, CLOSE_DRAIN, CLOSE_DRAIN_DEADLINE, CLOSE_FILE, CLOSE_KEY_UPDATE, CLOSE_LIMIT, CLOSE_PEER, CLOSE_REASON_COUNT,
    CLOSE_RECORD, CLOSE_RESET, CLOSE_RESOURCES, CLOSE_SERVICE, CLOSE_TRUNCATED, CONNECTION_CLOSING, CONNECTION_ESTABLISHED, CONNECTION_EXPORTED,
    CONNECTION_FREE, CONNECTION_HANDSHAKE, RECORD_LAYER_KERNEL, RECORD_LAYER_NONE, RECORD_LAYER_USER, CloseReason, Connection, ConnectionState,
    Core, Deadlines, File, RecordLayer, Service)

# --- calls for services -------------------------------------------------------------------------------------------

# Room for `length` bytes of plaintext in the connection's output buffer; NULL if it does not fit now (flush, wait for on_sent).
# Consecutive reserve/commit pairs of one on_data call leave in as few records and sends as possible (pipelined responses).
cdef uint8_t* connection_reserve(Connection* c, uint32_t length) noexcept nogil
cdef void connection_commit(Connection* c, uint32_t length) noexcept nogil
cdef uint32_t connection_room(Connection* c) noexcept nogil

# Queue `length` bytes of `file` from `offset`, after what is committed. Takes one reference. At most one file range may be queued:
# the service sends nothing more until on_sent. User mode: read into buffers, sealed in batches. Kernel mode: resident ranges by SEND from
# the mapping, everything else, and always the page that contains EOF, by READ into a buffer. A short read, or size, mtime or ctime
# different from the File's before the last bytes are submitted, closes with CLOSE_FILE.
cdef int connection_send_file(Connection* c, File* file, uint64_t offset, uint64_t length) noexcept nogil

# Pull style, for services whose memory is the destination or the source (client rings). Kernel layer: the socket reads and writes it, no copy is
# made here; user layer: plaintext is copied there after its tag is verified, and copied away before it is sealed.
#
# How far the file range that was queued last has been taken up: an offset into the file, on_closed included.
cdef uint64_t connection_file_position(Connection* c) noexcept nogil

# Queue `length` bytes of the service's memory, like a file range: it stays valid until on_sent or on_closed. 0, or -EBUSY.
cdef int connection_send_memory(Connection* c, const uint8_t* data, uint64_t length) noexcept nogil
# The service wants that memory back: how many bytes of it leave all the same (the memory is the service's again at once), or -EINPROGRESS: the kernel
# still reads it; on_sent tells the end, connection_memory_sent() then how much went.
cdef int64_t connection_cancel_send(Connection* c) noexcept nogil
cdef uint64_t connection_memory_sent(Connection* c) noexcept nogil
# The next plaintext, 1..`length` bytes, goes to `data`; on_data(c, data, n) gives the memory back (n = 0: cancelled), its return value below
# zero closes. Valid until then or on_closed. From the first call on nothing is received without being asked for: that is the
# back-pressure, and why the peer's end is only seen while a receive is waiting. 0, or -EBUSY (one at a time).
cdef int connection_receive_into(Connection* c, uint8_t* data, uint32_t length) noexcept nogil
# Exactly one on_data answers it, with what has arrived or with no byte.
cdef void connection_cancel_receive(Connection* c) noexcept nogil

# True while output is queued or in flight.
cdef bint connection_is_sending(Connection* c) noexcept nogil
# Offer pending input to on_data again (after the current callback returns).
cdef void connection_resume(Connection* c) noexcept nogil
# Send what is queued, then close_notify, then close: the orderly end. A lingering read avoids a reset that would eat the response.
cdef void connection_finish(Connection* c, CloseReason reason) noexcept nogil
# Terminate now; on_closed comes when outstanding operations are joined.
cdef void connection_close(Connection* c, CloseReason reason) noexcept nogil
# One deadline per connection for the service's use; 0 cancels. Coarse monotonic time of the current loop turn: connection_now_ns.
cdef void connection_set_deadline(Connection* c, uint64_t deadline_ns) noexcept nogil
cdef uint64_t connection_now_ns(Connection* c) noexcept nogil

# The engine's named deadlines (header, body, idle are for services to add to connection_now_ns).
cdef const Deadlines* connection_deadlines(Connection* c) noexcept nogil
# One more request answered (counters()["requests"]).
cdef void connection_count_request(Connection* c) noexcept nogil

# --- calls for the engine -------------------------------------------------------------------------------------------

cdef void connection_advance(Connection* c) noexcept nogil
cdef void connection_expired(Connection* c) noexcept nogil
