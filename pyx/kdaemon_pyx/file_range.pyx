"""A file range on its way into the output buffer.

Batches of up to eight full records: preadv2(RWF_NOWAIT) into the buffer, and IORING_OP_READV when that would block. Size, mtime and ctime are
compared with those of the ``File`` after the last byte is read and before it is submitted; a short file closes the connection.

Kernel record layer: what is left of a long range goes from the file's mapping, a window at a time, as far as mincore() says that its pages are in
the page cache (a SEND from others blocks io_uring_enter itself), and never from the page that contains the end of the file: a file cut short there
reads as zeros. Files about which mincore() does not tell the truth have no mapping (representation.pyx); they are read.
"""

from libc.errno cimport EAGAIN, EBUSY, EINTR, EINVAL, ENOMEM
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from kdaemon_pyx cimport liburing as lu
from kdaemon_pyx.buffers cimport BUFFER_BULK, BUFFER_LARGE, BUFFER_LARGE_SIZE, BUFFER_SMALL, BUFFER_SMALL_SIZE, BUFFER_TAIL, Buffer, pool_give, pool_take
from kdaemon_pyx.core cimport (
    CLOSE_FILE, CLOSE_RESOURCES, CONNECTION_CLOSING, OPERATION_FILE_READ, RECORD_LAYER_USER, Connection, File)
from kdaemon_pyx.lifecycle cimport connection_mark, connection_terminate, file_release, operation_data
from kdaemon_pyx.output cimport output_capacity, output_cut, output_fit, output_limited, output_seal, output_seal_from
from kdaemon_pyx.record cimport CONTENT_APPLICATION_DATA, RECORD_HEADER, RECORD_OVERHEAD, RECORD_PLAINTEXT_MAX
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
        uint64_t st_nlink
    int fstat(int fd, stat_* status)

cdef extern from "<sys/mman.h>" nogil:
    int mincore(void* address, size_t length, unsigned char* pages)

cdef enum:
    FILE_VECTORS_MAX = 10
    PAGE = 4096
    WINDOW = 524288
    WINDOW_MIN = 65536             # less is not worth a send of its own


cdef int file_range_queue(Connection* c, File* file, uint64_t offset, uint64_t length) noexcept nogil:
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


cdef int file_range_queue_memory(Connection* c, const uint8_t* data, uint64_t length) noexcept nogil:
    """The same for memory of the service, which stays as it is until on_sent or on_closed. 0 or -EBUSY."""
    cdef int result = file_range_queue(c, &c.core.memory_file, 0, length)
    if result == 0 and length:
        c.memory = data
        c.memory_sent = 0
        c.memory_cancelled = 0
    return result


cdef void file_range_drop(Connection* c) noexcept nogil:
    cdef File* file = c.file
    c.memory = NULL
    c.file = NULL
    c.file_remaining = 0
    file_release(file)


cdef bint file_unchanged(const File* file) noexcept nogil:
    cdef stat_ status
    if fstat(file.fd, &status) < 0:
        return False
    # A file that was replaced or removed meanwhile is served whole: its ctime tells of the name it lost.
    return (<uint64_t>status.st_size == file.size
            and status.st_mtim.tv_sec == file.mtime_s and <uint32_t>status.st_mtim.tv_nsec == file.mtime_ns
            and (<uint64_t>status.st_nlink != file.links
                 or (status.st_ctim.tv_sec == file.ctime_s
                     and <uint32_t>status.st_ctim.tv_nsec == file.ctime_ns)))


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
        if output_limited(c) or held + c.file_remaining + 2 * RECORD_OVERHEAD > BUFFER_SMALL_SIZE - BUFFER_TAIL:
            if c.memory != NULL and c.file_remaining > BUFFER_LARGE_SIZE:
                large = pool_take(&c.core.pool, BUFFER_BULK)
            if large == NULL:
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
    """Where the next bytes of the file go in ``output``: a piece per record, or one that is cut into small records afterwards. The number
    of pieces; their sum in ``total``."""
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
    if output_limited(c):
        piece = output_fit(c)
        if piece > left:
            piece = left
        vectors[0].iov_base = c.output.data + position + RECORD_HEADER + filled
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
    if output_limited(c):
        c.record_length += length
        if output_cut(c) < 0:
            return
    elif c.record_layer == RECORD_LAYER_USER:
        while left:
            piece = RECORD_PLAINTEXT_MAX - c.record_length
            if piece > capacity - c.output_length - RECORD_OVERHEAD - c.record_length:
                piece = capacity - c.output_length - RECORD_OVERHEAD - c.record_length
            if piece > left:
                piece = left
            c.record_length += piece
            left -= piece
            if left and output_seal(c, CONTENT_APPLICATION_DATA) < 0:
                return
    else:
        c.output_length += length
        c.core.counters.bytes_out += length
    if c.file_remaining == 0:
        if c.memory == NULL and not file_unchanged(c.file):
            connection_terminate(c, CLOSE_FILE, 0)
            return
        file_range_drop(c)


cdef bint resident(uint8_t* address, uint64_t length) noexcept nogil:
    """All pages of the window are in the page cache. ``address`` need not be the beginning of a page."""
    cdef unsigned char[130] pages
    cdef uint64_t skew = <uint64_t>address & (PAGE - 1)
    cdef uint64_t count = (skew + length + PAGE - 1) // PAGE
    cdef uint64_t i
    if mincore(address - skew, skew + length, pages) < 0:
        return False
    for i in range(count):
        if not pages[i] & 1:
            return False
    return True


cdef void window(Connection* c, const uint8_t* data, uint64_t length) noexcept nogil:
    c.window.data = <uint8_t*>data
    c.window.capacity = <uint32_t>length
    c.file_offset += length
    c.file_remaining -= length
    c.core.counters.bytes_out += length


cdef bint file_range_window(Connection* c) noexcept nogil:
    """Kernel layer: puts the next window of the mapping in ``window``, ready to be sent. False: the next bytes are to be read instead."""
    cdef File* file = c.file
    cdef uint64_t length = WINDOW
    cdef uint64_t end = file.size & ~<uint64_t>(PAGE - 1)
    if c.memory != NULL:
        if length > c.file_remaining:
            length = c.file_remaining
        window(c, c.memory + c.file_offset, length)
        return True
    if file.mapping == NULL or c.file_remaining < WINDOW_MIN or c.file_offset + WINDOW_MIN > end or file.mapping_size < end:
        return False
    if length > c.file_remaining:
        length = c.file_remaining
    if length > end - c.file_offset:
        length = end - c.file_offset
    if not resident(file.mapping + c.file_offset, length):
        return False
    if length == c.file_remaining and not file_unchanged(file):
        connection_terminate(c, CLOSE_FILE, 0)
        return False
    window(c, file.mapping + c.file_offset, length)
    return True


cdef void memory_fill(Connection* c) noexcept nogil:
    """User layer: seals the service's memory straight into the output. Whoever rewrites it meanwhile garbles his own bytes: each is read once, and the
    ciphertext is nobody else's."""
    cdef uint64_t piece
    if c.record_layer != RECORD_LAYER_USER:
        c.output_full = 1                          # sent from where it is, behind what is committed
        return
    if c.record_length and output_seal(c, CONTENT_APPLICATION_DATA) < 0:
        return
    while c.file_remaining:
        piece = c.file_remaining if c.file_remaining < c.record_content_max else c.record_content_max
        if c.output_length + RECORD_OVERHEAD + piece > output_capacity(c.output):
            break
        if output_seal_from(c, CONTENT_APPLICATION_DATA, c.memory + c.file_offset, <uint32_t>piece) < 0:
            return
        c.file_offset += piece
        c.file_remaining -= piece
    c.output_full = 1
    c.memory_sent = c.file_offset
    if c.file_remaining == 0:
        file_range_drop(c)


cdef void file_range_fill(Connection* c) noexcept nogil:
    """Reads the next batch into ``output``; may leave a READV outstanding."""
    cdef lu.iovec[10] vectors
    cdef lu.iovec* kept
    cdef uint32_t count, total
    cdef int64_t result
    cdef lu.io_uring_sqe* sqe
    if output_for_file(c) < 0:
        connection_terminate(c, CLOSE_RESOURCES, ENOMEM)
        return
    if c.memory != NULL:
        memory_fill(c)
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


cdef void file_range_read_done(Connection* c, int32_t result) noexcept nogil:
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
