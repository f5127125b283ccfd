"""Receive side of an established connection.

User record layer: ciphertext arrives in a provided buffer, whole records are opened in place and offered to the service from there; only
a partial record, or plaintext that the service leaves, is copied into a buffer of the connection. A waiting connection holds none. Where more
comes than a provided buffer takes, the connection only waits by the uring and receives by itself, many records at a time, as long as the service
has asked for more. What the service has no use for yet is not opened.

Kernel record layer: plaintext arrives in a provided buffer. RECV answers EIO where the next record is not application data; RECVMSG with a
control buffer then reads that record. Ciphertext that came in before TLS_RX could be set is opened here: a partial record is completed by
receiving exactly its rest, so that the kernel starts at a record boundary (ARCHITECTURE.md, invariant 1).

Records that are not application data are control_records.pyx's.
"""

from libc.errno cimport EAGAIN, EBADMSG, EINTR, EINVAL, EIO, EMSGSIZE, ENOBUFS, ENOMEM, EPROTO, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memmove

from kdaemon_pyx cimport liburing as lu
from kdaemon_pyx.buffers cimport BUFFER_BULK, BUFFER_SMALL, pool_give, pool_take
from kdaemon_pyx.control_records cimport control_flooded, control_record, violation
from kdaemon_pyx.core cimport (
    CLOSE_RECORD, CLOSE_RESET, CLOSE_RESOURCES, CLOSE_SERVICE, CONNECTION_CLOSING, CONNECTION_ESTABLISHED,
    OPERATION_CANCEL, OPERATION_HANGUP, OPERATION_PULL, OPERATION_RECEIVE, OPERATION_RECEIVE_BULK, OPERATION_RECEIVE_EXACT, OPERATION_RECEIVE_MESSAGE, RECORD_LAYER_KERNEL, RECORD_LAYER_NONE,
    RECORD_LAYER_USER, Connection,
    ControlMessage)
from kdaemon_pyx.hold cimport hold, hold_in, hold_release, hold_rest, hold_shrink, keep
from kdaemon_pyx.ktls cimport KTLS_RX, ktls_control_prepare_receive, ktls_control_type, ktls_set_keys
from kdaemon_pyx.libcrypto cimport OPENSSL_cleanse
from kdaemon_pyx.lifecycle cimport connection_mark, connection_terminate, connection_would_block, operation_data
from kdaemon_pyx.record cimport (
    ALERT_UNEXPECTED_MESSAGE, CONTENT_APPLICATION_DATA, RECORD_CIPHERTEXT_MAX,
    RECORD_HEADER, record_alert, record_keys_clear, record_open)
from kdaemon_pyx.transmit cimport transmit_idle
from kdaemon_pyx.uring cimport uring_sqe


cdef extern from "<errno.h>" nogil:
    int EKEYEXPIRED
    int ECANCELED

cdef extern from "<poll.h>" nogil:
    """
    #ifndef POLLRDHUP
    #define POLLRDHUP 0x2000
    #endif
    """
    unsigned POLLIN, POLLRDHUP

cdef extern from "<sys/socket.h>" nogil:
    int MSG_DONTWAIT
    int SOL_SOCKET
    int SO_ERROR
    int getsockopt(int fd, int level, int name, void* value, unsigned int* length)
    ssize_t recv(int fd, void* data, size_t length, int flags)


cdef enum:
    BULK_COMPANY = 32768           # so much in one receive is worth a wait
    BULK_PIECE = 65624             # four full records: 4 * (16384 + 22)
    BULK_PIECES = 16               # of a connection in one turn, until
    BULK_PIECES_TURN = 64          # were received by all: from then on
    BULK_PIECES_SHARE = 4


# --- plaintext to the service -------------------------------------------------------------------------------------------

cdef void consumed_negative(Connection* c, int64_t result) noexcept nogil:
    connection_terminate(c, CLOSE_SERVICE, <int32_t>-result)


cdef void deliver(Connection* c, const uint8_t* data, uint32_t length) noexcept nogil:
    """Application data: offered from where it lies; what the service leaves is kept."""
    cdef int64_t consumed
    c.core.counters.bytes_in += length
    if c.discarding:
        return
    if c.fragment != NULL:
        violation(c, CLOSE_RECORD, ALERT_UNEXPECTED_MESSAGE, EPROTO)    # inside a handshake message that came in pieces
        return
    if c.pull:
        if keep(c, data, length) == 0:
            receive_pull(c)
        return
    if c.input != NULL:
        if keep(c, data, length) == 0 and c.want_more:
            receive_offer(c)
        return
    consumed = c.service.on_data(c, data, length)
    if consumed < 0:
        consumed_negative(c, consumed)
        return
    if consumed < <int64_t>length and c.state != CONNECTION_CLOSING:
        c.want_more = not c.service.asks and transmit_idle(c)
        keep(c, data + consumed, length - <uint32_t>consumed)


cdef void pulled(Connection* c, uint32_t length) noexcept nogil:
    """The service's memory holds ``length`` bytes of plaintext, or none after a cancel: it is the service's again."""
    cdef uint8_t* data = c.pull_data
    cdef int64_t consumed
    c.pull_data = NULL
    consumed = c.service.on_data(c, data, length)
    if consumed < 0:
        consumed_negative(c, consumed)


cdef void receive_pull(Connection* c) noexcept nogil:
    """Copies kept plaintext, whose tag is verified, to where the service wants it."""
    cdef uint32_t length
    if c.pull_data == NULL or c.input == NULL or c.receiving_pull or not c.established:
        return
    length = c.input_end - c.input_start
    if length > c.pull_length:
        length = c.pull_length
    memcpy(c.pull_data, c.input.data + c.input_start, length)
    c.input_start += length
    if c.input_start >= c.input_end:
        pool_give(&c.core.pool, c.input)
        c.input = NULL
    pulled(c, length)


cdef void receive_pull_cancel(Connection* c) noexcept nogil:
    """on_data answers: with what has arrived, or with no byte."""
    cdef lu.io_uring_sqe* sqe
    if c.pull_data == NULL:
        return
    if not c.receiving_pull:
        pulled(c, 0)
        return
    sqe = uring_sqe(&c.core.uring)
    lu.io_uring_prep_cancel64(sqe, operation_data(c, OPERATION_PULL), 0)
    lu.io_uring_sqe_set_data64(sqe, operation_data(c, OPERATION_CANCEL))
    c.operations += 1


cdef void receive_pull_done(Connection* c, int32_t result) noexcept nogil:
    """Completion of PULL."""
    c.receiving_pull = 0
    if result == -ECANCELED and c.state != CONNECTION_CLOSING:
        c.receiving = 0
        pulled(c, 0)
        return
    if ended(c, result) or c.state != CONNECTION_ESTABLISHED or c.finishing:
        return
    c.core.counters.bytes_in += <uint32_t>result
    if c.fragment != NULL:
        violation(c, CLOSE_RECORD, ALERT_UNEXPECTED_MESSAGE, EPROTO)
        return
    pulled(c, <uint32_t>result)


cdef void receive_offer(Connection* c) noexcept nogil:
    """Offers kept plaintext again."""
    cdef int64_t consumed
    cdef uint32_t length
    c.resume = 0
    if c.pull:
        receive_pull(c)
        return
    if c.input == NULL or c.discarding or not c.established:
        return
    length = c.input_end - c.input_start
    consumed = c.service.on_data(c, c.input.data + c.input_start, length)
    if consumed < 0:
        consumed_negative(c, consumed)
        return
    c.input_start += <uint32_t>consumed
    if c.input_start >= c.input_end:
        pool_give(&c.core.pool, c.input)
        c.input = NULL
        c.want_more = 1
    else:
        c.want_more = not c.service.asks and transmit_idle(c)


# --- ciphertext -----------------------------------------------------------------------------------------------------------

cdef bint paused(Connection* c) noexcept nogil:
    return c.rekey_pending or c.end_of_data or c.state == CONNECTION_CLOSING or backlogged(c)


cdef bint backlogged(Connection* c) noexcept nogil:
    """The service has left plaintext and must take it first."""
    return (c.input != NULL and not c.discarding
            and (c.pull or not c.want_more or c.input_end - c.input_start >= c.core.input_bytes_max))


cdef uint32_t open_records(Connection* c, uint8_t* data, uint32_t length) noexcept nogil:
    """Opens the whole records at ``data`` and passes them on. Returns the bytes used; behind a KeyUpdate or close_notify it stops,
    and where the service has enough."""
    cdef uint32_t position = 0
    cdef uint32_t record
    cdef uint8_t content_type = 0
    cdef int64_t plaintext
    while length - position >= RECORD_HEADER and not paused(c):
        record = RECORD_HEADER + (data[position + 3] << 8 | data[position + 4])
        if record > RECORD_HEADER + RECORD_CIPHERTEXT_MAX or data[position] != CONTENT_APPLICATION_DATA:
            plaintext = -EMSGSIZE if data[position] == CONTENT_APPLICATION_DATA else -EPROTO
        elif record > length - position:
            break
        else:
            plaintext = record_open(&c.receive_keys, data + position, record, &content_type)
        if plaintext < 0:
            if c.finishing:
                connection_terminate(c, CLOSE_RECORD, <int32_t>-plaintext)
            else:
                violation(c, CLOSE_RECORD, record_alert(<int>plaintext), <int>-plaintext)
            return length
        if content_type != CONTENT_APPLICATION_DATA:
            control_record(c, content_type, data + position + RECORD_HEADER, <uint32_t>plaintext)
        elif plaintext:
            deliver(c, data + position + RECORD_HEADER, <uint32_t>plaintext)
        else:
            control_flooded(c)
        position += record
        if c.discarding and c.finishing:
            return length                          # nothing that follows matters to anyone
    return position


cdef void receive_held(Connection* c) noexcept nogil:
    """Opens what is held, as far as it goes (after install, rekey, the rest of a partial record, or when the service takes more)."""
    if c.cipher != NULL:
        if not paused(c):
            c.cipher_start += open_records(c, c.cipher.data + c.cipher_start, c.cipher_end - c.cipher_start)
        hold_release(c)
    # After a close_notify too: a connection is the kernel's in both directions or not at all, whoever counts them.
    if c.receive_keys_pending and c.cipher == NULL and not c.rekey_pending and c.state != CONNECTION_CLOSING:
        install_receive_keys(c)


cdef void install_receive_keys(Connection* c) noexcept nogil:
    """Kernel layer: user space holds no ciphertext any more; the kernel opens the next record."""
    cdef int result
    if c.discarding:
        return
    result = ktls_set_keys(c.fd, KTLS_RX, c.secrets.cipher_suite, c.install_material.rx_key, c.install_material.rx_iv,
                           c.receive_keys.sequence)
    c.receive_keys_pending = 0
    OPENSSL_cleanse(c.install_material, sizeof(c.install_material[0]))
    free(c.install_material)
    c.install_material = NULL
    record_keys_clear(&c.receive_keys)
    if result < 0:
        connection_terminate(c, CLOSE_RESOURCES, -result)


cdef void ciphertext(Connection* c, uint8_t* data, uint32_t length) noexcept nogil:
    """User layer: new bytes from the socket."""
    cdef uint32_t piece, used = 0
    # A held partial record gets exactly its rest, so that everything behind it is opened where it lies.
    while c.cipher != NULL and used < length and not paused(c):
        piece = hold_rest(c)
        if piece > length - used:
            piece = length - used
        if piece and hold(c, data + used, piece) < 0:
            return
        used += piece
        receive_held(c)
    if used == length or c.state == CONNECTION_CLOSING:
        return
    if c.cipher == NULL:
        used += open_records(c, data + used, length - used)
    if used < length and not c.discarding and not c.end_of_data and c.state == CONNECTION_ESTABLISHED:
        hold(c, data + used, length - used)


# --- operations -----------------------------------------------------------------------------------------------------------

cdef void receive_arm(Connection* c) noexcept nogil:
    """Starts the receive operation that the connection's state asks for, if none is outstanding. Established state, or lingering."""
    cdef lu.io_uring_sqe* sqe
    cdef uint32_t rest
    if c.receiving or c.end_of_file or c.exporting or c.state == CONNECTION_CLOSING:
        return
    if c.receive_broken:
        if c.finishing == 3:
            sqe = uring_sqe(&c.core.uring)
            lu.io_uring_prep_poll_add(sqe, c.fd, POLLRDHUP)
            lu.io_uring_sqe_set_data64(sqe, operation_data(c, OPERATION_HANGUP))
            c.operations += 1
            c.receiving = 1
        return
    if c.message_pending:
        receive_message(c)
        return
    if c.finishing == 3 and c.cipher != NULL:
        receive_held(c)                            # what the service did not take is thrown away now
        if c.end_of_data or c.state == CONNECTION_CLOSING:
            connection_mark(c)
            return
    if c.finishing < 3:
        if c.discarding or c.rekey_pending or c.end_of_data:
            return
        if (c.pull and c.pull_data == NULL) or backlogged(c):
            return
        if c.receive_keys_pending:
            if c.cipher == NULL:
                return
            rest = hold_rest(c)
            if c.cipher_end + rest > c.cipher.capacity:
                memmove(c.cipher.data, c.cipher.data + c.cipher_start, c.cipher_end - c.cipher_start)
                c.cipher_end -= c.cipher_start
                c.cipher_start = 0
            sqe = uring_sqe(&c.core.uring)
            lu.io_uring_prep_recv(sqe, c.fd, c.cipher.data + c.cipher_end, rest, 0)
            lu.io_uring_sqe_set_data64(sqe, operation_data(c, OPERATION_RECEIVE_EXACT))
            c.operations += 1
            c.receiving = 1
            return
    if c.pull and c.record_layer == RECORD_LAYER_KERNEL and c.finishing < 3:
        sqe = uring_sqe(&c.core.uring)
        lu.io_uring_prep_recv(sqe, c.fd, c.pull_data, c.pull_length, 0)
        lu.io_uring_sqe_set_data64(sqe, operation_data(c, OPERATION_PULL))
        c.operations += 1
        c.receiving = 1
        c.receiving_pull = 1
        return
    if not hold_shrink(c):
        connection_terminate(c, CLOSE_RESOURCES, ENOMEM)
        return
    if c.bulk and c.record_layer == RECORD_LAYER_USER and not c.finishing and not (c.sated and c.socket_nonempty):
        receive_bulk(c)
        return
    sqe = uring_sqe(&c.core.uring)
    lu.io_uring_prep_recv(sqe, c.fd, NULL, c.core.receive_ring.buffer_size, 0)
    sqe.buf_group = c.core.receive_ring.group
    # Nothing was left in the socket last time: wait first instead of trying in vain. Never with kTLS, whose readiness
    # is suppressed while a KeyUpdate is unread.
    if c.record_layer != RECORD_LAYER_KERNEL and not c.socket_nonempty:
        sqe.ioprio |= lu.IORING_RECVSEND_POLL_FIRST
    lu.io_uring_sqe_set_flags(sqe, lu.IOSQE_BUFFER_SELECT)
    lu.io_uring_sqe_set_data64(sqe, operation_data(c, OPERATION_RECEIVE))
    c.operations += 1
    c.receiving = 1


cdef void receive_bulk(Connection* c) noexcept nogil:
    cdef lu.io_uring_sqe* sqe
    if c.socket_nonempty:                          # known in this turn: nothing to wait for
        receive_pieces(c)
        connection_mark(c)
        return
    sqe = uring_sqe(&c.core.uring)
    lu.io_uring_prep_poll_add(sqe, c.fd, POLLIN)
    lu.io_uring_sqe_set_data64(sqe, operation_data(c, OPERATION_RECEIVE_BULK))
    c.operations += 1
    c.receiving = 1


cdef void receive_message(Connection* c) noexcept nogil:
    """Kernel layer: reads the record that RECV answered with EIO."""
    cdef lu.io_uring_sqe* sqe
    cdef ControlMessage* message
    if c.control_receive == NULL:
        c.control_receive = pool_take(&c.core.pool, BUFFER_SMALL)
        if c.control_receive == NULL:
            connection_terminate(c, CLOSE_RESOURCES, ENOMEM)
            return
    message = <ControlMessage*>c.control_receive.data
    ktls_control_prepare_receive(message)
    sqe = uring_sqe(&c.core.uring)
    lu.io_uring_prep_recvmsg(sqe, c.fd, &message.header, 0)
    lu.io_uring_sqe_set_data64(sqe, operation_data(c, OPERATION_RECEIVE_MESSAGE))
    c.operations += 1
    c.receiving = 1


cdef bint ended(Connection* c, int32_t result) noexcept nogil:
    """Common to all receive completions: True if there is no data to look at."""
    cdef int pending = 0
    cdef unsigned int length = sizeof(pending)
    c.receiving = 0
    if c.state == CONNECTION_CLOSING:
        return True
    if result > 0:
        return False
    if result == 0:
        c.end_of_file = 1
        if c.record_layer == RECORD_LAYER_NONE:
            c.end_of_data = 1                      # without TLS there is no better end than the FIN
    elif result == -ECANCELED and c.exporting:
        pass
    elif result == -EAGAIN or result == -EINTR or result == -ENOBUFS:
        c.socket_nonempty = 1                      # armed again by the next advance
        if result == -EAGAIN:
            connection_would_block(c)
    elif result == -EIO and c.record_layer == RECORD_LAYER_KERNEL:
        c.message_pending = 1
    elif c.record_layer != RECORD_LAYER_NONE and (
            result == -EBADMSG or result == -EMSGSIZE or result == -EPROTO or result == -EINVAL):
        # The kernel's record layer reads nothing behind a bad record, and leaves the error on the socket, where it
        # would hit the alert: take it off.
        c.receive_broken = 1
        getsockopt(c.fd, SOL_SOCKET, SO_ERROR, &pending, &length)
        if c.finishing:
            connection_terminate(c, CLOSE_RECORD, -result)
        else:
            violation(c, CLOSE_RECORD, record_alert(result), -result)
    elif result == -EKEYEXPIRED:
        c.rekey_pending = 1
    else:
        connection_terminate(c, CLOSE_RESET, -result)
    return True


cdef void receive_data_done(Connection* c, int32_t result, uint8_t* data) noexcept nogil:
    """Completion of RECEIVE in the established state; ``data`` is a provided buffer that the caller recycles."""
    if ended(c, result) or c.state != CONNECTION_ESTABLISHED:
        return
    if c.discarding and c.finishing:
        return
    if c.record_layer == RECORD_LAYER_USER:
        ciphertext(c, data, <uint32_t>result)
    else:
        deliver(c, data, <uint32_t>result)


cdef int64_t receive_piece(Connection* c) noexcept nogil:
    """Receives behind the partial record that is held, which puts the end behind a full record where all are full, and opens what is whole.
    Returns the bytes received or a negative errno."""
    cdef int64_t got
    if not hold_in(c, BUFFER_BULK):
        return -ENOMEM
    if c.cipher_end >= BULK_PIECE:
        return -EAGAIN                             # whole records: what opens them comes first
    got = recv(c.fd, c.cipher.data + c.cipher_end, BULK_PIECE - c.cipher_end, MSG_DONTWAIT)
    if got <= 0:
        got = -errno if got < 0 else 0
        hold_release(c)
    else:
        c.cipher_end += <uint32_t>got
        receive_held(c)
    return got


cdef void receive_pieces(Connection* c) noexcept nogil:
    """Piece by piece into a buffer that goes round among the connections, each piece opened and taken while the cache has it. Where little comes
    ordinary receives go on."""
    cdef uint32_t share = BULK_PIECES if c.core.bulk_pieces < BULK_PIECES_TURN else BULK_PIECES_SHARE
    cdef int64_t got = 1
    c.socket_nonempty = c.bulk = 0
    while share and not c.sated and not paused(c) and not c.finishing and c.state == CONNECTION_ESTABLISHED:
        got = receive_piece(c)
        if got < BULK_COMPANY:
            break
        c.bulk = 1
        c.core.bulk_pieces += 1
        share -= 1
    c.core.company += 1 + c.bulk
    if got <= 0 and got != -EAGAIN and got != -ENOMEM:
        ended(c, <int32_t>got)


cdef void receive_bulk_done(Connection* c, int32_t result) noexcept nogil:
    """Completion of RECEIVE_BULK."""
    c.receiving = 0
    c.core.counters.bulk_receives += 1
    if result < 0:
        ended(c, result)
    elif c.sated:
        c.socket_nonempty = 1                      # stays there until the end of this turn: the service may be about to ask
    else:
        receive_pieces(c)


cdef void receive_exact_done(Connection* c, int32_t result) noexcept nogil:
    """Completion of RECEIVE_EXACT: more of the partial record that stands between us and TLS_RX."""
    if ended(c, result):
        return
    c.cipher_end += <uint32_t>result
    receive_held(c)                                # also refuses a header that announces too much


cdef void receive_message_done(Connection* c, int32_t result) noexcept nogil:
    """Completion of RECEIVE_MESSAGE."""
    cdef ControlMessage* message = <ControlMessage*>c.control_receive.data
    cdef int content_type
    if ended(c, result):
        return
    c.message_pending = 0
    content_type = ktls_control_type(message)
    if content_type < 0:
        connection_terminate(c, CLOSE_RECORD, -content_type)
        return
    if content_type == CONTENT_APPLICATION_DATA:
        deliver(c, message.data, <uint32_t>result)
    else:
        control_record(c, content_type, message.data, <uint32_t>result)
    pool_give(&c.core.pool, c.control_receive)
    c.control_receive = NULL


cdef void receive_hangup_done(Connection* c) noexcept nogil:
    """Completion of HANGUP: the peer has closed its side (or the wait was cancelled)."""
    c.receiving = 0
    c.end_of_file = 1
