"""The order of things on one connection: heads, bodies, responses, deadlines, the end."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from kdaemon_pyx.core cimport CLOSE_DEADLINE, CLOSE_DRAIN, CLOSE_PEER, CLOSE_SERVICE, CloseReason, Connection
from kdaemon_pyx.http_address cimport address_enter, address_leave
from kdaemon_pyx.http_answer cimport answer_request, answer_waiting, refuse_unread
from kdaemon_pyx.http_body cimport BODY_NONE, BodyDiscard, discard_body
from kdaemon_pyx.http_request cimport scan_request_head
from kdaemon_pyx.http_site cimport SITE_BY_HOST
from kdaemon_pyx.http_transfer cimport abandon_transfer, continue_transfer

cdef enum:
    # A deadline that would move by less is left as it is: one timer change per second, not one per request.
    DEADLINE_STEP_NS = 1_000_000_000


cdef HttpSession* session_open(
    HttpContext* context, Connection* connection, uint32_t site, bint kernel_layer
) noexcept nogil:
    cdef HttpSession* session
    cdef bint allowed
    cdef bint by_host = site & SITE_BY_HOST
    site &= ~<uint32_t>SITE_BY_HOST
    if site >= context.site_count:
        return NULL
    session = <HttpSession*>calloc(1, sizeof(HttpSession))
    if session == NULL:
        return NULL
    session.context = context
    session.connection = connection
    session.site = site
    session.by_host = by_host
    session.kernel_layer = kernel_layer
    session.keep_alive = True
    session.opened_ns = context.transport.now_ns(connection)
    if context.log != NULL or context.addresses.buckets != NULL:
        context.transport.peer(connection, &session.peer)
    if context.addresses.buckets != NULL:
        session.address = address_enter(
            &context.addresses, &session.peer, context.transport.now_ns(connection), &allowed)
    # The first request has the header deadline from here on; its beginning does not move it.
    set_deadline(session, DEADLINE_HEADER, context.transport.deadlines(connection).header_ns)
    return session


cdef void session_free(HttpSession* session) noexcept nogil:
    abandon_transfer(session)
    if session.address != NULL:
        address_leave(
            &session.context.addresses, session.address, session.context.transport.now_ns(session.connection))
    free(session.waiting)
    free(session)


cdef void set_deadline(HttpSession* session, DeadlineKind kind, uint64_t after_ns) noexcept nogil:
    cdef uint64_t deadline_ns = session.context.transport.now_ns(session.connection) + after_ns
    if session.deadline_kind == kind and deadline_ns - session.deadline_ns < DEADLINE_STEP_NS:
        return
    session.deadline_kind = <uint8_t>kind
    session.deadline_ns = deadline_ns
    session.context.transport.set_deadline(session.connection, deadline_ns)


cdef void clear_deadline(HttpSession* session) noexcept nogil:
    if session.deadline_kind != DEADLINE_NONE:
        session.deadline_kind = DEADLINE_NONE
        session.context.transport.set_deadline(session.connection, 0)


cdef void finish(HttpSession* session, CloseReason reason) noexcept nogil:
    if session.finishing:
        return
    session.finishing = True
    clear_deadline(session)
    session.context.transport.finish(session.connection, reason)


cdef void update_deadline(HttpSession* session) noexcept nogil:
    # While a response goes out the connection's own send deadline watches it.
    if session.responding or session.finishing:
        clear_deadline(session)
    elif session.body.kind != BODY_NONE:
        set_deadline(session, DEADLINE_BODY, session.context.transport.deadlines(session.connection).body_ns)
    elif session.head_pending:
        if session.deadline_kind != DEADLINE_HEADER:       # of the whole head: more bytes do not prolong it
            set_deadline(session, DEADLINE_HEADER, session.context.transport.deadlines(session.connection).header_ns)
    elif session.requests != 0:
        set_deadline(session, DEADLINE_IDLE, session.context.transport.deadlines(session.connection).idle_ns)


cdef inline bint request_begun(const HttpSession* session) noexcept nogil:
    return session.head_pending or session.waiting != NULL


cdef void after_response(HttpSession* session) noexcept nogil:
    # What follows a response that is completely queued.
    if session.responding or session.waiting != NULL:
        return
    if not session.keep_alive:
        finish(session, CLOSE_SERVICE)
    elif session.end_of_data and not session.blocked:
        finish(session, CLOSE_PEER)


cdef int64_t session_on_data(HttpSession* session, const uint8_t* data, uint64_t length) noexcept nogil:
    cdef uint64_t consumed = 0
    cdef int64_t n
    cdef bint answered
    cdef BodyDiscard body
    session.head_pending = False
    session.blocked = False
    while consumed < length and not session.finishing:
        if session.responding:
            session.blocked = True
            break
        if session.body.kind != BODY_NONE:
            body = session.body
            n = discard_body(&session.body, &session.context.limits, data + consumed, length - consumed)
            if session.waiting == NULL and n < 0:          # its response is out already: there is no way to say more
                finish(session, CLOSE_SERVICE)
                break
            if session.waiting != NULL and (n < 0 or session.body.kind == BODY_NONE):
                if not answer_waiting(session, <int>-n if n < 0 else 0):
                    session.body = body                    # its end is looked at again
                    session.blocked = True
                    break
                if not session.responding and not session.keep_alive:
                    finish(session, CLOSE_SERVICE)
            consumed += <uint64_t>n if n > 0 else 0
            continue
        n = scan_request_head(data + consumed, length - consumed, &session.context.limits, &session.scan)
        if n == 0:
            session.head_pending = True
            break
        memset(&session.scan, 0, sizeof(session.scan))     # also when it is blocked: then it is scanned again
        if n < 0:
            answered = refuse_unread(session, <int>-n, data + consumed, length - consumed)
        else:
            answered = answer_request(session, data + consumed, <uint32_t>n)
        if not answered:
            session.blocked = True
            break
        consumed += <uint64_t>n if n > 0 else 0
        if session.deadline_kind == DEADLINE_HEADER:       # the next head starts its own
            session.deadline_kind = DEADLINE_PAST
        if not session.responding and session.waiting == NULL and not session.keep_alive:
            finish(session, CLOSE_SERVICE)
    if session.end_of_data and not session.responding and not session.blocked:
        finish(session, CLOSE_PEER)
    if session.finishing:
        return <int64_t>length
    update_deadline(session)
    return <int64_t>consumed


cdef void session_on_sent(HttpSession* session) noexcept nogil:
    if session.finishing:
        return
    if session.responding:
        continue_transfer(session)
        if session.responding:
            return
    after_response(session)
    if session.draining and not session.finishing and not session.blocked and not request_begun(session):
        finish(session, CLOSE_DRAIN)
    update_deadline(session)


cdef void session_on_end_of_data(HttpSession* session) noexcept nogil:
    session.end_of_data = True
    if not session.responding and not session.blocked:
        finish(session, CLOSE_PEER)


cdef void session_on_deadline(HttpSession* session) noexcept nogil:
    session.deadline_kind = DEADLINE_NONE
    if session.responding or session.finishing:
        return
    # Without room the peer does not read: nothing to tell it.
    if session.waiting != NULL:
        answer_waiting(session, 408)
    elif session.head_pending:
        refuse_unread(session, 408, NULL, 0)
    if not session.responding:                             # else the page's own end ends the connection
        finish(session, CLOSE_DEADLINE)


cdef void session_on_drain(HttpSession* session) noexcept nogil:
    session.draining = True
    if not session.responding and not session.blocked and not request_begun(session):
        finish(session, CLOSE_DRAIN)
