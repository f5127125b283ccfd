"""Endpoints of a client: table, first-in first-out queues per direction, accepted connections, ends of connections.

Rules that keep this free of recursion: ``client_finish`` starts nothing; operations held behind a barrier are started by
``client_run_ready`` (client_operations) at the end of the turn. A backend's ``close`` calls ``client_connection_closed`` within the call:
what lingers on the wire afterwards does not concern the client, whose memory can be returned at once.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from kdaemon_pyx.client_abi cimport CLIENT_CLOSE, CLIENT_START_TLS, CLIENT_WRITE, client_info
from kdaemon_pyx.client_control cimport client_binding_free, client_binding_get
from kdaemon_pyx.client_queue cimport client_heap_remove, client_post, client_queue_remove
from kdaemon_pyx.client_types cimport (
    CLIENT_ATTACHED, CLIENT_NONE, ENDPOINT_CLOSING, ENDPOINT_CONNECTION, ENDPOINT_ENDED, ENDPOINT_ESTABLISHED, ENDPOINT_FREE,
    ENDPOINT_LISTENER, ENDPOINT_OPENING, OPERATION_FREE, OPERATION_HELD, OPERATION_READING,
    OPERATION_WRITING, Client, ClientBinding, ClientEndpoint, ClientOperation, ClientService,
)

cdef extern from "errno.h" nogil:
    enum:
        ECANCELED
        ECONNABORTED
        EPIPE
        ETIMEDOUT

cdef enum:
    ACCEPTED_MAX = 1024    # accepted connections of a listener that nobody took yet


cdef ClientEndpoint* client_endpoint_new(Client* client, uint8_t kind) noexcept nogil:
    cdef uint32_t index = client.endpoint_free
    cdef uint32_t generation
    cdef ClientEndpoint* endpoint
    if index != CLIENT_NONE:
        client.endpoint_free = client.endpoints[index].pending_next
    elif client.endpoints_used < client.endpoints_max:
        client.endpoints_used += 1
        index = client.endpoints_used
    else:
        return NULL
    endpoint = &client.endpoints[index]
    generation = endpoint.generation % 0x7fffffff + 1
    memset(endpoint, 0, sizeof(ClientEndpoint))
    endpoint.client = client
    endpoint.index = index
    endpoint.generation = generation
    endpoint.kind = kind
    endpoint.state = ENDPOINT_OPENING
    endpoint.reads.head = endpoint.reads.tail = CLIENT_NONE
    endpoint.writes.head = endpoint.writes.tail = CLIENT_NONE
    endpoint.held.head = endpoint.held.tail = CLIENT_NONE
    endpoint.opening_slot = endpoint.ready_next = endpoint.filling_next = CLIENT_NONE
    endpoint.read_lent = endpoint.write_lent = CLIENT_NONE
    endpoint.write_next = endpoint.pending_next = endpoint.pending_tail = CLIENT_NONE
    client.endpoint_count += 1
    return endpoint


cdef void client_endpoint_free(Client* client, ClientEndpoint* endpoint) noexcept nogil:
    while endpoint.reads.head != CLIENT_NONE:
        client_finish(client, endpoint.reads.head, -ECANCELED, 0)
    while endpoint.writes.head != CLIENT_NONE:
        client_finish(client, endpoint.writes.head, -ECANCELED, 0)
    while endpoint.held.head != CLIENT_NONE:
        client_finish(client, endpoint.held.head, -ECANCELED, 0)
    if endpoint.binding:
        client_binding_free(client.service, endpoint.binding)
        endpoint.binding = 0
    free(endpoint.info)
    endpoint.info = NULL
    if endpoint.is_filling:
        leave_filling(client, endpoint)
    # The ready list is walked by index and skips what is free; the entry is reused only after it left that list.
    endpoint.kind = ENDPOINT_FREE
    client.endpoint_count -= 1
    if not endpoint.is_ready:
        endpoint.pending_next = client.endpoint_free
        client.endpoint_free = endpoint.index


cdef ClientEndpoint* client_endpoint_find(Client* client, uint64_t handle) noexcept nogil:
    cdef uint32_t index = <uint32_t> handle
    cdef ClientEndpoint* endpoint
    if handle == 0:
        return &client.endpoints[0]
    if index == 0 or index > client.endpoints_used:
        return NULL
    endpoint = &client.endpoints[index]
    if endpoint.kind == ENDPOINT_FREE or endpoint.generation != handle >> 32 or endpoint.close_queued:
        return NULL
    if endpoint.state == ENDPOINT_OPENING or endpoint.state == ENDPOINT_CLOSING:
        return NULL
    return endpoint


cdef uint64_t client_endpoint_handle(ClientEndpoint* endpoint) noexcept nogil:
    return <uint64_t> endpoint.generation << 32 | endpoint.index


cdef void client_make_ready(Client* client, ClientEndpoint* endpoint) noexcept nogil:
    if not endpoint.is_ready:
        endpoint.is_ready = True
        endpoint.ready_next = client.ready_head
        client.ready_head = endpoint.index


cdef void client_finish(Client* client, uint32_t slot, int64_t result, uint32_t detail) noexcept nogil:
    cdef ClientOperation* operation = &client.operations[slot]
    cdef ClientEndpoint* endpoint = &client.endpoints[operation.endpoint_index]
    if operation.state == OPERATION_READING:
        if operation.done:
            result, detail = operation.done, 0     # what has come is told first, whatever ends the connection
        client_queue_remove(client, &endpoint.reads, slot)
    elif operation.state == OPERATION_WRITING:
        if endpoint.write_next == slot:
            endpoint.write_next = operation.next
        client_queue_remove(client, &endpoint.writes, slot)
    elif operation.state == OPERATION_HELD:
        client_queue_remove(client, &endpoint.held, slot)
        endpoint.active += 1       # held operations do not count as started: balances the line below
    endpoint.active -= 1
    if operation.deadline_ns:
        client_heap_remove(client, slot)
        operation.deadline_ns = 0
    if operation.opening_index != CLIENT_NONE:
        client.copied -= operation.done
    operation.state = OPERATION_FREE
    client_post(client, operation.user_data, slot, result, detail, operation.quiet)
    if endpoint.held.head != CLIENT_NONE:
        client_make_ready(client, endpoint)


cdef void client_cancel_writes_behind(Client* client, uint32_t slot) noexcept nogil:
    cdef uint32_t following = client.operations[slot].next
    cdef uint32_t next
    while following != CLIENT_NONE:
        next = client.operations[following].next
        if client.operations[following].opcode == CLIENT_WRITE:
            client_finish(client, following, -ECANCELED, 0)
        following = next


# Ends the READs with ECANCELED. False: the first one's memory is still with the connection; client_received() goes on.
cdef bint client_cancel_reads(Client* client, ClientEndpoint* endpoint) noexcept nogil:
    cdef uint32_t slot
    while endpoint.read_lent != CLIENT_NONE:       # one that comes back within the call makes room for the next
        slot = endpoint.read_lent
        if client.operations[slot].cancel_error == 0:
            client.operations[slot].cancel_error = -ECANCELED
            client.service.backend.cancel_read(endpoint)
        if endpoint.read_lent == slot:
            return False
    while endpoint.reads.head != CLIENT_NONE:
        client_finish(client, endpoint.reads.head, -ECANCELED, 0)
    return True


cdef void fail_writes(Client* client, ClientEndpoint* endpoint, int64_t error, uint32_t detail) noexcept nogil:
    cdef uint32_t slot = endpoint.writes.head
    cdef uint32_t next
    cdef ClientOperation* operation
    while slot != CLIENT_NONE:
        operation = &client.operations[slot]
        next = operation.next
        if operation.opcode == CLIENT_WRITE and operation.done and operation.done < operation.length:
            client_finish(client, slot, operation.done, 0)      # a short count tells how far the program got
        elif operation.opcode != CLIENT_CLOSE:
            client_finish(client, slot, error, detail)
        slot = next


# CLOSE has reached the head of its queue: everything before it is complete.
cdef void carry_out_close(Client* client, ClientEndpoint* endpoint, uint32_t slot) noexcept nogil:
    if not client_cancel_reads(client, endpoint):
        endpoint.close_waits = True
        return
    endpoint.state = ENDPOINT_CLOSING
    if endpoint.connection != NULL:
        client.service.backend.close(endpoint, True)
    client_finish(client, slot, -ETIMEDOUT if endpoint.close_timed_out else 0, 0)
    client_endpoint_free(client, endpoint)


cdef void client_pump_writes(Client* client, ClientEndpoint* endpoint) noexcept nogil:
    cdef uint32_t slot
    cdef ClientOperation* operation
    cdef int64_t taken
    cdef int error
    while endpoint.write_next != CLIENT_NONE:
        slot = endpoint.write_next
        operation = &client.operations[slot]
        if operation.opcode == CLIENT_WRITE:
            if endpoint.connection == NULL:
                fail_writes(client, endpoint, endpoint.error if endpoint.error else -EPIPE, endpoint.detail)
                continue
            taken = client.service.backend.write(endpoint, client.arena + operation.offset + operation.done,
                                                 operation.length - operation.done)
            if taken == 0:
                return
            if taken < 0:
                fail_writes(client, endpoint, taken, 0)
                continue
            operation.done += <uint32_t> taken
            client.counters.bytes_written += taken
            if operation.done < operation.length:
                continue
            endpoint.write_next = operation.next
            if endpoint.write_next == CLIENT_NONE and client.service.backend.is_sent(endpoint):
                client_sent(endpoint)
                return
            continue
        if endpoint.writes.head != slot:
            # WRITEs before it have not left yet: client_sent() comes back here.
            if client.service.backend.is_sent(endpoint):
                client_sent(endpoint)
            return
        if operation.opcode == CLIENT_CLOSE:
            carry_out_close(client, endpoint, slot)
            return
        error = -EPIPE if endpoint.connection == NULL else client.service.backend.shutdown(endpoint)
        if error == 0:
            endpoint.write_shutdown = True
        client_finish(client, slot, error, 0)


cdef void client_writable(ClientEndpoint* endpoint) noexcept nogil:
    client_pump_writes(endpoint.client, endpoint)


cdef void client_sent(ClientEndpoint* endpoint) noexcept nogil:
    cdef Client* client = endpoint.client
    cdef ClientOperation* operation
    cdef uint32_t slot = endpoint.write_lent
    if slot != CLIENT_NONE:
        endpoint.write_lent = CLIENT_NONE
        if client.operations[slot].cancel_error:
            client.operations[slot].done = <uint32_t> client.service.backend.sent(endpoint)
    while endpoint.writes.head != CLIENT_NONE:
        slot = endpoint.writes.head
        operation = &client.operations[slot]
        if operation.opcode != CLIENT_WRITE or (operation.done < operation.length and not operation.cancel_error):
            break
        client_finish_write(client, slot, operation.cancel_error)
    if endpoint.write_next != CLIENT_NONE:
        client_pump_writes(client, endpoint)


# What moved is told as a short count; what is queued behind would leave a hole in the stream.
cdef void client_finish_write(Client* client, uint32_t slot, int32_t error) noexcept nogil:
    cdef ClientOperation* operation = &client.operations[slot]
    if operation.opcode == CLIENT_WRITE and operation.done:
        if operation.done < operation.length:
            client_cancel_writes_behind(client, slot)
        client_finish(client, slot, operation.done, 0)
    else:
        client_finish(client, slot, error, 0)


cdef void leave_filling(Client* client, ClientEndpoint* endpoint) noexcept nogil:
    cdef uint32_t* link = &client.filling_head
    while link[0] != endpoint.index:
        link = &client.endpoints[link[0]].filling_next
    link[0] = endpoint.filling_next
    endpoint.filling_next = CLIENT_NONE
    endpoint.is_filling = False


# The READ has what there is for now.
cdef void client_filled(ClientEndpoint* endpoint) noexcept nogil:
    cdef Client* client = endpoint.client
    cdef uint32_t slot = endpoint.reads.head
    leave_filling(client, endpoint)
    if slot != CLIENT_NONE and client.operations[slot].done:
        client_finish(client, slot, 0, 0)


cdef uint64_t client_deliver(ClientEndpoint* endpoint, const uint8_t* data, uint64_t length) noexcept nogil:
    cdef uint64_t taken = client_fill(endpoint, data, length)
    if endpoint.is_filling:
        client_filled(endpoint)
    return taken


cdef uint64_t client_fill(ClientEndpoint* endpoint, const uint8_t* data, uint64_t length) noexcept nogil:
    cdef Client* client = endpoint.client
    cdef ClientOperation* operation
    cdef uint64_t taken = 0
    cdef uint64_t part
    if client.state != CLIENT_ATTACHED or endpoint.read_shutdown or endpoint.state == ENDPOINT_CLOSING:
        return length              # nobody will read it
    while taken < length and endpoint.reads.head != CLIENT_NONE:
        operation = &client.operations[endpoint.reads.head]
        part = length - taken
        if part > operation.length - operation.done:
            part = operation.length - operation.done
        memcpy(client.arena + operation.offset + operation.done, data + taken, part)
        taken += part
        operation.done += <uint32_t> part
        client.counters.bytes_read += part
        if operation.done == operation.length:
            client_finish(client, endpoint.reads.head, 0, 0)
        elif not endpoint.is_filling:
            endpoint.is_filling = True
            endpoint.filling_next = client.filling_head
            client.filling_head = endpoint.index
    return taken


cdef void client_received(ClientEndpoint* endpoint, uint64_t length) noexcept nogil:
    cdef Client* client = endpoint.client
    cdef uint32_t slot = endpoint.read_lent
    endpoint.read_lent = CLIENT_NONE
    if client.state != CLIENT_ATTACHED:
        return
    if slot != CLIENT_NONE:
        if length:
            client.counters.bytes_read += length
            client_finish(client, slot, <int64_t> length, 0)
        elif client.operations[slot].cancel_error:
            client_finish(client, slot, client.operations[slot].cancel_error, 0)
    if endpoint.read_shutdown:
        while endpoint.reads.head != CLIENT_NONE:
            client_finish(client, endpoint.reads.head, -ECANCELED, 0)
    if endpoint.close_waits:
        endpoint.close_waits = False
        client_pump_writes(client, endpoint)
    elif endpoint.connection != NULL and (endpoint.read_shutdown or (endpoint.reads.head != CLIENT_NONE and endpoint.reads.head != slot)):
        client.service.backend.read_wanted(endpoint)


cdef void client_end_of_data(ClientEndpoint* endpoint) noexcept nogil:
    cdef Client* client = endpoint.client
    endpoint.end_of_data = True
    while endpoint.reads.head != CLIENT_NONE:
        client_finish(client, endpoint.reads.head, 0, 0)


cdef void client_read_failed(ClientEndpoint* endpoint, int32_t error, uint32_t detail) noexcept nogil:
    endpoint.error = error
    endpoint.detail = detail
    while endpoint.reads.head != CLIENT_NONE:
        client_finish(endpoint.client, endpoint.reads.head, error, detail)


cdef void client_connection_closed(ClientEndpoint* endpoint, int32_t error, uint32_t detail) noexcept nogil:
    cdef Client* client = endpoint.client
    endpoint.connection = NULL
    endpoint.read_lent = endpoint.write_lent = CLIENT_NONE
    client.connection_count -= 1
    if client.state != CLIENT_ATTACHED or endpoint.state == ENDPOINT_CLOSING:
        return
    if endpoint.error == 0:
        endpoint.error = error
        endpoint.detail = detail
    while endpoint.reads.head != CLIENT_NONE:
        if endpoint.end_of_data:
            client_finish(client, endpoint.reads.head, 0, 0)
        else:
            client_finish(client, endpoint.reads.head, error if error else -ECONNABORTED, detail)
    if endpoint.state == ENDPOINT_OPENING:
        if endpoint.close_queued:
            client_endpoint_free(client, endpoint)     # abandoned with its listener
        # Accepted, not taken yet: it stays in the listener's list, and whoever takes it finds it ended.
        return
    endpoint.state = ENDPOINT_ENDED
    fail_writes(client, endpoint, error if error else -EPIPE, detail)
    endpoint.write_next = endpoint.writes.head
    client_pump_writes(client, endpoint)


cdef void client_match_accepts(Client* client, ClientEndpoint* listener) noexcept nogil:
    cdef ClientEndpoint* endpoint
    while listener.reads.head != CLIENT_NONE and listener.pending_next != CLIENT_NONE:
        endpoint = &client.endpoints[listener.pending_next]
        listener.pending_next = endpoint.pending_next
        listener.pending_count -= 1
        endpoint.pending_next = CLIENT_NONE
        endpoint.state = ENDPOINT_ENDED if endpoint.connection == NULL else ENDPOINT_ESTABLISHED
        client_finish(client, listener.reads.head, <int64_t> client_endpoint_handle(endpoint), 0)


cdef ClientEndpoint* client_established(ClientService* service, uint32_t token, void* connection, bint plain) noexcept nogil:
    cdef ClientBinding binding
    cdef Client* client
    cdef ClientEndpoint* endpoint
    cdef ClientEndpoint* listener
    cdef uint32_t slot
    if not client_binding_get(service, token, not plain, &binding):
        return NULL
    if plain:
        binding.info = <uint8_t*> calloc(1, sizeof(client_info))    # "no TLS" in every field
        binding.info_length = sizeof(client_info) if binding.info != NULL else 0
    client = service.clients[binding.client_index]
    if (client == NULL or client.generation != binding.client_generation or client.state != CLIENT_ATTACHED
            or client.endpoints[binding.endpoint_index].generation != binding.endpoint_generation):
        free(binding.info)
        return NULL
    endpoint = &client.endpoints[binding.endpoint_index]
    if endpoint.kind == ENDPOINT_LISTENER:
        listener = endpoint
        endpoint = NULL
        if listener.pending_count < ACCEPTED_MAX:
            endpoint = client_endpoint_new(client, ENDPOINT_CONNECTION)
        if endpoint == NULL:
            free(binding.info)
            return NULL
        if listener.pending_next == CLIENT_NONE:
            listener.pending_next = endpoint.index
        else:
            client.endpoints[listener.pending_tail].pending_next = endpoint.index
        listener.pending_tail = endpoint.index
        listener.pending_count += 1
    elif endpoint.kind == ENDPOINT_CONNECTION and endpoint.opening_slot != CLIENT_NONE:
        listener = NULL
        if not plain:
            endpoint.binding = 0
    else:
        free(binding.info)
        return NULL
    free(endpoint.info)
    endpoint.info = binding.info
    endpoint.info_length = binding.info_length
    endpoint.connection = connection
    endpoint.plain = plain
    client.connection_count += 1
    if listener != NULL:
        client_match_accepts(client, listener)
        return endpoint
    endpoint.state = ENDPOINT_ESTABLISHED
    endpoint.error = 0             # START_TLS took the connection away and brings it back
    endpoint.detail = 0
    slot = endpoint.opening_slot
    endpoint.opening_slot = CLIENT_NONE
    if client.operations[slot].opcode == CLIENT_START_TLS:
        client_finish(client, slot, 0, 0)
    else:
        client_finish(client, slot, <int64_t> client_endpoint_handle(endpoint), 0)
    return endpoint
