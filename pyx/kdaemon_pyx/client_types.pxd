# The daemon's private side of a client ring: everything here lives in memory that no client can reach.
#
# Thread-safety: one engine thread owns all of it. The control thread talks to it through the two lists of client_service.pyx.
# Ownership: a Client owns its mapping, both fds, its operations, endpoints and heap; a ClientEndpoint owns its connection until on_closed.

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "pthread.h" nogil:
    ctypedef struct pthread_mutex_t:
        pass

from kdaemon_pyx.client_abi cimport client_completion, client_header, client_parameters, client_submission

cdef enum:
    CLIENT_NONE = 0xffffffff           # no slot, no endpoint

# Where an operation is. FREE: its completion has been posted, or it never was.
ctypedef enum ClientOperationState:
    OPERATION_FREE = 0
    OPERATION_HELD                     # behind a barrier (in `held`), or the barrier itself
    OPERATION_READING                  # in `reads`: READ, or ACCEPT of a listener
    OPERATION_WRITING                  # in `writes`: WRITE, SHUTDOWN, CLOSE
    OPERATION_CONTROL                  # with the control thread, which answers by client_control_complete()

ctypedef enum ClientEndpointKind:
    ENDPOINT_FREE = 0
    ENDPOINT_RING                      # index 0 of every client: operations that belong to no connection
    ENDPOINT_LISTENER
    ENDPOINT_CONNECTION

ctypedef enum ClientEndpointState:
    ENDPOINT_OPENING = 0               # the control thread resolves, connects, shakes hands; or an accepted one nobody took yet
    ENDPOINT_ESTABLISHED
    ENDPOINT_ENDED                     # `connection` is gone, the handle lives until CLOSE
    ENDPOINT_CLOSING                   # CLOSE is under way

ctypedef enum ClientState:
    CLIENT_FREE = 0
    CLIENT_ATTACHED
    CLIENT_DETACHING                   # joining connections; nothing is fetched or posted any more

# Why a client is detached; told to the control thread.
ctypedef enum ClientDetachReason:
    DETACH_ASKED = 0                   # tls_destroy(), death of the process, shutdown of the daemon
    DETACH_HANG_UP                     # the doorbell's other end is closed
    DETACH_BAD_SUBMISSION_TAIL         # the ring's protocol was broken
    DETACH_BAD_COMPLETION_HEAD

cdef struct ClientOperation:
    uint64_t user_data
    uint64_t deadline_ns               # absolute; 0: none
    uint64_t offset                    # in the arena, validated
    uint32_t length
    uint32_t done                      # WRITE: bytes handed to the connection; READ: bytes in the arena; OPEN, START_TLS: bytes of the private copy
    int32_t cancel_error               # its memory is with the connection: what it ends with if nothing moves any more
    uint32_t endpoint_index            # what orders it: a connection, a listener, 0: the ring
    uint32_t opening_index             # OPEN, CONNECT, LISTEN, ADOPT: the endpoint being made
    uint32_t sequence                  # counts the uses of this slot: names the operation to the control thread
    uint32_t next                      # links of the one queue that the operation is in
    uint32_t previous
    uint32_t heap_position
    uint16_t argument
    uint8_t opcode
    uint8_t state
    bint quiet                         # its completion rings only if it is an error

cdef struct ClientQueue:
    uint32_t head
    uint32_t tail

cdef struct ClientEndpoint:
    Client* client
    void* connection                   # the backend's; NULL when there is none
    uint8_t* info                      # what INFO answers, owned; NULL: nothing known yet
    uint32_t info_length
    uint32_t index
    uint32_t generation                # 31 bits, never 0
    uint32_t binding                   # token that the control thread gives to install(); 0: none
    ClientQueue reads
    ClientQueue writes
    ClientQueue held
    uint32_t opening_slot              # the operation that makes it (OPEN ...) or changes it (START_TLS), CLIENT_NONE
    uint32_t ready_next
    uint32_t write_next                # first of `writes` that is not wholly with the connection
    uint32_t read_lent                 # the READ whose memory the connection may write to; CLIENT_NONE
    uint32_t write_lent                # the WRITE whose memory the connection still reads; CLIENT_NONE
    uint32_t filling_next              # client's list of connections whose first READ has got something and could get more
    uint32_t active                    # operations started and not completed
    uint32_t pending_next              # listener: first of the accepted connections nobody took yet; connection: the next of them
    uint32_t pending_tail
    uint32_t pending_count
    int32_t error                      # negative errno that ended the connection, 0
    uint32_t detail
    uint8_t kind
    uint8_t state
    bint plain                         # no TLS yet
    bint end_of_data                   # close_notify was received; without TLS: FIN
    bint read_shutdown
    bint write_shutdown
    bint close_queued                  # CLOSE was started: the handle is dead
    bint close_timed_out
    bint is_filling                    # in that list
    bint close_waits                   # CLOSE is carried out when the memory of a READ has come back
    bint is_ready                      # in the client's list of endpoints whose barrier may be over

cdef struct ClientLimits:
    uint32_t connections_max           # endpoints: connections and listeners
    uint32_t operations_max            # slots
    uint64_t arena_size_max            # bytes

cdef struct ClientCounters:
    uint64_t submissions
    uint64_t rejected                  # submissions answered with EINVAL, EBUSY or EBADF at validation
    uint64_t completions
    uint64_t doorbells_sent
    uint64_t doorbells_received
    uint64_t bytes_read
    uint64_t bytes_written

cdef struct Client:
    ClientService* service
    uint32_t index
    uint32_t generation
    int memory_fd
    int doorbell_fd
    uint8_t* memory
    uint64_t memory_size
    client_header* header
    client_submission* submissions
    client_completion* completions
    client_parameters* slots
    uint8_t* arena
    uint64_t arena_size
    uint32_t submission_entries
    uint32_t completion_entries
    uint32_t slot_count
    uint32_t submission_head           # the truth; the shared copy is only for the program
    uint32_t completion_tail
    uint32_t completion_published
    bint ring_wanted                   # a completion that is not quiet was posted since the last ring
    uint32_t in_flight
    ClientOperation* operations
    uint32_t* heap                     # slots with a deadline, earliest first
    uint32_t heap_length
    ClientEndpoint* endpoints
    uint32_t endpoints_max
    uint32_t endpoints_used              # endpoints[1..endpoints_used] have been touched
    uint32_t endpoint_free               # free list through pending_next
    uint32_t endpoint_count
    uint32_t ready_head
    uint32_t filling_head
    uint64_t copied                    # bytes of private copies (trust anchors) of operations in flight: never more than the arena has
    uint32_t connection_count          # endpoints with a connection that has to be joined
    uint8_t state
    uint8_t detach_reason
    ClientCounters counters

# What carries a client's connections: the engine's connections in the daemon (client_connection.pyx), memory in the harness.
cdef struct ClientBackend:
    # Reads are waiting: call client_deliver() with what is there, now or when it comes. Or borrow the first one's memory (read_lent) and
    # call client_received() when it is filled.
    void (*read_wanted)(ClientEndpoint* endpoint) noexcept nogil
    # Give the borrowed memory back by client_received(), now or later.
    void (*cancel_read)(ClientEndpoint* endpoint) noexcept nogil
    # Take up to `length` bytes: bytes taken; 0: client_writable() will be called; <0: errno. Copied, or borrowed until client_sent(): then it sets
    # write_lent to write_next.
    int64_t (*write)(ClientEndpoint* endpoint, const uint8_t* data, uint32_t length) noexcept nogil
    # Give the borrowed memory back: the bytes of it that leave all the same; <0: client_sent() will be called, then ask sent().
    int64_t (*cancel_write)(ClientEndpoint* endpoint) noexcept nogil
    uint64_t (*sent)(ClientEndpoint* endpoint) noexcept nogil
    # All that write() took has left: 1; else client_sent() will be called: 0.
    bint (*is_sent)(ClientEndpoint* endpoint) noexcept nogil
    # close_notify (without TLS: FIN) after what was written; reading goes on. 0 or a negative errno.
    int (*shutdown)(ClientEndpoint* endpoint) noexcept nogil
    # Wake the program by a byte on its doorbell.
    void (*ring)(Client* client) noexcept nogil
    # What the control thread knows the connection by.
    uint64_t (*name)(ClientEndpoint* endpoint) noexcept nogil
    # orderly: close_notify, then close; else at once. Calls client_connection_closed() before it returns, what lingers is the backend's; or, when
    # memory is borrowed, after the last operation on it has ended.
    void (*close)(ClientEndpoint* endpoint, bint orderly) noexcept nogil

# To the control thread: an operation it must carry out, or news about a client.
ctypedef enum ClientEventKind:
    CLIENT_EVENT_OPERATION = 0
    CLIENT_EVENT_CANCEL
    CLIENT_EVENT_LISTENER_CLOSED
    CLIENT_EVENT_DETACHING
    CLIENT_EVENT_DETACHED

cdef struct ClientEvent:
    ClientEvent* next
    uint8_t kind
    uint8_t opcode
    uint8_t reason
    uint8_t has_parameters
    uint32_t client_index
    uint32_t client_generation
    uint32_t slot
    uint32_t sequence
    uint32_t binding
    uint64_t handle                    # handle
    uint64_t connection                # START_TLS, EXPORT: the backend's name for it
    uint64_t user_data
    uint64_t timeout_ns                # what is left of the deadline, 0: none
    uint32_t data_length
    uint8_t* data                      # private copy of the arena range (START_TLS: trust anchors), owned
    client_parameters parameters

ctypedef enum ClientCommandKind:
    CLIENT_COMMAND_ATTACH = 0
    CLIENT_COMMAND_DETACH
    CLIENT_COMMAND_COMPLETE

cdef struct ClientCommand:
    ClientCommand* next
    Client* client                     # ATTACH: owned until it is in the table
    uint8_t kind
    uint32_t client_index
    uint32_t client_generation
    uint32_t slot
    uint32_t sequence
    int64_t result
    uint32_t detail
    uint32_t info_length
    uint8_t* info                      # owned

# Which endpoint a token names. The control thread hands the token to the engine (`site`), the engine hands it back.
# Guarded by the service's mutex.
cdef struct ClientBinding:
    uint32_t client_index
    uint32_t client_generation
    uint32_t endpoint_index
    uint32_t endpoint_generation
    uint32_t generation                # of the token, 15 bits
    uint32_t free_next
    bint used
    uint8_t* info                      # for the connection to come, owned
    uint32_t info_length

cdef struct ClientService:           # 64-byte aligned: the uring's completion carries its address
    uint32_t poll_armed                # a one-shot poll of epoll_fd is with the uring
    const ClientBackend* backend
    void* engine                       # the backend's
    Client** clients
    uint8_t* places                    # 1: promised to a client; guarded by the mutex
    uint32_t clients_max
    uint32_t clients_used
    uint32_t fair_start
    uint64_t now_ns
    uint64_t spin_ns                   # how long idle rings are looked at before the engine sleeps
    uint64_t spin_budget_ns            # the same, as far as it has paid lately
    uint64_t idle_since_ns
    uint64_t sleeps
    bint worked                        # this turn took something from a ring
    bint said_asleep                   # prepare_sleep() was the last thing that happened
    int epoll_fd                       # doorbells, timer, commands: one fd for the engine to wait on
    int timer_fd
    int command_fd
    uint64_t timer_armed_ns
    ClientBinding* bindings
    uint32_t bindings_max
    uint32_t bindings_used
    uint32_t binding_free
    pthread_mutex_t mutex              # guards the bindings and the two lists below; never held across a system call that can block
    ClientEvent* outgoing_head         # to the control thread
    ClientEvent* outgoing_tail
    ClientCommand* commands_head       # to the engine thread
    ClientCommand* commands_tail
    int control_fd                     # eventfd: outgoing events for the control thread
