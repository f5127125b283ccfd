"""The engine thread: submit, reap, run what each completion asks for, advance the connections that changed, sleep.

Sleeping: the engine announces it (``asleep``), then looks at the command queue once more; ``flush`` publishes first and looks at ``asleep``
afterwards. A sequentially consistent fence stands between the two steps on both sides, so at least one of them sees the other.
"""

from libc.errno cimport EAGAIN, ECONNRESET, ENOMEM
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from kdaemon_pyx cimport liburing as lu
from kdaemon_pyx.accept cimport (
    connection_adopt, has_spoken, listener_accepted, listener_add, listener_remove, listeners_armed, listeners_resume, listeners_stop)
from kdaemon_pyx.atomics cimport exchange_u32, fence_seq_cst, store_relaxed_u32, store_release_u32
from kdaemon_pyx.buffers cimport pool_rest
from kdaemon_pyx.changeover cimport changeover_handshake, changeover_plain
from kdaemon_pyx.connection cimport connection_advance, connection_expired
from kdaemon_pyx.company cimport company_wait_us
from kdaemon_pyx.core cimport (
    CLOSE_CONTROL, CLOSE_DRAIN, CLOSE_DRAIN_DEADLINE, CLOSE_RESOURCES, CONNECTION_CLOSING, CONNECTION_ESTABLISHED,
    CONNECTION_HANDSHAKE, ITEM_CONTROL, ITEM_RAW, ITEM_REKEY, OPERATION_ACCEPT, OPERATION_CLOSE, OPERATION_FILE_READ,
    OPERATION_FLUSH, OPERATION_HANGUP, OPERATION_MASK, OPERATION_NONE, OPERATION_POLL, OPERATION_PULL, OPERATION_RECEIVE, OPERATION_RECEIVE_BULK, OPERATION_RECEIVE_EXACT, OPERATION_RECEIVE_MESSAGE, OPERATION_SEND,
    OPERATION_SEND_CONTROL, OPERATION_WAKE, RECORD_LAYER_KERNEL, RECORD_LAYER_NONE, SERVICES_MAX, Connection, Core,
    KeyMaterial, Listener)
from kdaemon_pyx.file_range cimport file_range_read_done
from kdaemon_pyx.flush cimport flush_done
from kdaemon_pyx.handshake_io cimport handshake_received
from kdaemon_pyx.ktls cimport KTLS_RX, ktls_set_keys
from kdaemon_pyx.libcrypto cimport CRYPTO_memcmp
from kdaemon_pyx.lifecycle cimport (
    EVENT_KIND_CONNECTED, EVENT_KIND_DRAINED, EVENT_KIND_EXPORTED, EVENT_KIND_REKEYED, connection_closed, connection_find, connection_handle, connection_mark, connection_terminate,
    event_push)
from kdaemon_pyx.liburing cimport io_uring_cqe, io_uring_sqe
from kdaemon_pyx.receive cimport (
    receive_bulk_done, receive_data_done, receive_exact_done, receive_hangup_done, receive_held, receive_message_done,
    receive_pull_done)
from kdaemon_pyx.record cimport CONTENT_ALERT, record_keys_set
from kdaemon_pyx.spsc cimport Message, message_free, queue_empty, queue_pop
from kdaemon_pyx.timers cimport (
    TIMER_ACCEPT, TIMER_CONNECTION, TIMER_DRAIN, TIMER_POOL, TIMER_SERVICE, Timer, timer_set, timers_expire, timers_next_ns, timers_setup)
from kdaemon_pyx.transmit cimport (
    transmit_control_done, transmit_discard, transmit_item, transmit_send_done)
from kdaemon_pyx.uring cimport (
    receive_ring_buffer, receive_ring_publish, receive_ring_recycle, receive_ring_rest, receive_ring_setup, receive_ring_teardown, uring_enter, uring_peek,
    uring_seen, uring_setup, uring_sqe, uring_teardown)


cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    int CLOCK_MONOTONIC_COARSE
    int clock_gettime(int clock, timespec* now)

cdef extern from "<unistd.h>" nogil:
    int64_t write(int fd, const void* data, size_t length)

cdef enum:
    URING_ENTRIES = 1024
    RECEIVE_BUFFERS = 128
    RECEIVE_BUFFER_SIZE = 32768
    BATCH = 128
    # Per turn at most: so that commands and timers wait for no more than a few hundred completions.
    COMPLETIONS_PER_TURN = 512
    COMMANDS_PER_TURN = 512
    POOL_REST_MORE_NS = 20_000_000


cdef void clock_read(Core* core) noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now)
    core.now_ns = <uint64_t>now.tv_sec * 1000000000 + <uint64_t>now.tv_nsec


cdef void wake_arm(Core* core) noexcept nogil:
    cdef io_uring_sqe* sqe = uring_sqe(&core.uring)
    lu.io_uring_prep_read(sqe, core.command_fd, &core.wake_value, sizeof(core.wake_value), 0)
    lu.io_uring_sqe_set_data64(sqe, OPERATION_WAKE)
    core.wake_armed = 1


cdef int loop_setup(Core* core) noexcept nogil:
    """In the engine thread. 0 or a negative errno; then nothing is left behind."""
    cdef int result = uring_setup(&core.uring, URING_ENTRIES)
    if result < 0:
        return result
    result = receive_ring_setup(&core.receive_ring, &core.uring, 0, RECEIVE_BUFFERS, RECEIVE_BUFFER_SIZE)
    if result < 0:
        uring_teardown(&core.uring)
        return result
    clock_read(core)
    timers_setup(&core.timers, core.now_ns)
    core.accept_timer.kind = TIMER_ACCEPT
    core.drain_timer.kind = TIMER_DRAIN
    core.service_timer.kind = TIMER_SERVICE
    core.pool_timer.kind = TIMER_POOL
    services_timer(core)
    pool_timer(core)
    core.memory_file.fd = -1
    core.memory_file.references = 1
    core.memory_file.size = <uint64_t>1 << 62
    core.memory_file.mapping = <uint8_t*>core            # never read: says that there is something to send windows of
    wake_arm(core)
    return 0


cdef void loop_teardown(Core* core) noexcept nogil:
    receive_ring_teardown(&core.receive_ring, &core.uring)
    uring_teardown(&core.uring)


# --- commands -----------------------------------------------------------------------------------------------------------

cdef void command_install(Core* core, Connection* c, Message* message) noexcept nogil:
    if c.state != CONNECTION_HANDSHAKE or c.install_material != NULL or c.finishing:
        return
    if c.receiving:
        # The contract's promise that no receive is in flight is what keeps ciphertext out of our hands here.
        connection_terminate(c, CLOSE_RESOURCES, EAGAIN)
        return
    c.install_material = <KeyMaterial*>message.data
    message.data = NULL
    c.receive_wanted = 0
    connection_mark(c)


cdef void rekey_receive(Connection* c, const KeyMaterial* material) noexcept nogil:
    """The peer's KeyUpdate: the next record is under this key, from sequence number 0."""
    cdef int result
    if c.receive_keys_pending:
        # Leftover is still opened here; TLS_RX is set with what comes out of that.
        memcpy(c.install_material.rx_key, material.rx_key, sizeof(material.rx_key))
        memcpy(c.install_material.rx_iv, material.rx_iv, sizeof(material.rx_iv))
    if c.record_layer == RECORD_LAYER_KERNEL and not c.receive_keys_pending:
        result = ktls_set_keys(c.fd, KTLS_RX, c.secrets.cipher_suite, material.rx_key, material.rx_iv, 0)
    else:
        result = record_keys_set(&c.receive_keys, c.secrets.cipher_suite, material.rx_key, material.rx_iv, 0, False)
    event_push(c.core, EVENT_KIND_REKEYED, connection_handle(c), 0, -result, NULL, 0, False)
    if result < 0:
        connection_terminate(c, CLOSE_RESOURCES, -result)
        return
    memcpy(c.secrets.rx, material.secrets.rx, sizeof(c.secrets.rx))
    c.rekey_pending = 0
    connection_mark(c)
    receive_held(c)


cdef void command_rekey(Connection* c, Message* message) noexcept nogil:
    cdef KeyMaterial* material = <KeyMaterial*>message.data
    if c.state != CONNECTION_ESTABLISHED:
        return
    if message.a == 0:
        if c.rekey_pending:
            rekey_receive(c, material)
        return
    # Ours (before a limit) and one that the peer asked for may have been derived from the same secret. The same key again, from
    # sequence number 0, would use its nonces twice.
    if CRYPTO_memcmp(material.secrets.tx, c.secrets.tx, sizeof(c.secrets.tx)) == 0:
        return
    # From here on, though it is in force only behind what is queued: what is derived next must build on it.
    memcpy(c.secrets.tx, material.secrets.tx, sizeof(c.secrets.tx))
    if transmit_item(c, ITEM_REKEY, 0, message.data, message.length) < 0:
        connection_terminate(c, CLOSE_RESOURCES, ENOMEM)


cdef void command_close(Connection* c, Message* message) noexcept nogil:
    if message.a:                                  # nobody wants it any more: no alert, no lingering
        connection_terminate(c, CLOSE_CONTROL, 0)
        return
    if c.finishing or c.state == CONNECTION_CLOSING:
        return
    if c.state == CONNECTION_ESTABLISHED:
        if c.file_reading:
            connection_terminate(c, CLOSE_CONTROL, 0)
            return
        transmit_discard(c)
        c.discarding = 1
        message.length = 0                         # an alert of an established connection goes by send_control
    if message.length and transmit_item(c, ITEM_RAW, 0, message.data, message.length) < 0:
        connection_terminate(c, CLOSE_CONTROL, 0)
        return
    c.close_reason = CLOSE_CONTROL
    c.finishing = 1
    connection_mark(c)


cdef void command_unlisten(Core* core, Message* message) noexcept nogil:
    cdef Connection* c = core.live
    listener_remove(core, <int32_t>message.connection)
    while message.a and c != NULL:                 # who wanted them is gone: they are not left to their deadlines
        if c.listener == <int32_t>message.connection and c.state == CONNECTION_HANDSHAKE:
            connection_terminate(c, CLOSE_CONTROL, 0)
        c = c.live_next


cdef void command_drain(Core* core, uint64_t deadline_ms) noexcept nogil:
    cdef Connection* c = core.live
    core.draining = 1
    listeners_stop(core)
    timer_set(&core.timers, &core.drain_timer, core.now_ns + deadline_ms * 1000000 + 1)
    while c != NULL:
        if c.state == CONNECTION_HANDSHAKE and not c.heard and not c.finishing and not has_spoken(c.fd):
            connection_terminate(c, CLOSE_DRAIN, 0)      # a connection that has not said a word has nothing to finish
        else:
            connection_mark(c)
        c = c.live_next


cdef void terminate_all(Core* core) noexcept nogil:
    cdef Connection* c = core.live
    while c != NULL:
        if c.state != CONNECTION_CLOSING:
            core.drain_cut += 1
            c.finishing = 0
            connection_terminate(c, CLOSE_DRAIN_DEADLINE, 0)
        c = c.live_next


cdef void command_stop(Core* core) noexcept nogil:
    cdef io_uring_sqe* sqe
    core.stopping = 1
    listeners_stop(core)
    terminate_all(core)
    # The READ of the eventfd points into the Core: join it, too.
    sqe = uring_sqe(&core.uring)
    lu.io_uring_prep_cancel64(sqe, OPERATION_WAKE, 0)
    lu.io_uring_sqe_set_data64(sqe, OPERATION_NONE)


cdef void command_start_tls(Core* core, Message* message) noexcept nogil:
    cdef Connection* c = connection_find(core, message.connection)
    cdef int result = -ECONNRESET if c == NULL else changeover_handshake(c)
    if result == 0:
        c.client_role = message.a != 0
    event_push(core, EVENT_KIND_CONNECTED, 0 if result < 0 else message.connection, result, message.b, NULL, 0, False)


cdef void command_export(Core* core, Message* message) noexcept nogil:
    cdef Connection* c = connection_find(core, message.connection)
    if c == NULL or c.state != CONNECTION_ESTABLISHED or c.exporting:
        event_push(core, EVENT_KIND_EXPORTED, message.connection, -ECONNRESET, message.b, NULL, 0, False)
        return
    c.exporting = 1
    c.export_cookie = message.b
    connection_mark(c)


cdef void command_run(Core* core, Message* message) noexcept nogil:
    cdef Connection* c
    if message.kind == COMMAND_LISTEN:
        listener_add(core, <int32_t>message.connection, message.a, message.b)
    elif message.kind == COMMAND_START_TLS:
        command_start_tls(core, message)
    elif message.kind == COMMAND_EXPORT:
        command_export(core, message)
    elif message.kind == COMMAND_UNLISTEN:
        command_unlisten(core, message)
    elif message.kind == COMMAND_ADOPT:
        connection_adopt(core, message.a, message.b, message.connection != 0)
    elif message.kind == COMMAND_DRAIN:
        command_drain(core, <uint64_t>message.b)
    elif message.kind == COMMAND_STOP:
        command_stop(core)
    else:
        c = connection_find(core, message.connection)
        if c == NULL or c.state == CONNECTION_CLOSING:
            return
        if message.kind == COMMAND_RECEIVE:
            if c.state == CONNECTION_HANDSHAKE:
                c.receive_wanted = 1
                connection_mark(c)
        elif message.kind == COMMAND_SEND:
            if c.state == CONNECTION_HANDSHAKE and transmit_item(c, ITEM_RAW, 0, message.data, message.length) < 0:
                connection_terminate(c, CLOSE_RESOURCES, 0)
        elif message.kind == COMMAND_INSTALL:
            command_install(core, c, message)
        elif message.kind == COMMAND_PLAIN:
            if c.state == CONNECTION_HANDSHAKE:
                changeover_plain(c, <uint32_t>(message.b >> 32), <uint32_t>message.b)
        elif message.kind == COMMAND_REKEY:
            command_rekey(c, message)
        elif message.kind == COMMAND_SEND_CONTROL:
            if c.state == CONNECTION_ESTABLISHED and c.record_layer != RECORD_LAYER_NONE:
                if message.a == CONTENT_ALERT and message.length == 2 and message.data[0] == 2:
                    c.alert_sent = 1
                if transmit_item(c, ITEM_CONTROL, <uint8_t>message.a, message.data, message.length) < 0:
                    connection_terminate(c, CLOSE_RESOURCES, 0)
        elif message.kind == COMMAND_CLOSE:
            command_close(c, message)


cdef void commands_run(Core* core) noexcept nogil:
    cdef Message message
    cdef int count = 0
    while count < COMMANDS_PER_TURN and queue_pop(&core.commands, &message):
        command_run(core, &message)
        message_free(&message)
        count += 1
    core.counters.commands += count


# --- completions --------------------------------------------------------------------------------------------------------

cdef void received(Core* core, Connection* c, int32_t result, uint32_t flags) noexcept nogil:
    """A RECEIVE: its provided buffer goes back to the ring as soon as the data has been looked at."""
    cdef uint16_t index = <uint16_t>(flags >> lu.IORING_CQE_BUFFER_SHIFT)
    cdef uint8_t* data = NULL
    if flags & lu.IORING_CQE_F_BUFFER:
        data = receive_ring_buffer(&core.receive_ring, index)
        core.receive_ring.resident = RECEIVE_BUFFERS
    c.socket_nonempty = (flags & lu.IORING_CQE_F_SOCK_NONEMPTY) != 0
    core.company += 1
    if c.state == CONNECTION_HANDSHAKE:
        handshake_received(c, result, data)
    else:
        c.bulk = c.socket_nonempty and result == <int32_t>core.receive_ring.buffer_size
        receive_data_done(c, result, data)
    if data != NULL:
        receive_ring_recycle(&core.receive_ring, index)


cdef void completed(Core* core, uint64_t user_data, int32_t result, uint32_t flags) noexcept nogil:
    cdef uint32_t operation = <uint32_t>(user_data & OPERATION_MASK)
    cdef Connection* c = <Connection*>(user_data & ~<uint64_t>OPERATION_MASK)
    if operation == OPERATION_ACCEPT:
        listener_accepted(core, <Listener*>c, result, flags)
        return
    if operation == OPERATION_WAKE:
        core.wake_armed = 0
        if result > 0:
            core.counters.wakes += 1
        if not core.stopping:
            wake_arm(core)
        return
    if operation == OPERATION_POLL:
        (<uint32_t*>c)[0] = 0
        return
    if c == NULL:
        return
    c.operations -= 1
    if operation == OPERATION_RECEIVE:
        received(core, c, result, flags)
    elif operation == OPERATION_SEND:
        transmit_send_done(c, result)
    elif operation == OPERATION_FILE_READ:
        file_range_read_done(c, result)
    elif operation == OPERATION_RECEIVE_MESSAGE:
        receive_message_done(c, result)
    elif operation == OPERATION_SEND_CONTROL:
        transmit_control_done(c, result)
    elif operation == OPERATION_RECEIVE_BULK:
        receive_bulk_done(c, result)
    elif operation == OPERATION_RECEIVE_EXACT:
        receive_exact_done(c, result)
    elif operation == OPERATION_PULL:
        receive_pull_done(c, result)
    elif operation == OPERATION_FLUSH:
        flush_done(c, result)
    elif operation == OPERATION_HANGUP:
        receive_hangup_done(c)
    elif operation == OPERATION_CLOSE:
        connection_closed(c)
        if core.descriptors_short:
            listeners_resume(core)
        return
    # CANCEL only had to be joined.
    connection_mark(c)


cdef uint32_t completions_run(Core* core) noexcept nogil:
    cdef io_uring_cqe* cqes[128]
    cdef uint32_t total = 0
    cdef uint32_t count, i
    while total < COMPLETIONS_PER_TURN:
        count = uring_peek(&core.uring, cqes, BATCH)
        if count == 0:
            break
        for i in range(count):
            completed(core, cqes[i].user_data, cqes[i].res, cqes[i].flags)
        uring_seen(&core.uring, count)
        total += count
    return total


cdef void services_timer(Core* core) noexcept nogil:
    """Gives the services that want it their time, and sets the timer to the next."""
    cdef uint64_t soonest = 0
    cdef uint64_t delay
    cdef int i
    for i in range(SERVICES_MAX):
        if core.services[i] != NULL and core.services[i].on_timer != NULL:
            delay = core.services[i].on_timer(core.services[i].context, core.now_ns)
            if soonest == 0 or delay < soonest:
                soonest = delay
    timer_set(&core.timers, &core.service_timer, core.now_ns + soonest if soonest else 0)


cdef void pool_timer(Core* core) noexcept nogil:
    if core.live == NULL:                          # then no receive is outstanding
        receive_ring_rest(&core.receive_ring)
    timer_set(&core.timers, &core.pool_timer, core.now_ns + (<uint64_t>POOL_REST_MORE_NS if pool_rest(&core.pool) else core.pool_rest_ns))


cdef void timers_run(Core* core) noexcept nogil:
    cdef Timer* timer = timers_expire(&core.timers, core.now_ns)
    while timer != NULL:
        if timer.kind == TIMER_CONNECTION:
            connection_expired(<Connection*>timer)
        elif timer.kind == TIMER_ACCEPT:
            listeners_resume(core)
        elif timer.kind == TIMER_SERVICE:
            services_timer(core)
        elif timer.kind == TIMER_POOL:
            pool_timer(core)
        else:
            terminate_all(core)
        timer = timers_expire(&core.timers, core.now_ns)


cdef void advance_all(Core* core) noexcept nogil:
    cdef Connection* c
    while core.dirty != NULL:
        c = core.dirty
        core.dirty = c.dirty_next
        c.dirty = 0
        connection_advance(c)


cdef void services_run(Core* core) noexcept nogil:
    """Polls the services that want it."""
    cdef int i
    for i in range(SERVICES_MAX):
        if core.services[i] != NULL and core.services[i].on_turn != NULL:
            core.services[i].on_turn(core)


cdef bint services_rest(Core* core) noexcept nogil:
    """True: something is going on, do not sleep."""
    cdef int i
    cdef bint active = False
    for i in range(SERVICES_MAX):
        if core.services[i] != NULL and core.services[i].on_turn != NULL:
            if core.services[i].on_rest(core):
                active = True
    return active


cdef void events_signal(Core* core) noexcept nogil:
    """Wakes the control thread, once per batch. (A write(2): io_uring sends writes to an eventfd through its thread pool.)"""
    cdef uint64_t one = 1
    if not core.events_published:
        return
    core.events_published = 0
    fence_seq_cst()                                # pair: exchange in Engine.events; the events are published before
    if exchange_u32(&core.event_signalled, 1):
        return
    core.counters.signals += 1
    write(core.event_fd, &one, sizeof(one))


cdef int loop_run(Core* core) noexcept nogil:
    """Until stop() has been obeyed, and everything outstanding joined. 0 or a negative errno."""
    cdef bint wait, active
    cdef int result = 0
    while result == 0:
        clock_read(core)
        core.counters.turns += 1
        core.bulk_pieces = 0
        commands_run(core)
        completions_run(core)
        timers_run(core)
        services_run(core)
        advance_all(core)
        active = services_rest(core)
        if core.draining and core.live == NULL and not core.drained_told:
            core.drained_told = 1
            timer_set(&core.timers, &core.drain_timer, 0)
            event_push(core, EVENT_KIND_DRAINED, 0, 0, core.drain_cut, NULL, 0, False)
        receive_ring_publish(&core.receive_ring)
        events_signal(core)
        if core.stopping and core.live == NULL and not core.wake_armed and not listeners_armed(core):
            break
        store_relaxed_u32(&core.asleep, 1)
        fence_seq_cst()                            # pair: fence in Engine.flush
        wait = not active and core.dirty == NULL and queue_empty(&core.commands)
        result = uring_enter(&core.uring, wait, timers_next_ns(&core.timers, core.now_ns) + 1000000, company_wait_us(core) if wait else 0)
        store_release_u32(&core.asleep, 0)         # pair: load in Engine.flush; a late 1 costs one wake-up
    return core.uring.error if core.uring.error else result
