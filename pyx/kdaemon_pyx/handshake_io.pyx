"""A connection before its keys are installed.

The engine receives only when the control thread asks, collects until at least one record is complete and hands all complete ones up, so a
peer that drips bytes wakes nobody. What cannot become a record (an HTTP request, a length over the limit) goes up at once: the control
thread finds the answer.

Installation follows ARCHITECTURE.md, invariant 2: validate, commit, then it cannot fail half-way.
"""

from libc.errno cimport EAGAIN, EINTR, EINVAL, ENOBUFS, ENOMEM, EOPNOTSUPP
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from kdaemon_pyx cimport liburing as lu
from kdaemon_pyx.buffers cimport pool_give
from kdaemon_pyx.core cimport (
    CLOSE_RESET, CLOSE_RESOURCES, CLOSE_SERVICE, CONNECTION_CLOSING, CONNECTION_ESTABLISHED, OPERATION_RECEIVE, REASON_KERNEL,
    REASON_NO_ULP, REASON_OFF, REASON_RECORD_SIZE, REASON_SUITE, RECORD_LAYER_KERNEL, RECORD_LAYER_USER, SERVICES_MAX, Connection, KeyMaterial)
from kdaemon_pyx.ktls cimport KTLS_RX, KTLS_TX, ktls_set_keys, ktls_set_record_content_max, ktls_suite_known
from kdaemon_pyx.libcrypto cimport OPENSSL_cleanse
from kdaemon_pyx.lifecycle cimport (
    EVENT_KIND_END_OF_FILE, EVENT_KIND_INSTALLED, EVENT_KIND_RECORDS, connection_handle, connection_terminate, connection_would_block,
    event_push, operation_data)
from kdaemon_pyx.hold cimport hold
from kdaemon_pyx.receive cimport receive_held
from kdaemon_pyx.record cimport (
    CONTENT_APPLICATION_DATA, RECORD_CIPHERTEXT_MAX, RECORD_HEADER, RECORD_PLAINTEXT_MAX, record_keys_set, suite_key_length)
from kdaemon_pyx.uring cimport uring_sqe


cdef const char* record_layer_reason(uint8_t reason) noexcept nogil:
    """A RecordLayerReason in one word, of the vocabulary of kdaemon/ktls.py: log, counters, the ready line and INFO say the same."""
    if reason == REASON_KERNEL:
        return b"available"
    if reason == REASON_OFF:
        return b"switched-off"
    if reason == REASON_NO_ULP:
        return b"no-ulp"
    return b"no-cipher" if reason == REASON_SUITE else b"record-size"


cdef void handshake_arm(Connection* c) noexcept nogil:
    """Starts a receive if the control thread asked for one, and what is held does not answer it."""
    cdef lu.io_uring_sqe* sqe
    if not c.receive_wanted or c.end_of_file:
        return
    if c.cipher != NULL:
        handshake_offer(c)
    if c.receiving or not c.receive_wanted:
        return
    sqe = uring_sqe(&c.core.uring)
    lu.io_uring_prep_recv(sqe, c.fd, NULL, c.core.receive_ring.buffer_size, 0)
    sqe.buf_group = c.core.receive_ring.group
    lu.io_uring_sqe_set_flags(sqe, lu.IOSQE_BUFFER_SELECT)
    lu.io_uring_sqe_set_data64(sqe, operation_data(c, OPERATION_RECEIVE))
    c.operations += 1
    c.receiving = 1


cdef uint32_t complete_records(const uint8_t* data, uint32_t length) noexcept nogil:
    """Bytes of the complete records at ``data``; everything, if something there cannot be a record (RFC 8446 section 5.1)."""
    cdef uint32_t position = 0
    cdef uint32_t record
    while position < length:
        if data[position] < 20 or data[position] > 23:
            return length
        if length - position >= 2 and data[position + 1] != 3:
            return length
        if length - position < RECORD_HEADER:
            break
        record = data[position + 3] << 8 | data[position + 4]
        if record > (RECORD_CIPHERTEXT_MAX if data[position] == CONTENT_APPLICATION_DATA else RECORD_PLAINTEXT_MAX):
            return length
        if length - position < RECORD_HEADER + record:
            break
        position += RECORD_HEADER + record
    return position


cdef bint records_up(Connection* c, const uint8_t* data, uint32_t length) noexcept nogil:
    cdef uint8_t* copy = <uint8_t*>malloc(length)
    if copy == NULL:
        connection_terminate(c, CLOSE_RESOURCES, ENOMEM)
        return False
    memcpy(copy, data, length)
    c.receive_wanted = 0
    event_push(c.core, EVENT_KIND_RECORDS, connection_handle(c), c.listener, 0, copy, length, False)
    return True


cdef void handshake_received(Connection* c, int32_t result, uint8_t* data) noexcept nogil:
    """Completion of RECEIVE in the handshake state; ``data`` is a provided buffer that the caller recycles."""
    cdef uint32_t complete, length
    c.receiving = 0
    if c.state == CONNECTION_CLOSING or result == -EINTR or result == -ENOBUFS:
        return
    if result == -EAGAIN:
        connection_would_block(c)
        return
    if c.discarding:
        if result <= 0:
            c.end_of_file = 1
        return
    if result < 0:
        connection_terminate(c, CLOSE_RESET, -result)
        return
    if result == 0:
        c.end_of_file = 1
        event_push(c.core, EVENT_KIND_END_OF_FILE, connection_handle(c), 0, 0, NULL, 0, False)
        return
    c.heard = 1
    length = <uint32_t>result
    if not c.receive_wanted:
        # Left from the time before TLS was started: kept until the control thread asks, so that each request has one answer.
        hold(c, data, length)
        return
    if c.cipher == NULL:
        complete = complete_records(data, length)
        if complete and not records_up(c, data, complete):
            return
        if complete < length:
            hold(c, data + complete, length - complete)
        return
    if hold(c, data, length) == 0:
        handshake_offer(c)


cdef void handshake_offer(Connection* c) noexcept nogil:
    """Hands up what is held, if a record of it is complete."""
    cdef uint32_t length = c.cipher_end - c.cipher_start
    cdef uint32_t complete = complete_records(c.cipher.data + c.cipher_start, length)
    if complete == 0:
        return
    if not records_up(c, c.cipher.data + c.cipher_start, complete):
        return
    c.cipher_start += complete
    if complete == length:
        pool_give(&c.core.pool, c.cipher)
        c.cipher = NULL


cdef int leftover_in_front(Connection* c, const KeyMaterial* material) noexcept nogil:
    """What the control thread gives back was received before what is still held: both, in this order, become the held ciphertext."""
    cdef uint8_t[16645] partial
    cdef uint32_t held = 0
    if material.attached_length == 0:
        return 0
    if c.cipher != NULL:
        held = c.cipher_end - c.cipher_start
        if held > sizeof(partial):
            return -EINVAL
        memcpy(partial, c.cipher.data + c.cipher_start, held)
        pool_give(&c.core.pool, c.cipher)
        c.cipher = NULL
    if hold(c, material.attached, material.attached_length) < 0 or (held and hold(c, partial, held) < 0):
        return -ENOMEM
    return 0


cdef int install_keys(Connection* c, const KeyMaterial* material) noexcept nogil:
    """Validates, then commits. 0, or a negative errno after which the connection must close."""
    cdef uint16_t suite = material.secrets.cipher_suite
    cdef int result
    if suite_key_length(suite) == 0 or material.service >= SERVICES_MAX or c.core.services[material.service] == NULL:
        return -EINVAL
    if c.core.record_layer_mode == 2:
        c.reason = REASON_OFF
    elif not c.ulp_attached:
        c.reason = REASON_NO_ULP
    elif not ktls_suite_known(suite) or not (c.core.ktls_suites >> (suite & 31)) & 1:
        c.reason = REASON_SUITE
    elif material.record_content_max < RECORD_PLAINTEXT_MAX and not c.core.ktls_record_size:
        c.reason = REASON_RECORD_SIZE
    else:
        c.reason = REASON_KERNEL
    if c.reason != REASON_KERNEL and c.core.record_layer_mode == 1:
        return -EOPNOTSUPP
    result = leftover_in_front(c, material)
    if result < 0:
        return result
    # The receive keys are needed here in both layers as long as user space holds ciphertext.
    if c.reason != REASON_KERNEL or c.cipher != NULL:
        result = record_keys_set(&c.receive_keys, suite, material.rx_key, material.rx_iv, material.rx_sequence, False)
        if result < 0:
            return result
    if c.reason != REASON_KERNEL:
        result = record_keys_set(&c.transmit_keys, suite, material.tx_key, material.tx_iv, material.tx_sequence, True)
        if result < 0:
            return result
        c.record_layer = RECORD_LAYER_USER
        return 0
    # Commit: from the first key on, a failure closes the connection.
    result = ktls_set_keys(c.fd, KTLS_TX, suite, material.tx_key, material.tx_iv, material.tx_sequence)
    if result < 0:
        return result
    if material.record_content_max < RECORD_PLAINTEXT_MAX:
        result = ktls_set_record_content_max(c.fd, material.record_content_max)
        if result < 0:
            return result
    c.kernel_tx_records = material.tx_sequence
    if c.cipher == NULL:
        result = ktls_set_keys(c.fd, KTLS_RX, suite, material.rx_key, material.rx_iv, material.rx_sequence)
        if result < 0:
            return result
    else:
        c.receive_keys_pending = 1
    c.record_layer = RECORD_LAYER_KERNEL
    return 0


cdef void handshake_install(Connection* c) noexcept nogil:
    """Everything queued before is sent: the keys, the service, and whatever arrived behind the last handshake record."""
    cdef KeyMaterial* material = c.install_material
    cdef int result = install_keys(c, material)
    if result < 0:
        connection_terminate(c, CLOSE_RESOURCES, -result)
        return
    c.secrets = material.secrets
    c.record_content_max = material.record_content_max
    c.service = c.core.services[material.service]
    c.site = material.site
    if not c.receive_keys_pending:
        OPENSSL_cleanse(material, sizeof(KeyMaterial) + material.attached_length)
        free(material)
        c.install_material = NULL
    c.state = CONNECTION_ESTABLISHED
    c.want_more = 1
    c.flood_ns = c.core.now_ns
    c.engine_deadline_ns = 0
    if c.record_layer == RECORD_LAYER_KERNEL:
        c.core.counters.record_layer_kernel += 1
    else:
        c.core.counters.record_layer_user += 1
    event_push(c.core, EVENT_KIND_INSTALLED, connection_handle(c), c.record_layer, c.reason, NULL, 0, False)
    c.established = 1
    result = c.service.on_established(c)
    if result < 0:
        connection_terminate(c, CLOSE_SERVICE, -result)
        return
    receive_held(c)
