"""Connections that change hands other than by a handshake and its keys (handshake_io.pyx).

Without TLS a connection belongs to its service like any other, with the record layer NONE. When it starts TLS, the service lets go of it, and what
was received but read by nobody is the beginning of what the handshake gets: a byte belongs to one side of the switch or the other, and none
is ever handed out as data of the TLS connection. An exported one leaves the daemon as soon as no operation of it is outstanding.
"""

from libc.errno cimport EBUSY, ECONNRESET, EINVAL, EOPNOTSUPP, EPIPE
from libc.stdint cimport uint32_t

from kdaemon_pyx.core cimport (
    CLOSE_RESOURCES, CLOSE_SERVICE, CONNECTION_ESTABLISHED, CONNECTION_HANDSHAKE, RECORD_LAYER_KERNEL, RECORD_LAYER_NONE, SERVICES_MAX,
    Connection)
from kdaemon_pyx.lifecycle cimport (
    EVENT_KIND_EXPORTED, EVENT_KIND_INSTALLED, connection_cancel_all, connection_exported, connection_handle, connection_mark,
    connection_terminate, event_push)
from kdaemon_pyx.transmit cimport transmit_idle


cdef void changeover_plain(Connection* c, uint32_t service, uint32_t site) noexcept nogil:
    """A connection on which nothing was sent or received yet goes to a service as it is."""
    cdef int result
    if service >= SERVICES_MAX or c.core.services[service] == NULL:
        connection_terminate(c, CLOSE_RESOURCES, EINVAL)
        return
    c.service = c.core.services[service]
    c.site = site
    c.state = CONNECTION_ESTABLISHED
    c.want_more = 1
    c.receive_wanted = 0
    c.engine_deadline_ns = 0
    c.core.counters.record_layer_none += 1
    event_push(c.core, EVENT_KIND_INSTALLED, connection_handle(c), RECORD_LAYER_NONE, 0, NULL, 0, False)
    c.established = 1
    result = c.service.on_established(c)
    if result < 0:
        connection_terminate(c, CLOSE_SERVICE, -result)
    connection_mark(c)


cdef int changeover_handshake(Connection* c) noexcept nogil:
    """Back to the state HANDSHAKE, where the control thread decides. 0, or a negative errno: nothing has changed."""
    if c.state != CONNECTION_ESTABLISHED or c.record_layer != RECORD_LAYER_NONE or c.finishing:
        return -ECONNRESET
    if c.end_of_file:
        return -EPIPE
    if not transmit_idle(c) or c.pull_data != NULL:
        return -EBUSY
    c.established = 0
    c.close_reason = CLOSE_SERVICE
    c.service.on_closed(c)
    c.close_reason = 0
    c.service = NULL
    c.service_state = NULL
    c.state = CONNECTION_HANDSHAKE
    c.listener = -1                                # its end does not concern this handshake
    c.cipher = c.input
    c.cipher_start = c.input_start
    c.cipher_end = c.input_end
    c.input = NULL
    c.pull = 0
    c.resume = 0
    c.sent_pending = 0
    c.heard = 1
    c.service_deadline_ns = 0
    c.engine_deadline_ns = c.core.now_ns + c.core.deadlines.handshake_ns
    connection_mark(c)
    return 0


cdef int exportable(Connection* c) noexcept nogil:
    """0, or why not. What the kernel has not given to user space yet, control records included, does not matter."""
    if c.finishing:
        return -ECONNRESET
    if c.record_layer != RECORD_LAYER_KERNEL:
        return -EOPNOTSUPP
    if c.input != NULL or c.cipher != NULL or c.receive_keys_pending or c.fragment != NULL or c.rekey_pending or c.pull_data != NULL:
        return -EBUSY
    if c.end_of_data or c.end_of_file or c.alert_sent:
        return -EPIPE
    return 0 if transmit_idle(c) else -EBUSY


cdef void changeover_export(Connection* c) noexcept nogil:
    """Joins what is outstanding, then lets go of everything; refused if something arrives meanwhile that a READ must get."""
    cdef int result = exportable(c)
    if result < 0:
        c.exporting = 0
        c.cancelling = 0
        event_push(c.core, EVENT_KIND_EXPORTED, connection_handle(c), result, c.export_cookie, NULL, 0, False)
    elif c.operations == 0:
        connection_exported(c)
    elif not c.cancelling:
        connection_cancel_all(c)
