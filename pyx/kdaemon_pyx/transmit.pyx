"""Send side of a connection.

One SEND is in flight at most. While it is, the next batch is prepared: ``output`` is being filled, ``sending`` belongs to the kernel.

User record layer: plaintext is written where it is encrypted in place. ``output`` holds ``output_length`` sealed bytes and behind them one open
record with ``record_length`` bytes of plaintext. A record is sealed exactly once, and its ciphertext is kept until all of it is sent.
Kernel record layer, and handshake bytes: ``output`` holds what is sent as it is.

A file goes in batches of up to eight full records: preadv2(RWF_NOWAIT) into the buffer, and IORING_OP_READV when that would block. Size, mtime and
ctime are compared with those of the ``File`` after the last byte is read and before it is submitted.
"""

from libc.errno cimport EAGAIN, EBUSY, EINTR, EINVAL, ENOMEM
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from kdaemon_pyx cimport liburing as lu
from kdaemon_pyx.buffers cimport BUFFER_LARGE, BUFFER_SMALL, BUFFER_SMALL_SIZE, BUFFER_TAIL, Buffer, pool_give, pool_take
from kdaemon_pyx.core cimport (
    CLOSE_FILE, CLOSE_LIMIT, CLOSE_RECORD, CLOSE_RESET, CLOSE_RESOURCES, CONNECTION_CLOSING, ITEM_CONTROL, ITEM_RAW, ITEM_REKEY,
    OPERATION_FILE_READ, OPERATION_SEND, OPERATION_SEND_CONTROL, OPERATION_SHUTDOWN, RECORD_LAYER_KERNEL, RECORD_LAYER_USER, Connection,
    ControlMessage, File, Item, KeyMaterial)
from kdaemon_pyx.ktls cimport KTLS_TX, ktls_control_prepare_send, ktls_set_keys
from kdaemon_pyx.libcrypto cimport OPENSSL_cleanse
from kdaemon_pyx.lifecycle cimport (
    EVENT_KIND_KEY_LIMIT, EVENT_KIND_REKEYED, connection_handle, connection_mark, connection_terminate, event_push,
    event_push_keys, file_release,
    operation_data)
from kdaemon_pyx.record cimport (
    CONTENT_ALERT, CONTENT_APPLICATION_DATA, RECORD_HEADER, RECORD_OVERHEAD, RECORD_PLAINTEXT_MAX, record_keys_set, record_seal,
    suite_records_max)
from kdaemon_pyx.uring cimport uring_sqe


cdef extern from "<sys/uio.h>" nogil:
    int64_t preadv2(int fd, const lu.iovec* vectors, int count, int64_t offset, int flags)
    int RWF_NOWAIT

cdef extern from "<sys/stat.h>" nogil:
    struct timespec:
        int64_t tv_sec
        long tv_nsec
    struct stat_ "stat":
        int64_t st_size
        timespec st_mtim
        timespec st_ctim
    int fstat(int fd, stat_* status)

cdef extern from "<sys/socket.h>" nogil:
    int MSG_NOSIGNAL
    int MSG_MORE
    int MSG_WAITALL
    int SHUT_WR
    int getsockopt(int fd, int level, int name, void* value, unsigned int* length)

cdef extern from "<netinet/in.h>" nogil:
    int IPPROTO_TCP

cdef extern from "<linux/tcp.h>" nogil:
    struct tcp_info:
        uint64_t tcpi_bytes_acked
    int TCP_INFO

cdef enum:
    FILE_VECTORS_MAX = 10
    RECORD_TRAILER = 17            # inner content type and tag
    # Records left under a key when the control thread is asked for a KeyUpdate: enough for what goes out until it answers.
    KEY_LIMIT_MARGIN = 65536


cdef inline uint32_t output_capacity(const Buffer* buffer) noexcept nogil:
    return buffer.capacity - BUFFER_TAIL


cdef inline bint output_pending(Connection* c) noexcept nogil:
    return c.output != NULL and (c.output_length != 0 or c.record_length != 0)


cdef bint transmit_idle(Connection* c) noexcept nogil:
    """Nothing is queued or in flight."""
    return (c.sending == NULL and c.file == NULL and c.items == NULL and c.control_send == NULL and not output_pending(c))


# --- plaintext of the service ---------------------------------------------------------------------------------------

cdef int seal_open_record(Connection* c, uint8_t content_type) noexcept nogil:
    """User layer: closes the open record. 0, or a negative errno after which the connection is closing."""
    cdef int64_t sealed
    if c.transmit_keys.sequence + KEY_LIMIT_MARGIN >= c.transmit_keys.sequence_max and not c.key_limit_told:
        c.key_limit_told = 1
        event_push_keys(c, EVENT_KIND_KEY_LIMIT, 1, NULL, 0)
    sealed = record_seal(&c.transmit_keys, content_type, c.output.data + c.output_length, c.record_length)
    if sealed < 0:
        connection_terminate(c, CLOSE_LIMIT, <int32_t>-sealed)
        return <int>sealed
    if content_type == CONTENT_APPLICATION_DATA:
        c.core.counters.bytes_out += c.record_length
    c.output_length += <uint32_t>sealed
    c.record_length = 0
    return 0


cdef uint8_t* transmit_reserve(Connection* c, uint32_t length) noexcept nogil:
    """Room for ``length`` (at most 16384) bytes, or NULL."""
    cdef uint32_t used
    if c.file != NULL or c.finishing or length > RECORD_PLAINTEXT_MAX or c.state == CONNECTION_CLOSING:
        return NULL
    if c.output == NULL:
        c.output = pool_take(&c.core.pool, BUFFER_SMALL)
        if c.output == NULL:
            return NULL
        c.output_length = 0
        c.record_length = 0
    if c.record_layer != RECORD_LAYER_USER:
        if c.output_length + length > output_capacity(c.output):
            return NULL
        return c.output.data + c.output_length
    used = c.output_length + RECORD_HEADER + c.record_length
    if c.record_length + length > RECORD_PLAINTEXT_MAX:
        if used + RECORD_TRAILER + RECORD_HEADER + length + RECORD_TRAILER > output_capacity(c.output):
            return NULL
        if seal_open_record(c, CONTENT_APPLICATION_DATA) < 0:
            return NULL
        used = c.output_length + RECORD_HEADER
    if used + length + RECORD_TRAILER > output_capacity(c.output):
        return NULL
    return c.output.data + used


cdef void transmit_commit(Connection* c, uint32_t length) noexcept nogil:
    if c.record_layer == RECORD_LAYER_USER:
        c.record_length += length
    else:
        c.output_length += length
        c.core.counters.bytes_out += length
    c.sent_pending = 1
    connection_mark(c)


cdef uint32_t transmit_room(Connection* c) noexcept nogil:
    """Bytes that one transmit_reserve() can get now."""
    cdef uint32_t used, room
    if c.file != NULL or c.finishing or c.state == CONNECTION_CLOSING:
        return 0
    if c.output == NULL:
        return RECORD_PLAINTEXT_MAX
    used = c.output_length
    if c.record_layer == RECORD_LAYER_USER:
        used += RECORD_OVERHEAD + c.record_length
        if c.record_length == RECORD_PLAINTEXT_MAX:
            used += RECORD_OVERHEAD
    room = output_capacity(c.output) - used if used < output_capacity(c.output) else 0
    if c.record_layer == RECORD_LAYER_USER and c.record_length < RECORD_PLAINTEXT_MAX and room > RECORD_PLAINTEXT_MAX - c.record_length:
        return RECORD_PLAINTEXT_MAX - c.record_length
    return room if room < RECORD_PLAINTEXT_MAX else RECORD_PLAINTEXT_MAX


# --- the file range -------------------------------------------------------------------------------------------------

cdef int transmit_file(Connection* c, File* file, uint64_t offset, uint64_t length) noexcept nogil:
    """0, -EBUSY if a range is queued already, -EINVAL beyond the file's size. Counts one reference of its own."""
    if c.file != NULL or c.finishing or c.state == CONNECTION_CLOSING:
        return -EBUSY
    if length > file.size or offset > file.size - length:
        return -EINVAL
    c.sent_pending = 1
    connection_mark(c)
    if length == 0:
        return 0
    file.references += 1
    c.file = file
    c.file_offset = offset
    c.file_remaining = length
    return 0


cdef void file_done(Connection* c) noexcept nogil:
    cdef File* file = c.file
    c.file = NULL
    c.file_remaining = 0
    file_release(file)


cdef bint file_unchanged(const File* file) noexcept nogil:
    cdef stat_ status
    if fstat(file.fd, &status) < 0:
        return False
    return (<uint64_t>status.st_size == file.size
            and status.st_mtim.tv_sec == file.mtime_s and <uint32_t>status.st_mtim.tv_nsec == file.mtime_ns
            and status.st_ctim.tv_sec == file.ctime_s and <uint32_t>status.st_ctim.tv_nsec == file.ctime_ns)


cdef int output_for_file(Connection* c) noexcept nogil:
    """A buffer that fits what is left of the file, keeping what is committed already. 0 or -ENOMEM."""
    cdef Buffer* large = NULL
    cdef uint32_t held = c.output_length
    if c.output != NULL and c.record_layer == RECORD_LAYER_USER and c.record_length:
        held += RECORD_HEADER + c.record_length
    if c.output == NULL:
        c.output_length = 0
        c.record_length = 0
        held = 0
    if c.output == NULL or c.output.capacity == BUFFER_SMALL_SIZE:
        if held + c.file_remaining + 2 * RECORD_OVERHEAD > BUFFER_SMALL_SIZE - BUFFER_TAIL:
            large = pool_take(&c.core.pool, BUFFER_LARGE)
    if large != NULL:
        if c.output != NULL:
            memcpy(large.data, c.output.data, held)
            pool_give(&c.core.pool, c.output)
        c.output = large
    elif c.output == NULL:
        c.output = pool_take(&c.core.pool, BUFFER_SMALL)
        if c.output == NULL:
            return -ENOMEM
    return 0


cdef uint32_t file_vectors(Connection* c, lu.iovec* vectors, uint32_t* total) noexcept nogil:
    """Where the next bytes of the file go in ``output``: a piece per record. The number of pieces; their sum in ``total``."""
    cdef uint32_t capacity = output_capacity(c.output)
    cdef uint32_t count = 0
    cdef uint32_t position = c.output_length
    cdef uint32_t filled = c.record_length
    cdef uint64_t left = c.file_remaining
    cdef uint64_t piece
    total[0] = 0
    if c.record_layer != RECORD_LAYER_USER:
        piece = capacity - c.output_length
        # Whole records: the kernel cuts at 16384 bytes, too.
        if left > piece:
            piece = (piece + c.output_length) // RECORD_PLAINTEXT_MAX * RECORD_PLAINTEXT_MAX - c.output_length
        if piece > left:
            piece = left
        vectors[0].iov_base = c.output.data + c.output_length
        vectors[0].iov_len = piece
        total[0] = <uint32_t>piece
        return 1
    while left and count < FILE_VECTORS_MAX:
        if position + RECORD_OVERHEAD + filled >= capacity:
            break
        piece = capacity - position - RECORD_OVERHEAD - filled
        if piece > RECORD_PLAINTEXT_MAX - filled:
            piece = RECORD_PLAINTEXT_MAX - filled
        if piece > left:
            piece = left
        elif filled + piece < RECORD_PLAINTEXT_MAX and count > 0:
            break                                  # no small record in the middle of a file
        if piece:
            vectors[count].iov_base = c.output.data + position + RECORD_HEADER + filled
            vectors[count].iov_len = piece
            count += 1
            total[0] += <uint32_t>piece
            left -= piece
        position += RECORD_OVERHEAD + filled + <uint32_t>piece
        filled = 0
    return count


cdef void file_bytes_read(Connection* c, uint32_t length) noexcept nogil:
    """``length`` bytes lie where file_vectors() said: close the full records; check the file behind its last byte."""
    cdef uint32_t left = length
    cdef uint32_t piece, capacity = output_capacity(c.output)
    c.file_offset += length
    c.file_remaining -= length
    c.output_full = 1
    if c.record_layer == RECORD_LAYER_USER:
        while left:
            piece = RECORD_PLAINTEXT_MAX - c.record_length
            if piece > capacity - c.output_length - RECORD_OVERHEAD - c.record_length:
                piece = capacity - c.output_length - RECORD_OVERHEAD - c.record_length
            if piece > left:
                piece = left
            c.record_length += piece
            left -= piece
            if left and seal_open_record(c, CONTENT_APPLICATION_DATA) < 0:
                return
    else:
        c.output_length += length
        c.core.counters.bytes_out += length
    if c.file_remaining == 0:
        if not file_unchanged(c.file):
            connection_terminate(c, CLOSE_FILE, 0)
            return
        file_done(c)


cdef void file_fill(Connection* c) noexcept nogil:
    """Reads the next batch into ``output``; may leave a READV outstanding."""
    cdef lu.iovec[10] vectors
    cdef lu.iovec* kept
    cdef uint32_t count, total
    cdef int64_t result
    cdef lu.io_uring_sqe* sqe
    if output_for_file(c) < 0:
        connection_terminate(c, CLOSE_RESOURCES, ENOMEM)
        return
    count = file_vectors(c, vectors, &total)
    if total == 0:
        c.output_full = 1                          # what is committed fills it: send that first
        return
    result = preadv2(c.file.fd, vectors, <int>count, <int64_t>c.file_offset, RWF_NOWAIT)
    if result > 0:
        file_bytes_read(c, <uint32_t>result)
        return
    if result == 0:
        connection_terminate(c, CLOSE_FILE, 0)     # shorter than it was
        return
    # EAGAIN: not in the page cache. EOPNOTSUPP: this file system cannot say. Anything else comes back from the READV.
    kept = <lu.iovec*>(c.output.data + c.output.capacity - BUFFER_TAIL)
    memcpy(kept, vectors, count * sizeof(lu.iovec))
    sqe = uring_sqe(&c.core.uring)
    lu.io_uring_prep_readv(sqe, c.file.fd, kept, count, c.file_offset)
    lu.io_uring_sqe_set_data64(sqe, operation_data(c, OPERATION_FILE_READ))
    c.file_read_length = total
    c.file_reading = 1
    c.operations += 1


cdef void transmit_file_read_done(Connection* c, int32_t result) noexcept nogil:
    """Completion of FILE_READ."""
    c.file_reading = 0
    if c.state == CONNECTION_CLOSING:
        return
    if result == -EAGAIN or result == -EINTR:
        return                                     # the pump reads again
    if result <= 0 or <uint32_t>result > c.file_read_length:
        connection_terminate(c, CLOSE_FILE, -result)
        return
    file_bytes_read(c, <uint32_t>result)


# --- items: handshake bytes, control records, new keys ------------------------------------------------------------------

cdef int transmit_item(Connection* c, uint8_t kind, uint8_t content_type, const uint8_t* data, uint32_t length) noexcept nogil:
    """Queues a copy of ``data``. 0, -ENOMEM, or -EINVAL for a control record over 16384 bytes."""
    cdef Item* item
    if kind == ITEM_CONTROL and length > RECORD_PLAINTEXT_MAX:
        return -EINVAL
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
    cdef int result
    if c.record_layer == RECORD_LAYER_USER:
        result = record_keys_set(&c.transmit_keys, c.secrets.cipher_suite, material.tx_key, material.tx_iv, 0, True)
    else:
        result = ktls_set_keys(c.fd, KTLS_TX, c.secrets.cipher_suite, material.tx_key, material.tx_iv, 0)
        c.kernel_tx_records = 0
    if result == 0:
        memcpy(c.secrets.tx, material.secrets.tx, sizeof(c.secrets.tx))
        c.key_limit_told = 0
    event_push(c.core, EVENT_KIND_REKEYED, connection_handle(c), 1, -result, NULL, 0, False)
    item_done(c)
    if result < 0:
        connection_terminate(c, CLOSE_RESOURCES, -result)


cdef bint items_into_output(Connection* c) noexcept nogil:
    """Moves queued items behind the output. False: the first one has to wait for what is before it."""
    cdef Item* item
    cdef uint32_t piece
    while c.items != NULL:
        item = c.items
        if item.kind == ITEM_REKEY:
            if c.record_layer == RECORD_LAYER_KERNEL and (c.sending != NULL or c.control_send != NULL or output_pending(c)):
                return False
            if c.record_length and seal_open_record(c, CONTENT_APPLICATION_DATA) < 0:
                return False
            rekey_transmit(c)
            if c.state == CONNECTION_CLOSING:
                return False
            continue
        if item.kind == ITEM_CONTROL and c.record_layer == RECORD_LAYER_KERNEL:
            if c.sending != NULL or c.control_send != NULL or output_pending(c):
                return False
            if not send_control(c):
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
            if c.record_length and seal_open_record(c, CONTENT_APPLICATION_DATA) < 0:
                return False
            if c.output_length + RECORD_OVERHEAD + item.length > output_capacity(c.output):
                return False
            memcpy(c.output.data + c.output_length + RECORD_HEADER, item.data, item.length)
            c.record_length = item.length
            if seal_open_record(c, item.content_type) < 0:
                return False
        item_done(c)
    return True


cdef bint send_control(Connection* c) noexcept nogil:
    """Kernel layer: SENDMSG of the first item as one record of its type. False without a buffer (the connection is closing)."""
    cdef ControlMessage* message
    c.control_send = pool_take(&c.core.pool, BUFFER_SMALL)
    if c.control_send == NULL:
        connection_terminate(c, CLOSE_RESOURCES, ENOMEM)
        return False
    message = <ControlMessage*>c.control_send.data
    memcpy(message.data, c.items.data, c.items.length)
    ktls_control_prepare_send(message, c.items.content_type, c.items.length)
    item_done(c)
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

cdef void submit_send(Connection* c) noexcept nogil:
    cdef lu.io_uring_sqe* sqe = uring_sqe(&c.core.uring)
    cdef int flags = MSG_NOSIGNAL
    if c.record_layer != RECORD_LAYER_KERNEL:
        flags |= MSG_WAITALL                       # the kernel retries short sends itself; kTLS sockets refuse the flag
    elif c.file_remaining:
        flags |= MSG_MORE                          # the batch's last record is filled up by the next batch
    lu.io_uring_prep_send(sqe, c.fd, c.sending.data + c.sending_start, c.sending_length - c.sending_start, flags)
    lu.io_uring_sqe_set_data64(sqe, operation_data(c, OPERATION_SEND))
    c.operations += 1
    c.send_deadline_ns = c.core.now_ns + c.core.deadlines.send_ns


cdef void send_output(Connection* c) noexcept nogil:
    """Gives the output to the kernel."""
    if c.record_length and seal_open_record(c, CONTENT_APPLICATION_DATA) < 0:
        return
    if c.record_layer == RECORD_LAYER_KERNEL:
        c.kernel_tx_records += (c.output_length + RECORD_PLAINTEXT_MAX - 1) // RECORD_PLAINTEXT_MAX
        if c.kernel_tx_records + KEY_LIMIT_MARGIN >= suite_records_max(c.secrets.cipher_suite):
            if not c.key_limit_told:
                c.key_limit_told = 1
                event_push_keys(c, EVENT_KIND_KEY_LIMIT, 1, NULL, 0)
            if c.kernel_tx_records >= suite_records_max(c.secrets.cipher_suite):
                connection_terminate(c, CLOSE_LIMIT, 0)
                return
    c.sending = c.output
    c.sending_start = 0
    c.sending_length = c.output_length
    c.output = NULL
    c.output_length = 0
    c.output_full = 0
    submit_send(c)


cdef void transmit_pump(Connection* c) noexcept nogil:
    """Fills the output from items and file, and sends it when nothing is in flight."""
    while c.state != CONNECTION_CLOSING:
        if c.file_reading:
            return                                 # the output belongs to the READV
        # (In the kernel layer a control record needs a gap between two sends: nothing is read ahead then.)
        if (c.file != NULL and not c.output_full and (c.sending == NULL or c.output == NULL)
                and (c.items == NULL or c.record_layer == RECORD_LAYER_USER)):
            file_fill(c)
            if c.file_reading or c.state == CONNECTION_CLOSING:
                return
        if c.items != NULL and (c.file == NULL or c.output_full or c.sending == NULL):
            items_into_output(c)
            if c.state == CONNECTION_CLOSING:
                return
        if c.sending != NULL or c.control_send != NULL or not output_pending(c):
            return
        if c.finishing == 1 and c.file == NULL and c.established:
            return                                 # close_notify joins these bytes
        send_output(c)


cdef void transmit_send_done(Connection* c, int32_t result) noexcept nogil:
    """Completion of SEND."""
    if c.state == CONNECTION_CLOSING:
        return
    if result == -EAGAIN or result == -EINTR:
        submit_send(c)
        return
    if result < 0:
        connection_terminate(c, CLOSE_RESET, -result)
        return
    c.sending_start += <uint32_t>result
    if c.sending_start < c.sending_length:
        submit_send(c)
        return
    pool_give(&c.core.pool, c.sending)
    c.sending = NULL
    c.send_deadline_ns = 0


cdef void transmit_discard(Connection* c) noexcept nogil:
    """Drops what is not in flight yet: the file range and plaintext that nobody will get. Sealed records stay, their numbers are used."""
    if c.file != NULL and not c.file_reading:
        file_done(c)
    c.record_length = 0
    c.output_full = 0
    if c.record_layer == RECORD_LAYER_KERNEL:
        c.output_length = 0


cdef void transmit_shutdown(Connection* c) noexcept nogil:
    """FIN behind everything sent."""
    cdef lu.io_uring_sqe* sqe = uring_sqe(&c.core.uring)
    lu.io_uring_prep_shutdown(sqe, c.fd, SHUT_WR)
    lu.io_uring_sqe_set_data64(sqe, operation_data(c, OPERATION_SHUTDOWN))
    c.operations += 1


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
