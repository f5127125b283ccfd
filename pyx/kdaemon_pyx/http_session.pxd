# One connection's HTTP/1.1: requests in, responses out, in order (RFC 9112). Sans-I/O: it reaches the connection through a table of
# functions, so that the same code runs over both record layers and, in tests, over memory.
#
# A response is queued in one go where it fits; what does not is continued from session_on_sent(). While one is under way no further
# request is looked at: unread input is the back-pressure.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from kdaemon_pyx.core cimport CloseReason, Connection, Deadlines, File
from kdaemon_pyx.files cimport FileTable
from kdaemon_pyx.http_address cimport Address, AddressTable
from kdaemon_pyx.http_body cimport BodyDiscard
from kdaemon_pyx.http_conditional cimport ByteRange, Validators
from kdaemon_pyx.http_log cimport LogLine, LogRing, PeerAddress
from kdaemon_pyx.http_request cimport HeadScan, HttpLimits, HttpRequest
from kdaemon_pyx.http_response cimport DateCache
from kdaemon_pyx.http_site cimport SiteC
from kdaemon_pyx.representation cimport Representation

# The connection's functions (connection.pxd says what each does).
cdef struct Transport:
    uint8_t* (*reserve)(Connection* c, uint32_t length) noexcept nogil
    void (*commit)(Connection* c, uint32_t length) noexcept nogil
    uint32_t (*room)(Connection* c) noexcept nogil
    int (*send_file)(Connection* c, File* file, uint64_t offset, uint64_t length) noexcept nogil
    uint64_t (*file_position)(Connection* c) noexcept nogil
    void (*finish)(Connection* c, CloseReason reason) noexcept nogil
    void (*close)(Connection* c, CloseReason reason) noexcept nogil
    void (*set_deadline)(Connection* c, uint64_t deadline_ns) noexcept nogil
    uint64_t (*now_ns)(Connection* c) noexcept nogil
    const Deadlines* (*deadlines)(Connection* c) noexcept nogil
    void (*count_request)(Connection* c) noexcept nogil
    void (*peer)(Connection* c, PeerAddress* peer) noexcept nogil

# Everything the sessions of one engine thread share; owner: the service object.
cdef struct HttpContext:
    Transport transport
    HttpLimits limits
    FileTable table
    const SiteC* sites
    uint32_t site_count
    AddressTable addresses         # requests of sessions
    AddressTable arrivals          # connections, from accept to close
    LogRing* log                   # NULL: no access log; owner: the AccessLog object
    uint64_t responses[6]          # by the status' first digit
    DateCache date
    uint64_t boundary              # of multipart/byteranges; a number never used twice
    # Of the request being answered; nothing here outlives one call of session_on_data().
    LogLine log_line               # of its response
    HttpRequest request
    Validators validators
    ByteRange ranges[64]
    uint8_t path[4096]

ctypedef enum DeadlineKind:
    DEADLINE_NONE = 0
    DEADLINE_PAST                  # one is set, of something that is over
    DEADLINE_HEADER
    DEADLINE_BODY
    DEADLINE_IDLE

# Owner: the connection's service_state.
cdef struct HttpSession:
    HttpContext* context
    Connection* connection
    uint64_t opened_ns
    uint64_t deadline_ns
    PeerAddress peer               # set only where somebody wants it: the log, the limits per address
    Address* address               # one connection of it; NULL: no limits
    uint32_t site
    uint32_t requests
    HeadScan scan
    BodyDiscard body
    uint8_t* waiting               # head of the request whose answer waits for the end of its body: owned; NULL: none
    uint32_t waiting_length
    uint8_t deadline_kind
    bint kernel_layer
    bint by_host                   # each request's Host chooses the site
    bint head_pending              # part of a head is there, the rest is not
    bint blocked                   # input waits for room in the output
    bint responding                # a response is under way
    bint draining
    bint end_of_data
    bint finishing                 # the connection was told to finish; input is ignored
    # the response under way, or the last one
    bint keep_alive
    bint head_only
    uint8_t minor_version
    bint multipart
    bint part_started
    uint32_t range_index
    uint32_t range_count
    uint64_t range_done            # bytes of the current range already copied
    ByteRange range                # when there is one
    ByteRange* ranges              # when there are several: owned here, else NULL
    uint64_t boundary
    Representation* representation  # one reference
    LogLine* log_line              # of a response under way: owned; NULL: none

# `site`: its number, SITE_BY_HOST added or not. NULL: no memory, or no such site.
cdef HttpSession* session_open(HttpContext* context, Connection* connection, uint32_t site, bint kernel_layer) noexcept nogil
cdef int64_t session_on_data(HttpSession* session, const uint8_t* data, uint64_t length) noexcept nogil
cdef void session_on_sent(HttpSession* session) noexcept nogil
cdef void session_on_end_of_data(HttpSession* session) noexcept nogil
cdef void session_on_deadline(HttpSession* session) noexcept nogil
cdef void session_on_drain(HttpSession* session) noexcept nogil
# Frees the session; nothing of it is in use any more.
cdef void session_free(HttpSession* session) noexcept nogil
