"""Records that are not application data, and the end of connections whose peers break the protocol.

They go up to the control thread, except close_notify; handshake messages whole. Behind a KeyUpdate nothing is opened until rekey(): it is
under the next key. Each record without application data takes from a budget.
"""

from libc.errno cimport EMSGSIZE, ENOMEM, EPROTO
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memmove

from kdaemon_pyx.core cimport (
    CLOSE_KEY_UPDATE, CLOSE_LIMIT, CLOSE_RECORD, CLOSE_RESOURCES, RECORD_LAYER_KERNEL, CloseReason, Connection)
from kdaemon_pyx.lifecycle cimport EVENT_KIND_CONTROL_RECORD, connection_terminate, event_push_keys
from kdaemon_pyx.record cimport ALERT_CLOSE_NOTIFY, ALERT_UNEXPECTED_MESSAGE, ALERT_USER_CANCELED, CONTENT_ALERT, CONTENT_HANDSHAKE
from kdaemon_pyx.transmit cimport transmit_alert, transmit_discard

cdef enum:
    # Records that carry no application data cost budget; a second gives one back. What spends faster loses its connection.
    FLOOD_BURST = 64
    # The largest post-handshake message there can be, a NewSessionTicket with its header (RFC 8446 section 4.6.1): what the control
    # thread allows (kdaemon/tls/constants.py), so that it is the one to name the fault.
    FRAGMENT_MAX = 131341
    HANDSHAKE_NEW_SESSION_TICKET = 4
    HANDSHAKE_KEY_UPDATE = 24
    HANDSHAKE_HEADER = 4


cdef void violation(Connection* c, CloseReason reason, int alert, int error) noexcept nogil:
    """A protocol violation: fatal alert, then the end. Nothing of the service is sent any more."""
    if c.finishing or c.file_reading:
        connection_terminate(c, reason, error)
        return
    transmit_discard(c)
    transmit_alert(c, <uint8_t>alert)
    c.finishing = 1
    c.discarding = 1
    c.close_reason = <uint8_t>reason
    c.close_errno = error


cdef bint control_flooded(Connection* c) noexcept nogil:
    """Takes one from the flood budget; True when it is spent (the connection ends)."""
    cdef uint64_t seconds = (c.core.now_ns - c.flood_ns) // 1000000000
    if seconds:
        c.flood = c.flood - <uint32_t>seconds if c.flood > seconds else 0
        c.flood_ns = c.core.now_ns
    c.flood += 1
    if c.flood <= FLOOD_BURST:
        return False
    violation(c, CLOSE_LIMIT, ALERT_UNEXPECTED_MESSAGE, 0)
    return True


cdef void hand_up(Connection* c, int32_t content_type, const uint8_t* data, uint32_t length) noexcept nogil:
    c.core.counters.control_records += 1
    event_push_keys(c, EVENT_KIND_CONTROL_RECORD, content_type, data, length)


cdef uint32_t whole_messages(Connection* c, const uint8_t* data, uint32_t length) noexcept nogil:
    """Bytes of the complete handshake messages at ``data``. A KeyUpdate among them stops the receive side."""
    cdef uint32_t position = 0
    cdef uint32_t message
    while length - position >= HANDSHAKE_HEADER:
        message = HANDSHAKE_HEADER + (data[position + 1] << 16 | data[position + 2] << 8 | data[position + 3])
        if message > length - position:
            break
        if data[position] == HANDSHAKE_KEY_UPDATE:
            c.rekey_pending = 1
        position += message
    return position


cdef bint refused(Connection* c, const uint8_t* data, uint32_t length) noexcept nogil:
    """Whether an incomplete message has a header that the control thread refuses: its body is not waited for, and not kept."""
    cdef uint32_t size
    if length < HANDSHAKE_HEADER:
        return False
    size = data[1] << 16 | data[2] << 8 | data[3]
    if data[0] == HANDSHAKE_KEY_UPDATE:
        return size > 1
    return data[0] != HANDSHAKE_NEW_SESSION_TICKET or not c.client_role or size > FRAGMENT_MAX - HANDSHAKE_HEADER


cdef void handshake_messages(Connection* c, const uint8_t* data, uint32_t length) noexcept nogil:
    """Collects post-handshake messages, which may be cut across records (RFC 8446 section 5.1), and hands whole ones up."""
    cdef uint8_t* joined
    cdef uint32_t whole
    if c.fragment != NULL:
        if c.fragment_length + length > FRAGMENT_MAX:
            violation(c, CLOSE_LIMIT, ALERT_UNEXPECTED_MESSAGE, EMSGSIZE)
            return
        joined = <uint8_t*>realloc(c.fragment, c.fragment_length + length)
        if joined == NULL:
            connection_terminate(c, CLOSE_RESOURCES, ENOMEM)
            return
        c.fragment = joined
        memcpy(c.fragment + c.fragment_length, data, length)
        c.fragment_length += length
        data = c.fragment
        length = c.fragment_length
    whole = whole_messages(c, data, length)
    if refused(c, data + whole, length - whole):
        whole = length
    if whole:
        hand_up(c, CONTENT_HANDSHAKE, data, whole)
        if c.rekey_pending and c.record_layer == RECORD_LAYER_KERNEL and not c.receive_keys_pending and not c.core.ktls_rekey:
            # Before Linux 6.14 the next record cannot be read: what is being sent is finished, then close_notify.
            c.discarding = 1
            if not c.finishing:
                c.finishing = 1
                c.close_reason = CLOSE_KEY_UPDATE
    if whole == length:
        free(c.fragment)
        c.fragment = NULL
        c.fragment_length = 0
        return
    if c.rekey_pending:
        # A KeyUpdate is the last message under its key (section 5.1: no message spans a key change).
        violation(c, CLOSE_RECORD, ALERT_UNEXPECTED_MESSAGE, EPROTO)
        return
    if c.fragment == NULL:
        c.fragment = <uint8_t*>malloc(length - whole)
        if c.fragment == NULL:
            connection_terminate(c, CLOSE_RESOURCES, ENOMEM)
            return
        memcpy(c.fragment, data + whole, length - whole)
    else:
        memmove(c.fragment, c.fragment + whole, length - whole)
    c.fragment_length = length - whole


cdef void control_record(Connection* c, int content_type, const uint8_t* data, uint32_t length) noexcept nogil:
    if c.discarding and not (content_type == CONTENT_ALERT and length == 2 and data[1] == ALERT_CLOSE_NOTIFY):
        return
    if control_flooded(c):
        return
    if c.fragment != NULL and content_type != CONTENT_HANDSHAKE:
        violation(c, CLOSE_RECORD, ALERT_UNEXPECTED_MESSAGE, EPROTO)    # nothing may come between the parts of a message
    elif content_type == CONTENT_ALERT and length:
        if length == 2 and data[1] == ALERT_CLOSE_NOTIFY:
            c.end_of_data = 1
        else:
            if length == 2 and data[1] != ALERT_USER_CANCELED:
                c.alert_received = data[1]
            hand_up(c, content_type, data, length)
    elif content_type == CONTENT_HANDSHAKE and length:
        handshake_messages(c, data, length)
    else:
        violation(c, CLOSE_RECORD, ALERT_UNEXPECTED_MESSAGE, EPROTO)
