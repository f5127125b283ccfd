"""Send side of a connection: what is queued, in which order it enters the output, and when the output is sent.

One SEND is in flight at most. While it is, the next batch is prepared: ``output`` is being filled, ``sending`` belongs to the kernel.
"""

from libc.errno cimport EAGAIN, EFAULT, EINPROGRESS, EINTR, EINVAL, ENOMEM
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from kdaemon_pyx cimport liburing as lu
from kdaemon_pyx.buffers cimport BUFFER_SMALL, BUFFER_TAIL, pool_give, pool_take
from kdaemon_pyx.core cimport (
    CLOSE_FILE, CLOSE_LIMIT, CLOSE_RECORD, CLOSE_RESET, CLOSE_RESOURCES, CONNECTION_CLOSING, ITEM_CONTROL, ITEM_RAW, ITEM_REKEY, OPERATION_SEND,
    OPERATION_CANCEL, OPERATION_SEND_CONTROL, RECORD_LAYER_KERNEL, RECORD_LAYER_USER, Connection, ControlMessage, Item, KeyMaterial)
from kdaemon_pyx.file_range cimport file_range_drop, file_range_fill, file_range_window
from kdaemon_pyx.ktls cimport KTLS_TX, ktls_control_prepare_send, ktls_set_keys, ktls_transmit_sequence
from kdaemon_pyx.libcrypto cimport OPENSSL_cleanse
from kdaemon_pyx.lifecycle cimport (
    EVENT_KIND_KEY_LIMIT, EVENT_KIND_REKEYED, connection_handle, connection_mark, connection_terminate, connection_would_block, event_push, event_push_keys,
    operation_data)
from kdaemon_pyx.output cimport KEY_LIMIT_MARGIN, output_capacity, output_pending, output_seal
from kdaemon_pyx.record cimport (
    CONTENT_ALERT, CONTENT_APPLICATION_DATA, CONTENT_HANDSHAKE, RECORD_HEADER, RECORD_OVERHEAD, RECORD_PLAINTEXT_MAX, record_keys_set, suite_records_max)
from kdaemon_pyx.uring cimport uring_sqe


cdef extern from "<errno.h>" nogil:
    int ECANCELED

cdef extern from "<sys/socket.h>" nogil:
    int MSG_NOSIGNAL
    int MSG_MORE
    int MSG_WAITALL
    int SHUT_WR
    int shutdown(int fd, int how)
    int getsockopt(int fd, int level, int name, void* value, unsigned int* length)

cdef extern from "<netinet/in.h>" nogil:
    int IPPROTO_TCP

cdef extern from "<linux/tcp.h>" nogil:
    struct tcp_info:
        uint64_t tcpi_bytes_acked
    int TCP_INFO


cdef enum:
    KEY_END_MARGIN = 64            # records: one send, and the alert


cdef bint transmit_idle(Connection* c) noexcept nogil:
    """Nothing is queued or in flight."""
    return (c.sending == NULL and c.file == NULL and c.items == NULL and c.control_send == NULL and not output_pending(c))


# --- items: handshake bytes, control records, new keys ------------------------------------------------------------------

cdef int transmit_item(Connection* c, uint8_t kind, uint8_t content_type, const uint8_t* data, uint32_t length) noexcept nogil:
    """Queues a copy of ``data``. 0, -ENOMEM, or -EINVAL for a control record over 16384 bytes. A control record that is too long for the
    peer becomes several."""
    cdef Item* item
    cdef uint32_t piece
    cdef int result
    if kind == ITEM_CONTROL:
        if length > RECORD_PLAINTEXT_MAX:
            return -EINVAL
        while length > c.record_content_max and c.established:
            piece = c.record_content_max
            result = transmit_item(c, kind, content_type, data, piece)
            if result < 0:
                return result
            data += piece
            length -= piece
    item = <Item*>malloc(sizeof(Item) + length)
    if item == NULL:
        return -ENOMEM
    item.next = NULL
    item.length = length
    item.sent = 0
    item.kind = kind
    item.content_type = content_type
    if length:
        memcpy(item.data, data, length)
    if c.items == NULL:
        c.items = item
    else:
        c.items_last.next = item
    c.items_last = item
    connection_mark(c)
    return 0


cdef int transmit_alert(Connection* c, uint8_t description) noexcept nogil:
    """Queues an alert record: level warning for close_notify, fatal for everything else (RFC 8446 section 6)."""
    cdef uint8_t[2] alert
    alert[0] = 1 if description == 0 else 2
    alert[1] = description
    if description:
        c.alert_sent = 1
    return transmit_item(c, ITEM_CONTROL, CONTENT_ALERT, alert, 2)


cdef void item_done(Connection* c) noexcept nogil:
    cdef Item* item = c.items
    c.items = item.next
    if item.kind == ITEM_REKEY:
        OPENSSL_cleanse(item.data, item.length)
    free(item)


cdef void rekey_transmit(Connection* c) noexcept nogil:
    """Everything before is sealed (user layer) or sent (kernel layer): the next record is under the new key, from sequence number 0."""
    cdef KeyMaterial* material = <KeyMaterial*>c.items.data
    cdef uint64_t sequence = 0
    cdef int result
    if c.record_layer == RECORD_LAYER_USER:
        result = record_keys_set(&c.transmit_keys, c.secrets.cipher_suite, material.tx_key, material.tx_iv, 0, True)
    else:
        if ktls_transmit_sequence(c.fd, c.secrets.cipher_suite, &sequence) == 0:
            c.kernel_tx_expected += (sequence - c.kernel_tx_sequence) * RECORD_OVERHEAD
        result = ktls_set_keys(c.fd, KTLS_TX, c.secrets.cipher_suite, material.tx_key, material.tx_iv, 0)
        c.kernel_tx_records = 0
        c.kernel_tx_sequence = 0
    if result == 0:
        c.key_limit_told = 0
    event_push(c.core, EVENT_KIND_REKEYED, connection_handle(c), 1, -result, NULL, 0, False)
    item_done(c)
    if result < 0:
        connection_terminate(c, CLOSE_RESOURCES, -result)


cdef bint items_into_output(Connection* c) noexcept nogil:
    """Moves queued items behind the output. False: the first one has to wait for what is before it."""
    cdef Item* item
    cdef KeyMaterial* material
    cdef const uint8_t* data
    cdef uint8_t content_type
    cdef uint32_t piece, length
    while c.items != NULL:
        item = c.items
        if c.record_layer == RECORD_LAYER_KERNEL and item.kind != ITEM_RAW:
            if not kernel_item_sent(c):
                return False
            continue
        if c.output == NULL:
            c.output = pool_take(&c.core.pool, BUFFER_SMALL)
            if c.output == NULL:
                connection_terminate(c, CLOSE_RESOURCES, ENOMEM)
                return False
            c.output_length = 0
            c.record_length = 0
        if item.kind == ITEM_RAW:
            piece = output_capacity(c.output) - c.output_length
            if piece > item.length - item.sent:
                piece = item.length - item.sent
            memcpy(c.output.data + c.output_length, item.data + item.sent, piece)
            c.output_length += piece
            item.sent += piece
            if item.sent < item.length:
                return False
        else:
            if c.record_length and output_seal(c, CONTENT_APPLICATION_DATA) < 0:
                return False
            content_type, data, length = item.content_type, item.data, item.length
            if item.kind == ITEM_REKEY:
                material = <KeyMaterial*>item.data
                content_type, data, length = CONTENT_HANDSHAKE, material.attached, material.attached_length
            if length:
                if c.output_length + RECORD_OVERHEAD + length > output_capacity(c.output):
                    return False
                memcpy(c.output.data + c.output_length + RECORD_HEADER, data, length)
                c.record_length = length
                if output_seal(c, content_type) < 0:
                    return False
            if item.kind == ITEM_REKEY:
                rekey_transmit(c)
                if c.state == CONNECTION_CLOSING:
                    return False
                continue
        item_done(c)
    return True


cdef bint kernel_item_sent(Connection* c) noexcept nogil:
    """Kernel layer: the first item leaves as a record of its type, between two sends. False: it, or its completion, is to be waited for."""
    cdef Item* item = c.items
    cdef KeyMaterial* material
    if c.sending != NULL or c.control_send != NULL:
        return False
    if item.kind == ITEM_REKEY and item.sent:
        rekey_transmit(c)                          # the output that came behind the KeyUpdate waits for this key
        return c.state != CONNECTION_CLOSING
    if output_pending(c):
        return False
    if item.kind == ITEM_CONTROL:
        if send_control(c, item.content_type, item.data, item.length):
            item_done(c)
        return False
    item.sent = 1
    material = <KeyMaterial*>item.data
    if material.attached_length:
        send_control(c, CONTENT_HANDSHAKE, material.attached, material.attached_length)
        return False
    return True


cdef bint send_control(Connection* c, uint8_t content_type, const uint8_t* data, uint32_t length) noexcept nogil:
    """Kernel layer: SENDMSG of one record. False without a buffer (the connection is closing)."""
    cdef ControlMessage* message
    c.control_send = pool_take(&c.core.pool, BUFFER_SMALL)
    if c.control_send == NULL:
        connection_terminate(c, CLOSE_RESOURCES, ENOMEM)
        return False
    message = <ControlMessage*>c.control_send.data
    c.kernel_tx_expected += length
    memcpy(message.data, data, length)
    ktls_control_prepare_send(message, content_type, length)
    c.kernel_tx_records += 1
    submit_control(c)
    return True


cdef void submit_control(Connection* c) noexcept nogil:
    cdef ControlMessage* message = <ControlMessage*>c.control_send.data
    cdef lu.io_uring_sqe* sqe = uring_sqe(&c.core.uring)
    lu.io_uring_prep_sendmsg(sqe, c.fd, &message.header, MSG_NOSIGNAL)
    lu.io_uring_sqe_set_data64(sqe, operation_data(c, OPERATION_SEND_CONTROL))
    c.operations += 1
    c.send_deadline_ns = c.core.now_ns + c.core.deadlines.send_ns


cdef void transmit_control_done(Connection* c, int32_t result) noexcept nogil:
    """Completion of SEND_CONTROL. The kernel takes a control record whole or not at all."""
    cdef ControlMessage* message
    if c.state == CONNECTION_CLOSING:
        return
    if result == -EAGAIN or result == -EINTR:
        if result == -EINTR or connection_would_block(c):
            submit_control(c)
        return
    message = <ControlMessage*>c.control_send.data
    if result < 0:
        connection_terminate(c, CLOSE_RESET, -result)
        return
    if <size_t>result != message.vector.iov_len:
        connection_terminate(c, CLOSE_RECORD, 0)
        return
    pool_give(&c.core.pool, c.control_send)
    c.control_send = NULL
    c.send_deadline_ns = 0


# --- the pump -----------------------------------------------------------------------------------------------------------

cdef void prepare_both(Connection* c, lu.io_uring_sqe* sqe, int flags) noexcept nogil:
    """One message of what is in flight and of the window. It stands in the room that every buffer has behind its capacity."""
    cdef lu.msghdr* header = <lu.msghdr*>(c.sending.data + c.sending.capacity - BUFFER_TAIL)
    cdef lu.iovec* vectors = <lu.iovec*>(header + 1)
    memset(header, 0, sizeof(lu.msghdr))
    vectors[0].iov_base = c.sending.data + c.sending_start
    vectors[0].iov_len = c.sending_length - c.sending_start
    vectors[1].iov_base = c.window.data
    vectors[1].iov_len = c.window.capacity
    header.msg_iov = vectors
    header.msg_iovlen = 2
    lu.io_uring_prep_sendmsg(sqe, c.fd, header, flags)


cdef void submit_send(Connection* c) noexcept nogil:
    cdef lu.io_uring_sqe* sqe = uring_sqe(&c.core.uring)
    cdef int flags = MSG_NOSIGNAL
    if c.record_layer != RECORD_LAYER_KERNEL:
        flags |= MSG_WAITALL                       # the kernel retries short sends itself; kTLS sockets refuse the flag
    elif c.file_remaining and c.memory == NULL:
        flags |= MSG_MORE                          # the batch's last record is filled up by the next batch; not of memory, which may be wanted back
    if c.window_behind:
        prepare_both(c, sqe, flags)
    else:
        lu.io_uring_prep_send(sqe, c.fd, c.sending.data + c.sending_start, c.sending_length - c.sending_start, flags)
    lu.io_uring_sqe_set_data64(sqe, operation_data(c, OPERATION_SEND))
    c.operations += 1
    c.send_deadline_ns = c.core.now_ns + c.core.deadlines.send_ns


cdef void count_records(Connection* c, uint32_t length) noexcept nogil:
    """Kernel layer: an upper bound of the records under this key. Few left: the control thread is told; none: the connection ends."""
    c.kernel_tx_records += (length + c.record_content_max - 1) // c.record_content_max
    if c.kernel_tx_records + KEY_LIMIT_MARGIN < suite_records_max(c.secrets.cipher_suite):
        return
    if not c.key_limit_told and c.core.ktls_rekey:
        c.key_limit_told = 1
        event_push_keys(c, EVENT_KIND_KEY_LIMIT, 1, NULL, 0)
    if c.kernel_tx_records >= suite_records_max(c.secrets.cipher_suite):
        connection_terminate(c, CLOSE_LIMIT, 0)
    elif c.kernel_tx_records + KEY_END_MARGIN >= suite_records_max(c.secrets.cipher_suite) and not c.finishing:
        # No new key came, or this kernel takes none: what is in flight is the last, then close_notify.
        if c.sending == &c.window or c.window_behind:
            c.file_remaining = 0                   # its completion lets go of the file
        elif c.file != NULL:
            file_range_drop(c)
        c.discarding = 1
        c.finishing = 1
        c.close_reason = CLOSE_LIMIT
        connection_mark(c)


cdef void send_output(Connection* c) noexcept nogil:
    """Gives the output to the kernel."""
    if c.record_length and output_seal(c, CONTENT_APPLICATION_DATA) < 0:
        return
    if c.record_layer == RECORD_LAYER_KERNEL:
        count_records(c, c.output_length)
        if c.state == CONNECTION_CLOSING:
            return
    c.sending = c.output
    c.sending_start = 0
    c.sending_length = c.output_length
    c.output = NULL
    c.output_length = 0
    c.output_full = 0
    submit_send(c)


cdef bint send_window(Connection* c) noexcept nogil:
    """Kernel layer, mapped file: sends the next window, or reads the next batch. False: wait for a completion."""
    if c.sending != NULL or c.control_send != NULL:
        return False
    if not file_range_window(c):
        if c.state == CONNECTION_CLOSING:
            return False
        file_range_fill(c)
        return not c.file_reading and c.state != CONNECTION_CLOSING
    c.sending = &c.window
    c.sending_start = 0
    c.sending_length = c.window.capacity
    if output_pending(c):                          # the head, and the first bytes of the file: in one record
        c.sending = c.output
        c.sending_length = c.output_length
        c.output = NULL
        c.output_length = 0
        c.window_behind = 1
    count_records(c, c.window.capacity + (c.sending_length if c.window_behind else 0))
    if c.state == CONNECTION_CLOSING:
        return False
    submit_send(c)
    return False


cdef void transmit_pump(Connection* c) noexcept nogil:
    """Fills the output from items and file, and sends it when nothing is in flight."""
    while c.state != CONNECTION_CLOSING:
        if c.file_reading:
            return                                 # the output belongs to the READV
        # (In the kernel layer a control record needs a gap between two sends: nothing is read ahead then.)
        if (c.file_remaining and not c.output_full and (c.sending == NULL or c.output == NULL)
                and (c.items == NULL or c.record_layer == RECORD_LAYER_USER)):
            if c.record_layer == RECORD_LAYER_KERNEL and c.file.mapping != NULL:
                if not send_window(c):
                    return
                continue
            file_range_fill(c)
            if c.file_reading or c.state == CONNECTION_CLOSING:
                return
        if c.items != NULL and (c.file == NULL or c.output_full or c.sending == NULL):
            items_into_output(c)
            if c.state == CONNECTION_CLOSING:
                return
            if c.items == NULL and c.file_remaining and c.output == NULL:
                continue                           # the file waited for them
        if c.sending != NULL or c.control_send != NULL or not output_pending(c):
            return
        if c.finishing == 1 and c.file == NULL and c.established:
            return                                 # close_notify joins these bytes
        send_output(c)


cdef void transmit_send_done(Connection* c, int32_t result) noexcept nogil:
    """Completion of SEND."""
    if c.state == CONNECTION_CLOSING:
        return
    if c.memory_cancelled and (c.sending == &c.window or c.window_behind) and (result == -ECANCELED or result == -EAGAIN or result == -EINTR):
        result = 0
    if result == -EAGAIN or result == -EINTR:
        if result == -EINTR or connection_would_block(c):
            submit_send(c)
        return
    if result < 0:
        connection_terminate(c, CLOSE_FILE if result == -EFAULT else CLOSE_RESET, -result)
        return
    c.sending_start += <uint32_t>result
    c.kernel_tx_expected += <uint32_t>result      # means something in the kernel layer alone
    if c.window_behind and c.sending_start >= c.sending_length:
        c.sending_start -= c.sending_length
        c.sending_length = c.window.capacity
        c.window_behind = 0
        pool_give(&c.core.pool, c.sending)
        c.sending = &c.window
    elif c.window_behind and c.memory_cancelled:   # what is before the memory leaves all the same
        c.window_behind = 0
        c.memory_sent = c.file_offset - c.window.capacity
        file_range_drop(c)
    if c.sending_start < c.sending_length and not (c.memory_cancelled and c.sending == &c.window):
        submit_send(c)
        return
    if c.sending == &c.window:
        c.memory_sent = c.file_offset - (c.sending_length - c.sending_start)
        if c.file_remaining == 0:
            file_range_drop(c)                     # nothing reads the mapping any more
    else:
        pool_give(&c.core.pool, c.sending)
    c.sending = NULL
    c.send_deadline_ns = 0


cdef int64_t transmit_memory_cancel(Connection* c) noexcept nogil:
    """The service wants its memory back. The bytes of it that are on their way in any case; or -EINPROGRESS: the kernel still reads it, on_sent
    tells when it does not any more."""
    cdef lu.io_uring_sqe* sqe
    if c.memory == NULL:
        return <int64_t>c.memory_sent
    c.file_remaining = 0
    if c.sending != &c.window and not c.window_behind:
        file_range_drop(c)
        c.output_full = 0
        connection_mark(c)
        return <int64_t>c.memory_sent
    if not c.memory_cancelled:
        c.memory_cancelled = 1
        sqe = uring_sqe(&c.core.uring)
        lu.io_uring_prep_cancel64(sqe, operation_data(c, OPERATION_SEND), 0)
        lu.io_uring_sqe_set_data64(sqe, operation_data(c, OPERATION_CANCEL))
        c.operations += 1
    return -EINPROGRESS


cdef void transmit_discard(Connection* c) noexcept nogil:
    """Drops what is not in flight yet: the file range and plaintext that nobody will get. Sealed records stay, their numbers are used."""
    if c.sending == &c.window or c.window_behind:
        c.file_remaining = 0                       # the SEND reads the mapping: its completion lets go of the file
    elif c.file != NULL and not c.file_reading:
        file_range_drop(c)
    c.record_length = 0
    c.output_full = 0
    if c.record_layer != RECORD_LAYER_USER:
        c.output_length = 0


cdef void transmit_shutdown(Connection* c) noexcept nogil:
    """FIN behind everything sent. A system call, because IORING_OP_SHUTDOWN always goes through a worker thread of the kernel, and
    this one does not block. ENOTCONN (the peer was faster) changes nothing: the receive side sees the end."""
    shutdown(c.fd, SHUT_WR)


cdef bint transmit_progressed(Connection* c) noexcept nogil:
    """The send deadline passed: has the peer acknowledged anything since it was looked at last? (A batch may take a slow reader longer.)"""
    cdef tcp_info information
    cdef unsigned int length = sizeof(information)
    information.tcpi_bytes_acked = 0
    if getsockopt(c.fd, IPPROTO_TCP, TCP_INFO, &information, &length) < 0:
        return False
    if c.send_progress == information.tcpi_bytes_acked:
        return False
    c.send_progress = information.tcpi_bytes_acked
    c.send_deadline_ns = c.core.now_ns + c.core.deadlines.send_ns
    return True
