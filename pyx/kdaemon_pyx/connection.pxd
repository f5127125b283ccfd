# The connection: what the engine core gives to the services above it (file_service, later client_service, http2 ...).
#
# Layers:  uring, record, ktls  <-  connection  <-  services  <-  engine.   A service never touches a socket, an sqe or a key:
# it is handed plaintext and says what to send. The same calls work with both record layers.
#
# Thread-safety: everything here runs in the one engine thread that owns the connection's uring.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, int64_t

# Reference-counted open file; owner: files.pyx (the file table). A connection that sends from it holds one reference
# from connection_send_file() until the last operation that can touch it has completed.
cdef struct File:
    int fd
    uint32_t references
    uint64_t size                  # bytes, at the statx that validated it
    int64_t mtime_s
    uint32_t mtime_ns
    int64_t ctime_s
    uint32_t ctime_ns
    uint64_t inode
    uint64_t device
    uint8_t* mapping               # kernel record layer only: MAP_SHARED, PROT_READ, or NULL
    uint64_t mapping_size
    void* entry                    # files.pyx's own bookkeeping
    void (*release)(File* file) noexcept nogil  # called by whoever drops the last reference; set by the file table

ctypedef enum ConnectionState:
    CONNECTION_FREE = 0
    CONNECTION_HANDSHAKE           # bytes go up to the control thread, which says when to receive
    CONNECTION_ESTABLISHED         # the service owns the plaintext
    CONNECTION_CLOSING             # terminate sent; joining outstanding operations
    CONNECTION_EXPORTED

ctypedef enum RecordLayer:
    RECORD_LAYER_NONE = 0
    RECORD_LAYER_KERNEL
    RECORD_LAYER_USER

# Why a connection ends; counted, and told to the control thread in EVENT_CLOSED.
ctypedef enum CloseReason:
    CLOSE_PEER = 0                 # close_notify received
    CLOSE_SERVICE                  # the service asked (Connection: close, protocol error answered)
    CLOSE_CONTROL                  # the control thread asked (handshake failure, alert)
    CLOSE_TRUNCATED                # EOF without close_notify
    CLOSE_RESET                    # ECONNRESET, EPIPE
    CLOSE_DEADLINE                 # a named deadline passed
    CLOSE_RECORD                   # bad record: MAC, length, type
    CLOSE_KEY_UPDATE               # kernel without rekey: orderly end
    CLOSE_LIMIT                    # AEAD or flood limit
    CLOSE_FILE                     # the file changed or shrank under a response
    CLOSE_DRAIN                    # idle at drain
    CLOSE_DRAIN_DEADLINE           # cut by the drain deadline
    CLOSE_RESOURCES                # no memory, fds or buffers
    CLOSE_REASON_COUNT

# Services read these fields of it: `const Service* service`, `void* service_state`, `uint32_t site`, `RecordLayer record_layer`.
cdef struct Connection             # defined by connection.pyx's owner below this line in the full file

# One table of functions per service; all noexcept nogil. Registered with the engine by index (the `service` of install()).
cdef struct Service:
    # The service's own configuration and tables, the same for all its connections of this engine; owner: the service object.
    void* context
    # Keys are installed, record layer chosen. Allocate per-connection state into c.service_state. <0: close.
    int (*on_established)(Connection* c) noexcept nogil
    # Plaintext arrived. Return the number of bytes consumed (0..length): what is left is kept by the core (bounded by
    # input_bytes_max) and offered again, with more behind it, or when connection_resume() is called. A service that cannot take more
    # now (a response is still going out) consumes nothing and the core stops receiving: that is the back-pressure.
    # <0: negative errno, close now.
    int64_t (*on_data)(Connection* c, const uint8_t* data, uint64_t length) noexcept nogil
    # Everything queued by connection_send_* has been accepted by the kernel; on_data is offered pending input right after.
    void (*on_sent)(Connection* c) noexcept nogil
    # close_notify received: no more data will come. The service finishes what it sends and calls connection_finish().
    void (*on_end_of_data)(Connection* c) noexcept nogil
    # The deadline set by connection_set_deadline() passed. The service answers (408) or calls connection_close().
    void (*on_deadline)(Connection* c) noexcept nogil
    # Drain was asked: finish what is under way, then connection_finish(); idle connections at once.
    void (*on_drain)(Connection* c) noexcept nogil
    # Last call, exactly once per on_established; no operation is outstanding. Free service_state.
    void (*on_closed)(Connection* c) noexcept nogil

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
