"""io_uring features, found by using them: what ``kdaemon doctor`` reports.

Every function returns 0 if the feature works, or the errno the kernel answered with. Each makes its own small uring, so that nothing is left behind
and no feature is judged by another's failure. Sockets come from the caller, who owns them. Thread-safe: no state.
"""

from libc.errno cimport EIO, ENOSYS, EOPNOTSUPP, ETIME
from libc.stdint cimport int32_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memset
from posix.stdlib cimport posix_memalign

from kdaemon_pyx cimport liburing as lu


cdef extern from *:
    """
    /* Newer than Debian 12's headers; values from linux/io_uring.h. */
    #define PROBE_OP_SEND_ZC 47
    #define PROBE_OP_URING_CMD 46
    #define PROBE_RECVSEND_BUNDLE (1U << 4)
    #define PROBE_SOCKET_URING_OP_SETSOCKOPT 3
    """
    int PROBE_OP_SEND_ZC
    int PROBE_OP_URING_CMD
    uint16_t PROBE_RECVSEND_BUNDLE
    uint32_t PROBE_SOCKET_URING_OP_SETSOCKOPT

# The flags of the engine's uring (uring.pyx), and the smallest set it can run with.
SETUP_ENGINE = (
    lu.IORING_SETUP_CLAMP | lu.IORING_SETUP_CQSIZE | lu.IORING_SETUP_SUBMIT_ALL
    | lu.IORING_SETUP_SINGLE_ISSUER | lu.IORING_SETUP_DEFER_TASKRUN
)
SETUP_LEAST = (
    lu.IORING_SETUP_CLAMP | lu.IORING_SETUP_CQSIZE | lu.IORING_SETUP_SUBMIT_ALL | lu.IORING_SETUP_COOP_TASKRUN
)
FEATURES_NEEDED = lu.IORING_FEAT_NODROP | lu.IORING_FEAT_EXT_ARG

# Operations the engine submits, by the names of linux/io_uring.h.
OPERATIONS = {
    "accept": lu.IORING_OP_ACCEPT,
    "async_cancel": lu.IORING_OP_ASYNC_CANCEL,
    "close": lu.IORING_OP_CLOSE,
    "connect": lu.IORING_OP_CONNECT,
    "read": lu.IORING_OP_READ,
    "readv": lu.IORING_OP_READV,
    "recv": lu.IORING_OP_RECV,
    "recvmsg": lu.IORING_OP_RECVMSG,
    "send": lu.IORING_OP_SEND,
    "sendmsg": lu.IORING_OP_SENDMSG,
    "shutdown": lu.IORING_OP_SHUTDOWN,
    "write": lu.IORING_OP_WRITE,
}

cdef enum:
    BUFFER_COUNT = 8
    BUFFER_SIZE = 256
    BUFFER_GROUP = 1
    PAGE = 4096


cdef int open_ring(lu.io_uring* ring) noexcept nogil:
    cdef lu.io_uring_params params
    memset(&params, 0, sizeof(params))
    return lu.io_uring_queue_init_params(8, ring, &params)


cdef int completion(lu.io_uring* ring, lu.io_uring_cqe* into) noexcept nogil:
    """Submits, waits at most two seconds for one completion and takes it. 0 or a negative errno."""
    cdef lu.__kernel_timespec timeout
    cdef lu.io_uring_cqe* cqe = NULL
    cdef int result
    timeout.tv_sec = 2
    timeout.tv_nsec = 0
    result = lu.io_uring_submit_and_wait_timeout(ring, &cqe, 1, &timeout, NULL)
    if result < 0:
        return result
    if cqe == NULL:
        return -ETIME
    into[0] = cqe[0]
    lu.io_uring_cq_advance(ring, 1)
    return 0


def setup(uint32_t flags):
    """(errno, features): whether io_uring_setup takes these flags, and the IORING_FEAT_* it answers with."""
    cdef lu.io_uring ring
    cdef lu.io_uring_params params
    cdef int result
    memset(&params, 0, sizeof(params))
    params.flags = flags
    if flags & lu.IORING_SETUP_CQSIZE:
        params.cq_entries = 32
    with nogil:
        result = lu.io_uring_queue_init_params(8, &ring, &params)
    if result < 0:
        return -result, 0
    lu.io_uring_queue_exit(&ring)
    return 0, params.features


def operations_missing():
    """Names of OPERATIONS that the kernel does not list (IORING_REGISTER_PROBE). Raises OSError without io_uring."""
    cdef lu.io_uring ring
    cdef lu.io_uring_probe* probe
    cdef int result = open_ring(&ring)
    if result < 0:
        raise OSError(-result, "io_uring_setup")
    probe = lu.io_uring_get_probe_ring(&ring)
    lu.io_uring_queue_exit(&ring)
    if probe == NULL:
        raise OSError(ENOSYS, "IORING_REGISTER_PROBE")
    try:
        return [name for name, operation in OPERATIONS.items() if not lu.io_uring_opcode_supported(probe, operation)]
    finally:
        lu.io_uring_free_probe(probe)


def multishot_accept(int listener, connect):
    """Two connections, made by calling ``connect()`` twice, must come from one submission."""
    cdef lu.io_uring ring
    cdef lu.io_uring_cqe cqe
    cdef lu.io_uring_sqe* sqe
    cdef int result = open_ring(&ring)
    if result < 0:
        return -result
    try:
        sqe = lu.io_uring_get_sqe(&ring)
        lu.io_uring_prep_multishot_accept(sqe, listener, NULL, NULL, 0)
        for _ in range(2):
            connect()
            result = completion(&ring, &cqe)
            if result < 0:
                return -result
            if cqe.res < 0:
                return -cqe.res
            close_fd(cqe.res)
            if not cqe.flags & lu.IORING_CQE_F_MORE:
                return EOPNOTSUPP
        return 0
    finally:
        lu.io_uring_queue_exit(&ring)


cdef int close_fd(int fd) except -1:
    import os
    os.close(fd)
    return 0


def receive(int receiver, write, bint multishot=False, bint bundle=False):
    """A receive into a ring of provided buffers; ``write(bytes)`` makes bytes arrive at ``receiver``."""
    cdef lu.io_uring ring
    cdef lu.io_uring_cqe cqe
    cdef lu.io_uring_sqe* sqe
    cdef lu.io_uring_buf_reg reg
    cdef void* memory = NULL
    cdef char* buffers
    cdef int i, result, rounds = 2 if multishot else 1
    if posix_memalign(&memory, PAGE, PAGE + BUFFER_COUNT * BUFFER_SIZE) != 0:
        raise MemoryError
    result = open_ring(&ring)
    if result < 0:
        free(memory)
        return -result
    try:
        buffers = <char*>memory + PAGE
        memset(&reg, 0, sizeof(reg))
        reg.ring_addr = <uint64_t>memory
        reg.ring_entries = BUFFER_COUNT
        reg.bgid = BUFFER_GROUP
        result = lu.io_uring_register_buf_ring(&ring, &reg, 0)
        if result < 0:
            return -result
        lu.io_uring_buf_ring_init(<lu.io_uring_buf_ring*>memory)
        for i in range(BUFFER_COUNT):
            lu.io_uring_buf_ring_add(
                <lu.io_uring_buf_ring*>memory, buffers + i * BUFFER_SIZE, BUFFER_SIZE, <unsigned short>i,
                lu.io_uring_buf_ring_mask(BUFFER_COUNT), i)
        lu.io_uring_buf_ring_advance(<lu.io_uring_buf_ring*>memory, BUFFER_COUNT)
        sqe = lu.io_uring_get_sqe(&ring)
        lu.io_uring_prep_recv(sqe, receiver, NULL, 0, 0)
        sqe.flags = <unsigned char>lu.IOSQE_BUFFER_SELECT
        sqe.buf_group = BUFFER_GROUP
        if multishot:
            sqe.ioprio |= <uint16_t>lu.IORING_RECV_MULTISHOT
        if bundle:
            sqe.ioprio |= PROBE_RECVSEND_BUNDLE
        for _ in range(rounds):
            write(b"kdaemon")
            result = completion(&ring, &cqe)
            if result < 0:
                return -result
            if cqe.res < 0:
                return -cqe.res
            if cqe.res != 7 or not cqe.flags & lu.IORING_CQE_F_BUFFER:
                return EIO
            if multishot and not cqe.flags & lu.IORING_CQE_F_MORE:
                return EOPNOTSUPP
        return 0
    finally:
        # The ring goes first: it is what could still write to the memory.
        lu.io_uring_queue_exit(&ring)
        free(memory)


def send_zc(int sender):
    """IORING_OP_SEND_ZC on a connected TCP socket: accepted, and the buffer given back by a notification."""
    cdef lu.io_uring ring
    cdef lu.io_uring_cqe cqe
    cdef lu.io_uring_sqe* sqe
    cdef char[8] data
    cdef int result = open_ring(&ring)
    if result < 0:
        return -result
    try:
        memset(data, 0, sizeof(data))
        sqe = lu.io_uring_get_sqe(&ring)
        lu.io_uring_prep_send(sqe, sender, data, sizeof(data), 0)
        sqe.opcode = <unsigned char>PROBE_OP_SEND_ZC
        result = completion(&ring, &cqe)
        if result == 0 and cqe.res < 0:
            result = cqe.res
        if result == 0 and cqe.flags & lu.IORING_CQE_F_MORE:
            result = completion(&ring, &cqe)
        return -result
    finally:
        lu.io_uring_queue_exit(&ring)


def socket_setsockopt(int sock, int level, int option, int value):
    """setsockopt as an operation (SOCKET_URING_OP_SETSOCKOPT)."""
    cdef lu.io_uring ring
    cdef lu.io_uring_cqe cqe
    cdef lu.io_uring_sqe* sqe
    cdef int32_t given = value
    cdef int result = open_ring(&ring)
    if result < 0:
        return -result
    try:
        sqe = lu.io_uring_get_sqe(&ring)
        lu.io_uring_prep_shutdown(sqe, sock, 0)  # for its zeroes
        sqe.opcode = <unsigned char>PROBE_OP_URING_CMD
        # struct io_uring_sqe of newer headers: cmd_op at 8, level at 16, optname at 20, optlen at 44, optval at 48.
        (<uint32_t*>(<char*>sqe + 8))[0] = PROBE_SOCKET_URING_OP_SETSOCKOPT
        (<uint32_t*>(<char*>sqe + 16))[0] = <uint32_t>level
        (<uint32_t*>(<char*>sqe + 20))[0] = <uint32_t>option
        (<uint32_t*>(<char*>sqe + 44))[0] = sizeof(given)
        (<uint64_t*>(<char*>sqe + 48))[0] = <uint64_t>&given
        result = completion(&ring, &cqe)
        return -result if result < 0 else (-cqe.res if cqe.res < 0 else 0)
    finally:
        lu.io_uring_queue_exit(&ring)
