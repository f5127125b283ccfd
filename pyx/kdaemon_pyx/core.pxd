"""The data of one engine thread: connections and what they share. No functions: every layer above works on these structures.

Thread-safety: all of it belongs to the engine thread, except the two queues and the wake-up flags (see engine.pyx).
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from kdaemon_pyx.buffers cimport Buffer, BufferPool
from kdaemon_pyx.liburing cimport iovec, msghdr
from kdaemon_pyx.record cimport RecordKeys
from kdaemon_pyx.spsc cimport Queue
from kdaemon_pyx.timers cimport Timer, TimerWheel
from kdaemon_pyx.uring cimport ReceiveRing, Uring

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
    uint64_t links                 # removing or replacing a name changes ctime, too, but not the content
    uint64_t inode
    uint64_t device
    uint8_t* mapping               # kernel record layer only: MAP_SHARED, PROT_READ, or NULL
    uint8_t mapping_refused        # asked for in vain: not again
    uint64_t mapping_size
    void* entry                    # files.pyx's own bookkeeping
    void (*release)(File* file) noexcept nogil  # called by whoever drops the last reference; set by the file table

ctypedef enum ConnectionState:
    CONNECTION_FREE = 0
    CONNECTION_CONNECTING          # client role: connect() is under way
    CONNECTION_HANDSHAKE           # bytes go up to the control thread, which says when to receive
    CONNECTION_ESTABLISHED         # the service owns the plaintext
    CONNECTION_CLOSING             # terminate sent; joining outstanding operations
    CONNECTION_EXPORTED            # the fd is the control thread's; nothing is left here, the slot is about to be free

ctypedef enum RecordLayer:
    RECORD_LAYER_NONE = 0          # established without TLS, or not established yet
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

# Why a connection got its record layer (EVENT_INSTALLED's reason).
ctypedef enum RecordLayerReason:
    REASON_KERNEL = 0
    REASON_OFF                     # configured off
    REASON_NO_ULP                  # TCP_ULP "tls" refused by this kernel
    REASON_SUITE                   # the kernel has not this cipher suite
    REASON_RECORD_SIZE             # the peer takes smaller records only, and this kernel makes none
    REASON_COUNT

# Whether TCP has all records of the kernel's layer: asked before FIN and CLOSE, which would overtake them.
ctypedef enum Flush:
    FLUSH_UNKNOWN = 0
    FLUSH_WAITING_ROOM             # for POLLOUT
    FLUSH_ROOM
    FLUSH_WAITING_TIME             # for the kernel's own worker, which pushes them when there is room
    FLUSH_DONE

# What an operation's user_data says in its low bits; the rest is the address of the (64-byte aligned) object it belongs to.
ctypedef enum Operation:
    OPERATION_NONE = 0             # nobody waits for it (cancel, wake-up writes)
    OPERATION_RECEIVE              # RECV into a provided buffer
    OPERATION_RECEIVE_BULK         # POLL: recv(2) follows, as often as the service asks for more (user layer)
    OPERATION_RECEIVE_EXACT        # RECV of the rest of a record into the held ciphertext (kernel layer, leftover)
    OPERATION_RECEIVE_MESSAGE      # RECVMSG with control buffer: a record that is not application data
    OPERATION_HANGUP               # POLL for the peer's FIN, where the kernel's record layer cannot read any more
    OPERATION_SEND
    OPERATION_SEND_CONTROL         # SENDMSG with a record type
    OPERATION_FILE_READ
    OPERATION_CONNECT
    OPERATION_CANCEL
    OPERATION_CLOSE
    OPERATION_ACCEPT
    OPERATION_WAKE                 # READ of the command eventfd
    OPERATION_FLUSH                # POLL or TIMEOUT until TCP has taken what the kernel's record layer holds back
    OPERATION_PULL                 # RECV into the service's memory (kernel layer)
    OPERATION_POLL                 # a service's one-shot poll: the address is its "armed" word, which is set to 0
    OPERATION_MASK = 63

# Traffic secrets of an established connection: what the control thread needs for a KeyUpdate or a ticket after it has forgotten
# the handshake. Wiped when the connection ends.
cdef struct Secrets:
    uint16_t cipher_suite
    uint8_t hash_length            # bytes used of each
    uint8_t tx[48]
    uint8_t rx[48]
    uint8_t resumption[48]

# What waits to be sent besides the service's data, in order. Allocated with its data behind it; owner: the connection.
ctypedef enum ItemKind:
    ITEM_RAW = 0                   # handshake bytes, as they are
    ITEM_CONTROL                   # one record of content_type
    ITEM_REKEY                     # the KeyUpdate, and the new tx key behind it; data is a KeyMaterial

cdef struct Item:
    Item* next
    uint32_t length
    uint32_t sent                  # of a raw item: bytes already copied to the output; of a rekey: 1, its KeyUpdate is on the way
    uint8_t kind
    uint8_t content_type
    uint8_t data[1]

# Keys and context of an install() or rekey() command; wiped after use. Rekey uses one direction.
cdef struct KeyMaterial:
    uint8_t tx_key[32]
    uint8_t tx_iv[12]
    uint8_t rx_key[32]
    uint8_t rx_iv[12]
    uint64_t tx_sequence
    uint64_t rx_sequence
    Secrets secrets
    uint32_t service
    uint32_t site
    uint16_t record_content_max
    uint32_t attached_length
    uint8_t attached[1]            # install: ciphertext from behind the last handshake record; rekey of tx: the KeyUpdate message

# A message with control buffer for kTLS record types; lives in a small buffer, as long as the operation.
cdef struct ControlMessage:
    msghdr header
    iovec vector
    uint8_t control[64]
    uint8_t data[16384]

cdef struct Core
cdef struct Service

cdef struct Connection:
    Timer timer                    # first: the wheel hands back its address
    Core* core
    Connection* dirty_next         # list of connections to advance before the next submission
    Connection* live_previous
    Connection* live_next          # list of all live connections; or the free list
    uint32_t index
    uint32_t generation
    int32_t fd
    int32_t listener
    uint8_t state
    uint8_t record_layer
    uint8_t reason                 # RecordLayerReason
    uint8_t close_reason
    uint8_t dirty
    uint8_t ulp_attached
    uint8_t operations             # outstanding; the slot is free only at 0
    uint8_t cancelling             # a cancel was submitted
    uint8_t would_block            # how often an operation failed with EAGAIN: see connection_would_block

    # receive side
    uint8_t receiving              # a receive operation is outstanding
    uint8_t receiving_pull         # it is a PULL
    uint8_t sated                  # the service has what it asked for: bulk waits in the socket until it asks again
    uint8_t bulk                   # the last receive took all it could, and left more
    uint8_t receive_wanted         # handshake: the control thread asked; established: input has room
    uint8_t socket_nonempty        # the last completion said that more is there
    uint8_t message_pending        # kernel layer: EIO said that a control record is next
    uint8_t rekey_pending          # KeyUpdate handed up; nothing is opened until rekey()
    uint8_t receive_keys_pending   # kernel layer: leftover not drained, TLS_RX not set yet
    uint8_t end_of_file            # FIN seen
    uint8_t end_of_data            # close_notify seen
    uint8_t end_told               # on_end_of_data was called
    uint8_t resume                 # offer pending input again
    uint8_t want_more              # the service left input because it is incomplete, not because it is busy
    uint8_t discarding             # lingering: input is thrown away
    uint8_t receive_broken         # kernel layer: a bad record; nothing can be read behind it
    uint8_t heard                  # the peer has sent something
    uint8_t pull                   # nothing is received but into the service's memory, when it asks
    uint8_t exporting              # to be handed out as soon as no operation is outstanding; nothing is received
    uint8_t foreign                # adopted from a program, which may still hold the socket and set options of it

    # send side
    uint8_t sent_pending           # on_sent is due when all is out
    uint8_t finishing              # 1: asked for, 2: close_notify queued or not needed, 3: FIN sent or being sent
    uint8_t alert_sent             # a fatal alert was queued: no close_notify
    uint8_t alert_received         # the description of the peer's fatal alert (none is 0: that is close_notify)
    uint8_t established            # on_established was called, on_closed is due
    uint8_t draining_told
    uint8_t key_limit_told
    uint8_t client_role            # the peer may send tickets
    uint8_t file_reading           # a READ into `output` is outstanding
    uint8_t memory_cancelled       # the service wants it back: the SEND in flight is the last
    uint8_t flush                  # kernel layer: Flush
    uint8_t output_full            # output holds a batch of the file that is to be sent as it is
    uint16_t record_content_max    # of a record sent, its type byte not counted: RFC 8449, 16384 without it

    int32_t close_errno
    Buffer* output                 # being filled; user layer: sealed up to record_start
    uint32_t output_length         # user layer: sealed bytes; kernel layer and raw: bytes
    uint32_t record_length         # user layer: plaintext of the open record behind them
    Buffer* sending                # in flight; owner: the SEND operation. &window: a piece of the file's mapping
    Buffer window                  # kernel layer: describes that piece, owns no memory
    uint8_t window_behind          # the window leaves in the same operation, behind the buffer in flight
    uint32_t sending_start
    uint32_t sending_length
    Item* items
    Item* items_last
    Buffer* control_send           # a ControlMessage; owner: the SEND_CONTROL operation
    Buffer* control_receive        # a ControlMessage; owner: the RECEIVE_MESSAGE operation
    KeyMaterial* install_material
    File* file
    uint64_t file_offset
    uint64_t file_remaining        # bytes not yet read
    uint32_t file_read_length      # bytes asked for by the outstanding READ
    const uint8_t* memory          # the range is the service's memory instead (file is &core.memory_file then)
    uint64_t memory_sent           # of it: bytes sealed, or taken by the kernel
    uint8_t* pull_data             # where the service wants the next plaintext, or NULL; owner until on_data: the connection
    uint32_t pull_length

    Buffer* cipher                 # handshake bytes or ciphertext held until a record is complete
    uint32_t cipher_start
    uint32_t cipher_end
    Buffer* input                  # plaintext that the service has not consumed
    uint32_t input_start
    uint32_t input_end
    uint8_t* fragment              # handshake message in pieces (post-handshake); malloc'd
    uint32_t fragment_length
    uint32_t flood                 # budget spent by control and empty records
    uint64_t flood_ns              # last refill

    RecordKeys transmit_keys
    RecordKeys receive_keys
    Secrets secrets
    uint64_t kernel_tx_records     # kernel layer: upper bound of the records sent under this key
    int64_t export_cookie
    uint64_t kernel_tx_expected    # kernel layer: what TCP is to be given in all, without the overhead of the records under this key
    uint64_t kernel_tx_sequence    # kernel layer: number of the first record under this key
    uint64_t service_deadline_ns
    uint64_t engine_deadline_ns    # handshake or close
    uint64_t send_deadline_ns      # while something is in flight
    uint64_t send_progress         # bytes acknowledged when the send deadline was looked at last
    const Service* service
    const Service* admitted_by     # on_accept let it in: on_gone is due
    void* admission                # its own
    void* service_state
    uint32_t site


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
    # What on_data leaves waits for connection_resume(): until then nothing more is opened or received. False: what it leaves may be incomplete, and
    # more is offered with it.
    bint asks
    # Everything queued by connection_send_* has been accepted by the kernel; on_data is offered pending input right after.
    void (*on_sent)(Connection* c) noexcept nogil
    # close_notify received: no more data will come. The service finishes what it sends and calls connection_finish().
    void (*on_end_of_data)(Connection* c) noexcept nogil
    # The deadline set by connection_set_deadline() passed. The service answers (408) or calls connection_close().
    void (*on_deadline)(Connection* c) noexcept nogil
    # Drain was asked: finish what is under way, then connection_finish(); idle connections at once.
    void (*on_drain)(Connection* c) noexcept nogil
    # A connection was accepted on a listener with limits, before anything else is done for it. False: close it at once. NULL: all are welcome.
    bint (*on_accept)(void* context, Connection* c) noexcept nogil
    # Last call of a connection that on_accept let in; it may never have been established.
    void (*on_gone)(void* context, Connection* c) noexcept nogil
    # Last call, exactly once per on_established. Free service_state. No operation is outstanding, or none that the service started: a
    # connection that leaves the state without TLS (START_TLS) is given back so, and may be established a second time.
    void (*on_closed)(Connection* c) noexcept nogil
    # Once per loop turn, when completions and timers have been looked at; NULL: nothing to poll.
    void (*on_turn)(Core* core) noexcept nogil
    # The turn's last: what it did for others is published here, once. NULL with on_turn. True: do not sleep.
    bint (*on_rest)(Core* core) noexcept nogil
    # From time to time, on an idle engine too; NULL: nothing to do. Gives the nanoseconds after which it wants to be called again.
    uint64_t (*on_timer)(void* context, uint64_t now_ns) noexcept nogil

cdef enum:
    CONNECTION_STRIDE = 896        # >= sizeof(Connection), a multiple of 64: the low 6 bits of its address carry an Operation
    SERVICES_MAX = 4
    LISTENERS_MAX = 64

# Named deadlines in nanoseconds (ARCHITECTURE.md, invariant 9: no wait is unbounded). handshake, send and close are the engine's; header, body and
# idle are the services'.
cdef struct Deadlines:
    uint64_t handshake_ns
    uint64_t header_ns
    uint64_t body_ns
    uint64_t send_ns               # without any progress
    uint64_t idle_ns
    uint64_t close_ns              # lingering after our FIN

# Written by the engine thread alone, read by anybody (aligned 64-bit words).
cdef struct Counters:
    uint64_t connections           # gauge
    uint64_t accepted
    uint64_t accept_paused
    uint64_t refused               # no slot
    uint64_t refused_by_limit      # of its address
    uint64_t bytes_in              # plaintext of established connections
    uint64_t bytes_out
    uint64_t record_layer_kernel
    uint64_t record_layer_user
    uint64_t record_layer_none     # established without TLS
    uint64_t exported
    uint64_t requests              # services count them
    uint64_t control_records
    uint64_t bulk_receives         # user layer: into buffers for many records
    uint64_t held_waits            # waits of the engine that were held for company
    uint64_t flush_waits           # of ends, for TCP to take what the kernel's record layer held back
    uint64_t events
    uint64_t commands
    uint64_t turns
    uint64_t wakes                 # eventfd writes of the control thread that the engine read
    uint64_t signals               # eventfd writes of the engine
    uint64_t closed[13]            # by CloseReason

cdef struct Listener:
    int32_t fd                     # owner: the supervisor; -1: slot unused
    int32_t number                 # the control thread's name for it
    uint8_t armed                  # multishot accept is outstanding
    uint8_t paused                 # EMFILE and friends
    uint8_t removing
    uint8_t plain                  # its connections go to `service` without TLS
    uint8_t limited                # on_accept is asked
    uint32_t service
    uint32_t site
    uint8_t padding[40]            # its address carries an Operation in the low 6 bits

cdef struct Core:
    Listener listeners[64]         # first: aligned like the Core itself
    Uring uring
    ReceiveRing receive_ring
    BufferPool pool
    TimerWheel timers
    Timer accept_timer
    Timer drain_timer
    Timer service_timer            # of all services together
    Timer pool_timer
    uint64_t pool_rest_ns          # between two looks at which buffers nobody wants
    uint64_t now_ns                # CLOCK_MONOTONIC at the start of this turn
    uint8_t* connections           # connections_max slots of CONNECTION_STRIDE bytes, mapped, untouched until used
    uint32_t connections_max
    uint32_t connections_fresh     # slots never used yet
    Connection* free_connections
    Connection* live               # all connections that are not free
    Connection* dirty              # to be advanced before the next submission
    const Service* services[4]
    File memory_file               # stands for the service's memory where a file range is expected
    Deadlines deadlines
    Counters counters
    uint8_t record_layer_mode      # 0 auto, 1 require, 2 off
    uint8_t ulp_missing            # the kernel said that there is no ULP "tls"
    uint8_t ktls_rekey
    uint8_t draining
    uint8_t drained_told
    uint8_t stopping
    uint8_t descriptors_short      # an accept is paused: a closed connection resumes it
    uint64_t accept_paused_ns      # when the last EVENT_ACCEPT_PAUSED was sent
    uint32_t ktls_suites           # bit n: suite 0x1300 + n
    uint8_t ktls_record_size       # TLS_TX_MAX_PAYLOAD_LEN: Linux 6.19
    uint32_t drain_cut
    uint32_t input_bytes_max

    Queue commands                 # control thread -> engine
    Queue events                   # engine -> control thread
    int command_fd                 # eventfd; owner: the Engine object
    int event_fd
    uint64_t wake_value            # READ target of command_fd
    uint8_t wake_armed
    uint8_t events_published       # this turn
    uint32_t hold_us               # the least that a wait may last, where that brings company; 0: never
    uint32_t company               # receives of this turn, those of much at once for several
    uint32_t bulk_pieces           # received in bulk in this turn
    uint32_t bulk_turns            # turns in a row that received in bulk
    uint32_t hold_waits            # waits that were not held, since a trial
    uint8_t holding                # waits are held
    uint8_t held                   # the last one was
    uint8_t hold_misses            # held waits in a row that brought no company
    uint32_t asleep                # shared: the engine is, or is about to be, in io_uring_enter
    uint32_t event_signalled       # shared: event_fd was written and not yet read
