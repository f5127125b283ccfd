"""What a client may ask for: each submission is validated here, on its private copy, then started, held, or refused."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t
from libc.stdlib cimport malloc
from libc.string cimport memcpy

from kdaemon_pyx.client_abi cimport (
    CLIENT_ACCEPT, CLIENT_ADOPT, CLIENT_BARRIER, CLIENT_CANCEL, CLIENT_CLOSE, CLIENT_CONNECT, CLIENT_EXPORT, CLIENT_INFO,
    CLIENT_LISTEN, CLIENT_NOP, CLIENT_OPCODE_COUNT, CLIENT_OPEN, CLIENT_PARAMETER_INSECURE, CLIENT_PARAMETER_PLAIN, CLIENT_PARAMETER_SERVER,
    CLIENT_READ, CLIENT_SHUTDOWN, CLIENT_SHUTDOWN_READ, CLIENT_SHUTDOWN_WRITE, CLIENT_START_TLS, CLIENT_SUBMISSION_QUIET, CLIENT_WRITE,
    client_parameters, client_submission,
)
from kdaemon_pyx.client_control cimport client_binding_new, client_event_free, client_event_new, client_event_push
from kdaemon_pyx.client_endpoint cimport (
    client_cancel_reads, client_endpoint_find, client_endpoint_free, client_endpoint_handle, client_endpoint_new,
    client_finish, client_finish_write, client_make_ready, client_match_accepts, client_pump_writes,
)
from kdaemon_pyx.client_queue cimport (
    client_fetch_parameters, client_heap_add, client_heap_remove, client_post, client_queue_push, client_queue_remove,
)
from kdaemon_pyx.client_types cimport (
    CLIENT_EVENT_CANCEL, CLIENT_EVENT_LISTENER_CLOSED, CLIENT_EVENT_OPERATION, CLIENT_NONE,
    ENDPOINT_CONNECTION, ENDPOINT_ENDED, ENDPOINT_ESTABLISHED, ENDPOINT_FREE, ENDPOINT_LISTENER, ENDPOINT_RING,
    OPERATION_CONTROL, OPERATION_FREE, OPERATION_HELD, OPERATION_READING, OPERATION_WRITING, Client,
    ClientCommand, ClientEndpoint, ClientEvent, ClientOperation,
)

cdef extern from "errno.h" nogil:
    enum:
        EALREADY
        EBADF
        EBUSY
        ECANCELED
        EINVAL
        EMFILE
        ENOBUFS
        ENOENT
        ENOMEM
        ENOTCONN
        EPIPE
        ETIMEDOUT

cdef enum:
    TRUST_ANCHORS_MAX = 1 << 20    # bytes of PEM that START_TLS takes from the arena

# Bits of what an opcode accepts.
cdef enum:
    ON_RING = 1
    ON_LISTENER = 2
    ON_CONNECTION = 4
    NEEDS_BUFFER = 8               # offset and length name arena bytes, at least one
    MAY_HAVE_BUFFER = 16


cdef uint32_t opcode_accepts(uint8_t opcode) noexcept nogil:
    if opcode == CLIENT_NOP or opcode == CLIENT_BARRIER:
        return ON_RING | ON_LISTENER | ON_CONNECTION
    if opcode == CLIENT_READ or opcode == CLIENT_WRITE:
        return ON_CONNECTION | NEEDS_BUFFER
    if opcode == CLIENT_CANCEL or opcode == CLIENT_CONNECT or opcode == CLIENT_LISTEN or opcode == CLIENT_ADOPT:
        return ON_RING
    if opcode == CLIENT_OPEN:
        return ON_RING | MAY_HAVE_BUFFER
    if opcode == CLIENT_START_TLS:
        return ON_CONNECTION | MAY_HAVE_BUFFER
    if opcode == CLIENT_ACCEPT:
        return ON_LISTENER
    if opcode == CLIENT_CLOSE:
        return ON_LISTENER | ON_CONNECTION
    if opcode == CLIENT_INFO:
        return ON_LISTENER | ON_CONNECTION | NEEDS_BUFFER
    return ON_CONNECTION           # SHUTDOWN, EXPORT


cdef int validate(Client* client, client_submission* submission, ClientEndpoint** endpoint) noexcept nogil:
    cdef uint32_t accepts
    if submission.slot >= client.slot_count or submission.opcode >= CLIENT_OPCODE_COUNT:
        return -EINVAL
    if client.operations[submission.slot].state != OPERATION_FREE:
        return -EBUSY
    if submission.flags & ~<uint32_t> CLIENT_SUBMISSION_QUIET or submission.reserved or submission.timeout_ns >> 62:     # 146 years
        return -EINVAL
    if submission.argument and (submission.opcode != CLIENT_SHUTDOWN or submission.argument > CLIENT_SHUTDOWN_WRITE):
        return -EINVAL
    if submission.opcode == CLIENT_CANCEL:
        if submission.target_slot >= client.slot_count or submission.timeout_ns:
            return -EINVAL
    elif submission.target_slot or submission.target_user_data:
        return -EINVAL
    accepts = opcode_accepts(submission.opcode)
    if submission.length:
        if not accepts & (NEEDS_BUFFER | MAY_HAVE_BUFFER):
            return -EINVAL
        if submission.length > client.arena_size or submission.offset > client.arena_size - submission.length:
            return -EINVAL
    elif accepts & NEEDS_BUFFER or submission.offset:
        return -EINVAL
    endpoint[0] = client_endpoint_find(client, submission.handle)
    if endpoint[0] == NULL:
        return -EBADF
    if endpoint[0].kind == ENDPOINT_RING:
        return 0 if accepts & ON_RING else -EINVAL
    if endpoint[0].kind == ENDPOINT_LISTENER:
        return 0 if accepts & ON_LISTENER else -EINVAL
    return 0 if accepts & ON_CONNECTION else -EINVAL


cdef void client_submit(Client* client, client_submission* submission) noexcept nogil:
    cdef ClientEndpoint* endpoint = NULL
    cdef ClientOperation* operation
    cdef int error = validate(client, submission, &endpoint)
    if error < 0:
        client.counters.rejected += 1
        client_post(client, submission.user_data, submission.slot, error, 0, False)
        return
    operation = &client.operations[submission.slot]
    operation.user_data = submission.user_data
    operation.opcode = submission.opcode
    operation.argument = submission.argument
    operation.quiet = submission.flags & CLIENT_SUBMISSION_QUIET
    operation.offset = submission.offset
    operation.length = submission.length
    operation.done = 0
    operation.cancel_error = 0
    operation.endpoint_index = endpoint.index
    operation.opening_index = CLIENT_NONE
    operation.sequence += 1
    operation.deadline_ns = 0
    if submission.timeout_ns:
        operation.deadline_ns = client.service.now_ns + submission.timeout_ns
        client_heap_add(client, submission.slot)
    if submission.opcode == CLIENT_CANCEL:
        endpoint.active += 1
        operation.state = OPERATION_CONTROL
        error = cancel_target(client, submission)
        client_finish(client, submission.slot, error, 0)
    elif endpoint.held.head != CLIENT_NONE or (submission.opcode == CLIENT_BARRIER and endpoint.active):
        operation.state = OPERATION_HELD
        client_queue_push(client, &endpoint.held, submission.slot)
    else:
        start(client, endpoint, submission.slot)


cdef void start(Client* client, ClientEndpoint* endpoint, uint32_t slot) noexcept nogil:
    cdef ClientOperation* operation = &client.operations[slot]
    cdef uint8_t opcode = operation.opcode
    endpoint.active += 1
    operation.state = OPERATION_CONTROL    # in no queue
    if opcode == CLIENT_NOP or opcode == CLIENT_BARRIER:
        client_finish(client, slot, 0, 0)
    elif endpoint.close_queued:
        client_finish(client, slot, -EBADF, 0)    # was held behind a barrier when CLOSE took the handle
    elif endpoint.opening_slot != CLIENT_NONE and opcode != CLIENT_INFO:
        client_finish(client, slot, -EBUSY, 0)    # START_TLS or EXPORT is under way
    elif opcode == CLIENT_READ:
        start_read(client, endpoint, slot)
    elif opcode == CLIENT_WRITE or opcode == CLIENT_SHUTDOWN:
        start_write(client, endpoint, slot)
    elif opcode == CLIENT_CLOSE:
        start_close(client, endpoint, slot)
    elif opcode == CLIENT_ACCEPT:
        operation.state = OPERATION_READING
        client_queue_push(client, &endpoint.reads, slot)
        client_match_accepts(client, endpoint)
    elif opcode == CLIENT_INFO:
        if endpoint.info == NULL:
            client_finish(client, slot, -ENOTCONN, 0)
            return
        if operation.length > endpoint.info_length:
            operation.length = endpoint.info_length
        memcpy(client.arena + operation.offset, endpoint.info, operation.length)
        client_finish(client, slot, operation.length, 0)
    else:
        start_control(client, endpoint, slot)


cdef void start_read(Client* client, ClientEndpoint* endpoint, uint32_t slot) noexcept nogil:
    if endpoint.end_of_data:
        client_finish(client, slot, 0, 0)
    elif endpoint.read_shutdown:
        client_finish(client, slot, -EPIPE, 0)
    elif endpoint.connection == NULL or endpoint.error:
        client_finish(client, slot, endpoint.error if endpoint.error else -ENOTCONN, endpoint.detail)
    else:
        client.operations[slot].state = OPERATION_READING
        client_queue_push(client, &endpoint.reads, slot)
        if endpoint.reads.head == slot:
            client.service.backend.read_wanted(endpoint)


cdef void start_write(Client* client, ClientEndpoint* endpoint, uint32_t slot) noexcept nogil:
    cdef ClientOperation* operation = &client.operations[slot]
    if endpoint.connection == NULL:
        client_finish(client, slot, endpoint.error if endpoint.error else -EPIPE, endpoint.detail)
        return
    if operation.opcode == CLIENT_SHUTDOWN and operation.argument == CLIENT_SHUTDOWN_READ:
        endpoint.read_shutdown = True
        if client_cancel_reads(client, endpoint):
            client.service.backend.read_wanted(endpoint)     # what comes is thrown away
        client_finish(client, slot, 0, 0)
        return
    if endpoint.write_shutdown:
        client_finish(client, slot, -EPIPE, 0)
        return
    queue_write(client, endpoint, slot)


cdef void queue_write(Client* client, ClientEndpoint* endpoint, uint32_t slot) noexcept nogil:
    client.operations[slot].state = OPERATION_WRITING
    client_queue_push(client, &endpoint.writes, slot)
    if endpoint.write_next == CLIENT_NONE:
        endpoint.write_next = slot
        client_pump_writes(client, endpoint)


cdef void start_close(Client* client, ClientEndpoint* endpoint, uint32_t slot) noexcept nogil:
    cdef ClientEvent* event
    cdef uint32_t index
    if endpoint.kind == ENDPOINT_CONNECTION:
        endpoint.close_queued = True
        queue_write(client, endpoint, slot)
        return
    event = client_event_new(client, CLIENT_EVENT_LISTENER_CLOSED)
    if event == NULL:
        client_finish(client, slot, -ENOMEM, 0)
        return
    event.binding = endpoint.binding
    event.handle = client_endpoint_handle(endpoint)
    client_event_push(client.service, event)
    while endpoint.pending_next != CLIENT_NONE:
        index = endpoint.pending_next
        endpoint.pending_next = client.endpoints[index].pending_next
        abandon(client, &client.endpoints[index])
    client_finish(client, slot, 0, 0)
    client_endpoint_free(client, endpoint)


# An accepted connection that nobody took.
cdef void abandon(Client* client, ClientEndpoint* endpoint) noexcept nogil:
    endpoint.pending_next = CLIENT_NONE
    if endpoint.connection == NULL:
        client_endpoint_free(client, endpoint)
        return
    abort_close(client, endpoint)


cdef void abort_close(Client* client, ClientEndpoint* endpoint) noexcept nogil:
    endpoint.close_queued = True
    endpoint.close_timed_out = True
    client.service.backend.close(endpoint, False)


cdef uint32_t flags_allowed(uint8_t opcode) noexcept nogil:
    if opcode == CLIENT_START_TLS:
        return <uint32_t> CLIENT_PARAMETER_INSECURE | <uint32_t> CLIENT_PARAMETER_SERVER
    if opcode == CLIENT_LISTEN:
        return CLIENT_PARAMETER_PLAIN
    return CLIENT_PARAMETER_INSECURE


cdef bint parameters_valid(client_parameters* parameters, uint8_t opcode) noexcept nogil:
    cdef uint32_t i
    cdef uint32_t position = 0
    for i in range(sizeof(parameters.reserved)):
        if parameters.reserved[i]:
            return False
    if parameters.flags & ~flags_allowed(opcode):
        return False
    if (parameters.host_length > sizeof(parameters.host) or parameters.server_name_length > sizeof(parameters.server_name)
            or parameters.alpn_length > sizeof(parameters.alpn) or parameters.certificate_length > sizeof(parameters.certificate)):
        return False
    while position < parameters.alpn_length:
        if parameters.alpn[position] == 0:
            return False
        position += 1 + parameters.alpn[position]
    if position != parameters.alpn_length:
        return False
    if opcode == CLIENT_OPEN or opcode == CLIENT_CONNECT:
        return parameters.host_length > 0 and parameters.port > 0
    return True


# Whether START_TLS or EXPORT may have the connection: 0 or a negative errno. Nothing else may use it while it changes hands.
cdef int may_change_hands(ClientEndpoint* endpoint, uint8_t opcode) noexcept nogil:
    if endpoint.active > 1:
        return -EBUSY
    if endpoint.error:
        return endpoint.error
    if endpoint.state != ENDPOINT_ESTABLISHED or endpoint.connection == NULL:
        return -ENOTCONN
    if endpoint.plain != (opcode == CLIENT_START_TLS):
        return -EINVAL
    return -EPIPE if endpoint.end_of_data or endpoint.write_shutdown or endpoint.read_shutdown else 0


# OPEN, CONNECT, START_TLS, LISTEN, ADOPT, EXPORT: carried out by the control thread on private copies.
cdef void start_control(Client* client, ClientEndpoint* endpoint, uint32_t slot) noexcept nogil:
    cdef ClientOperation* operation = &client.operations[slot]
    cdef ClientEndpoint* opening = NULL
    cdef ClientEvent* event
    cdef uint8_t opcode = operation.opcode
    cdef bint on_ring = endpoint.kind == ENDPOINT_RING
    cdef int error = 0
    if not on_ring:
        error = may_change_hands(endpoint, opcode)
    if error == 0 and operation.length > TRUST_ANCHORS_MAX:
        error = -EINVAL
    if error < 0:
        client_finish(client, slot, error, 0)
        return
    event = client_event_new(client, CLIENT_EVENT_OPERATION)
    if event == NULL:
        client_finish(client, slot, -ENOMEM, 0)
        return
    if opcode != CLIENT_ADOPT and opcode != CLIENT_EXPORT:
        client_fetch_parameters(client, slot, &event.parameters)
        if not parameters_valid(&event.parameters, opcode):
            error = -EINVAL
    # Ranges of the arena may overlap; what is copied out of it is the client's share of the daemon's memory all the same.
    if error == 0 and operation.length > client.arena_size - client.copied:
        error = -ENOBUFS
    if error == 0 and operation.length:
        event.data = <uint8_t*> malloc(operation.length)
        if event.data == NULL:
            error = -ENOMEM
        else:
            memcpy(event.data, client.arena + operation.offset, operation.length)
            event.data_length = operation.length
    if error == 0:
        if on_ring:
            opening = client_endpoint_new(client, ENDPOINT_LISTENER if opcode == CLIENT_LISTEN else ENDPOINT_CONNECTION)
            if opening == NULL:
                error = -EMFILE
        else:
            opening = endpoint
    if error == 0 and opcode != CLIENT_EXPORT and opening.binding == 0:
        opening.binding = client_binding_new(client.service, client, opening)
        if opening.binding == 0:
            error = -EMFILE
            if on_ring:
                client_endpoint_free(client, opening)
    if error < 0:
        client_event_free(event)
        client_finish(client, slot, error, 0)
        return
    client.copied += operation.length
    operation.done = operation.length
    opening.opening_slot = slot
    operation.opening_index = opening.index
    event.opcode = opcode
    event.slot = slot
    event.sequence = operation.sequence
    event.binding = opening.binding
    event.handle = client_endpoint_handle(opening)
    if not on_ring:
        event.connection = client.service.backend.name(endpoint)
    event.user_data = operation.user_data
    if operation.deadline_ns:
        event.timeout_ns = operation.deadline_ns - client.service.now_ns if operation.deadline_ns > client.service.now_ns else 1
    client_event_push(client.service, event)


cdef void client_control_complete(Client* client, ClientCommand* command) noexcept nogil:
    cdef ClientOperation* operation
    cdef ClientEndpoint* endpoint
    cdef bint was_exported
    if command.slot >= client.slot_count:
        return
    operation = &client.operations[command.slot]
    if operation.state != OPERATION_CONTROL or operation.sequence != command.sequence or operation.opening_index == CLIENT_NONE:
        return
    endpoint = &client.endpoints[operation.opening_index]
    endpoint.opening_slot = CLIENT_NONE
    if command.info != NULL:
        endpoint.info = command.info
        endpoint.info_length = command.info_length
        command.info = NULL
    if operation.endpoint_index != 0:              # START_TLS failed, EXPORT
        was_exported = operation.opcode == CLIENT_EXPORT and command.result >= 0
        if endpoint.state == ENDPOINT_ENDED and endpoint.error == 0:
            endpoint.error = <int32_t> command.result
            endpoint.detail = command.detail
        client_finish(client, command.slot, command.result, command.detail)
        if was_exported:
            client_endpoint_free(client, endpoint)
        return
    if command.result < 0:
        client_finish(client, command.slot, command.result, command.detail)
        client_endpoint_free(client, endpoint)
        return
    endpoint.state = ENDPOINT_ESTABLISHED          # a listener; connections come by client_established()
    client_finish(client, command.slot, <int64_t> client_endpoint_handle(endpoint), 0)


# 0: it completes now with `error`, or its owner was asked to end it; -EALREADY: it cannot be stopped any more.
cdef int cancel(Client* client, uint32_t slot, int error) noexcept nogil:
    cdef ClientOperation* operation = &client.operations[slot]
    cdef ClientEndpoint* endpoint = &client.endpoints[operation.endpoint_index]
    cdef ClientEvent* event
    cdef int64_t taken
    if operation.state == OPERATION_HELD:
        client_make_ready(client, endpoint)
        client_finish(client, slot, error, 0)
    elif operation.state == OPERATION_READING:
        if slot != endpoint.read_lent:
            client_finish(client, slot, error, 0)
        elif not operation.cancel_error:
            operation.cancel_error = error
            client.service.backend.cancel_read(endpoint)     # client_received() completes it
    elif operation.state == OPERATION_WRITING:
        if operation.opcode == CLIENT_CLOSE:
            if error == -ECANCELED:
                return -EALREADY
            abort_close(client, endpoint)
            return 0
        if slot == endpoint.write_lent:
            if operation.cancel_error:
                return 0
            taken = client.service.backend.cancel_write(endpoint)
            if taken < 0:
                operation.cancel_error = error               # client_sent() completes it
                return 0
            endpoint.write_lent = CLIENT_NONE
            operation.done = <uint32_t> taken
        if operation.opcode == CLIENT_WRITE and operation.done == operation.length and error == -ECANCELED:
            return -EALREADY
        client_finish_write(client, slot, error)
        if endpoint.write_next != CLIENT_NONE:
            client_pump_writes(client, endpoint)
    elif operation.state == OPERATION_CONTROL and operation.opening_index != CLIENT_NONE:
        event = client_event_new(client, CLIENT_EVENT_CANCEL)
        if event == NULL:
            return -EALREADY
        event.slot = slot
        event.sequence = operation.sequence
        event.reason = <uint8_t> -error
        event.binding = client.endpoints[operation.opening_index].binding
        client_event_push(client.service, event)
    else:
        return -ENOENT
    return 0


cdef int cancel_target(Client* client, client_submission* submission) noexcept nogil:
    cdef ClientOperation* operation = &client.operations[submission.target_slot]
    if operation.state == OPERATION_FREE or operation.user_data != submission.target_user_data:
        return -ENOENT
    return cancel(client, submission.target_slot, -ECANCELED)


cdef void client_expire(Client* client) noexcept nogil:
    cdef uint32_t slot
    while client.heap_length:
        slot = client.heap[0]
        if client.operations[slot].deadline_ns > client.service.now_ns:
            return
        client_heap_remove(client, slot)
        client.operations[slot].deadline_ns = 0
        cancel(client, slot, -ETIMEDOUT)


cdef void run_held(Client* client, ClientEndpoint* endpoint) noexcept nogil:
    cdef uint32_t slot
    while endpoint.kind != ENDPOINT_FREE and endpoint.held.head != CLIENT_NONE:
        slot = endpoint.held.head
        if client.operations[slot].opcode == CLIENT_BARRIER and endpoint.active:
            return
        client_queue_remove(client, &endpoint.held, slot)
        start(client, endpoint, slot)


cdef void client_run_ready(Client* client) noexcept nogil:
    cdef ClientEndpoint* endpoint
    cdef uint32_t index = client.ready_head
    cdef uint32_t next
    client.ready_head = CLIENT_NONE
    while index != CLIENT_NONE:
        endpoint = &client.endpoints[index]
        next = endpoint.ready_next
        endpoint.ready_next = CLIENT_NONE
        endpoint.is_ready = False
        if endpoint.kind == ENDPOINT_FREE:
            endpoint.pending_next = client.endpoint_free
            client.endpoint_free = index
        else:
            run_held(client, endpoint)
        index = next
