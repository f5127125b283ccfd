"""What a service calls, and the step that moves a connection on.

Calls of a service only change the connection's structure and mark it; ``connection_advance`` does the rest once per loop turn, when all
completions of the turn have been looked at. So a service may call anything from anywhere in the engine thread, and answers to pipelined
requests leave together.
"""

from libc.errno cimport EBUSY
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from kdaemon_pyx.changeover cimport changeover_export
from kdaemon_pyx.core cimport (
    CLOSE_DEADLINE, CLOSE_SERVICE, CLOSE_TRUNCATED, CONNECTION_CLOSING, CONNECTION_ESTABLISHED, CONNECTION_FREE,
    CONNECTION_HANDSHAKE, RECORD_LAYER_NONE, CloseReason, Connection, Deadlines, File)
from kdaemon_pyx.file_range cimport file_range_queue, file_range_queue_memory
from kdaemon_pyx.flush cimport flush_begin, flush_complete
from kdaemon_pyx.handshake_io cimport handshake_arm, handshake_install
from kdaemon_pyx.lifecycle cimport connection_join, connection_mark, connection_terminate, connection_update_timer
from kdaemon_pyx.output cimport output_commit, output_reserve, output_room
from kdaemon_pyx.receive cimport receive_arm, receive_held, receive_offer, receive_pull_cancel
from kdaemon_pyx.transmit cimport transmit_alert, transmit_idle, transmit_memory_cancel, transmit_progressed, transmit_pump, transmit_shutdown


cdef uint8_t* connection_reserve(Connection* c, uint32_t length) noexcept nogil:
    return output_reserve(c, length)


cdef void connection_commit(Connection* c, uint32_t length) noexcept nogil:
    output_commit(c, length)


cdef uint32_t connection_room(Connection* c) noexcept nogil:
    return output_room(c)


cdef int connection_send_file(Connection* c, File* file, uint64_t offset, uint64_t length) noexcept nogil:
    return file_range_queue(c, file, offset, length)


cdef uint64_t connection_file_position(Connection* c) noexcept nogil:
    return c.file_offset


cdef int connection_send_memory(Connection* c, const uint8_t* data, uint64_t length) noexcept nogil:
    return file_range_queue_memory(c, data, length)


cdef int64_t connection_cancel_send(Connection* c) noexcept nogil:
    return transmit_memory_cancel(c)


cdef uint64_t connection_memory_sent(Connection* c) noexcept nogil:
    return c.memory_sent


cdef int connection_receive_into(Connection* c, uint8_t* data, uint32_t length) noexcept nogil:
    if c.pull_data != NULL or length == 0:
        return -EBUSY
    c.pull = 1
    c.pull_data = data
    c.pull_length = length
    c.resume = 1
    connection_mark(c)
    return 0


cdef void connection_cancel_receive(Connection* c) noexcept nogil:
    receive_pull_cancel(c)


cdef bint connection_is_sending(Connection* c) noexcept nogil:
    return not transmit_idle(c)


cdef void connection_resume(Connection* c) noexcept nogil:
    c.resume = 1
    c.sated = 0
    connection_mark(c)


cdef void connection_finish(Connection* c, CloseReason reason) noexcept nogil:
    if c.finishing or c.state == CONNECTION_CLOSING:
        return
    c.finishing = 1
    # A peer that ended without close_notify may have been cut off by somebody else: that is what is counted and told.
    c.close_reason = <uint8_t>(CLOSE_TRUNCATED if c.end_of_file and not c.end_of_data else reason)
    connection_mark(c)


cdef void connection_close(Connection* c, CloseReason reason) noexcept nogil:
    connection_terminate(c, reason, 0)


cdef void connection_set_deadline(Connection* c, uint64_t deadline_ns) noexcept nogil:
    c.service_deadline_ns = deadline_ns
    connection_mark(c)


cdef uint64_t connection_now_ns(Connection* c) noexcept nogil:
    return c.core.now_ns


cdef const Deadlines* connection_deadlines(Connection* c) noexcept nogil:
    return &c.core.deadlines


cdef void connection_count_request(Connection* c) noexcept nogil:
    c.core.counters.requests += 1


# --- moving on ----------------------------------------------------------------------------------------------------------

cdef void finish(Connection* c) noexcept nogil:
    """The orderly end: close_notify behind the last data, FIN behind that, then the peer's FIN or the close deadline."""
    if c.finishing == 1 and c.file == NULL:
        # With the data still in the output, close_notify leaves in the same send.
        if c.established and c.record_layer != RECORD_LAYER_NONE and not c.alert_sent and transmit_alert(c, 0) < 0:
            connection_terminate(c, CLOSE_SERVICE, 0)
            return
        c.finishing = 2
        transmit_pump(c)
    if c.finishing == 2 and c.state != CONNECTION_CLOSING and transmit_idle(c) and flush_complete(c):
        if c.end_of_file or c.end_of_data:
            connection_terminate(c, CLOSE_SERVICE, 0)
            return
        c.finishing = 3
        c.discarding = 1
        c.receive_wanted = 1
        c.service_deadline_ns = 0
        c.engine_deadline_ns = c.core.now_ns + c.core.deadlines.close_ns
        transmit_shutdown(c)
    elif c.finishing == 3 and (c.end_of_file or c.end_of_data):
        connection_terminate(c, CLOSE_SERVICE, 0)


cdef void advance_established(Connection* c) noexcept nogil:
    # Ends because only a completion can make the transmit side idle again once the service has queued something.
    while c.state == CONNECTION_ESTABLISHED:
        if c.finishing != 1 or c.file != NULL:
            transmit_pump(c)
        if c.sent_pending and transmit_idle(c) and c.state == CONNECTION_ESTABLISHED:
            c.sent_pending = 0
            c.service.on_sent(c)
            c.resume = 1
        if not c.resume or c.state != CONNECTION_ESTABLISHED:
            break
        receive_offer(c)
        receive_held(c)
    if c.state != CONNECTION_ESTABLISHED:
        return
    if (c.end_of_data or c.end_of_file) and not c.end_told and not c.finishing and (c.input == NULL or (c.want_more and not c.pull)):
        c.end_told = 1
        c.service.on_end_of_data(c)
        if not c.finishing and c.state == CONNECTION_ESTABLISHED:
            transmit_pump(c)
    if c.core.draining and not c.draining_told and not c.finishing and c.state == CONNECTION_ESTABLISHED:
        c.draining_told = 1
        c.service.on_drain(c)
        transmit_pump(c)


cdef void connection_advance(Connection* c) noexcept nogil:
    """Does whatever the connection's state asks for now."""
    if c.state == CONNECTION_HANDSHAKE:
        transmit_pump(c)
        if c.install_material != NULL and c.state == CONNECTION_HANDSHAKE and transmit_idle(c):
            handshake_install(c)
            flush_begin(c)
    if c.state == CONNECTION_ESTABLISHED:
        advance_established(c)
    if c.exporting and c.state == CONNECTION_ESTABLISHED:
        changeover_export(c)
        if c.state == CONNECTION_FREE:
            return
    if c.finishing and c.state != CONNECTION_CLOSING and c.state != CONNECTION_FREE:
        finish(c)
    if c.state == CONNECTION_HANDSHAKE:
        handshake_arm(c)
    elif c.state == CONNECTION_ESTABLISHED:
        receive_arm(c)
    if c.state == CONNECTION_CLOSING:
        connection_join(c)
    elif c.state != CONNECTION_FREE:
        connection_update_timer(c)


cdef void connection_expired(Connection* c) noexcept nogil:
    """The earliest deadline passed."""
    cdef uint64_t now_ns = c.core.now_ns
    if c.state == CONNECTION_CLOSING or c.state == CONNECTION_FREE:
        return
    if c.engine_deadline_ns != 0 and c.engine_deadline_ns <= now_ns:
        connection_terminate(c, CLOSE_DEADLINE, 0)
        return
    if c.send_deadline_ns != 0 and c.send_deadline_ns <= now_ns and not transmit_progressed(c):
        c.finishing = 0                            # it does not end in good order
        connection_terminate(c, CLOSE_DEADLINE, 0)
        return
    if c.service_deadline_ns != 0 and c.service_deadline_ns <= now_ns:
        c.service_deadline_ns = 0
        if c.state == CONNECTION_ESTABLISHED and not c.finishing:
            c.service.on_deadline(c)
    connection_mark(c)
