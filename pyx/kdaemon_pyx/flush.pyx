"""Kernel record layer: whether TCP has all that was sent, asked before FIN and CLOSE.

A send over kTLS completes with what was encrypted; what TCP had no room for waits in the kernel's record layer, which gives no notice of it,
and a FIN or CLOSE right then overtakes it.
"""

from libc.errno cimport errno
from libc.stdint cimport int32_t, uint64_t

from kdaemon_pyx cimport liburing as lu
from kdaemon_pyx.core cimport (
    FLUSH_DONE, FLUSH_ROOM, FLUSH_UNKNOWN, FLUSH_WAITING_ROOM, FLUSH_WAITING_TIME, OPERATION_FLUSH, RECORD_LAYER_KERNEL, Connection)
from kdaemon_pyx.ktls cimport ktls_transmit_sequence
from kdaemon_pyx.lifecycle cimport operation_data
from kdaemon_pyx.record cimport RECORD_OVERHEAD
from kdaemon_pyx.uring cimport uring_sqe


cdef extern from "<sys/socket.h>" nogil:
    int getsockopt(int fd, int level, int name, void* value, unsigned int* length)

cdef extern from "<poll.h>" nogil:
    unsigned POLLOUT
    int POLLERR
    int POLLHUP

cdef extern from "<netinet/in.h>" nogil:
    int IPPROTO_TCP

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, void* argument)

cdef extern from "<linux/sockios.h>" nogil:
    unsigned long SIOCOUTQ

cdef extern from "<linux/tcp.h>" nogil:
    struct tcp_info:
        uint64_t tcpi_bytes_acked
    int TCP_INFO


cdef lu.__kernel_timespec FLUSH_PAUSE
FLUSH_PAUSE.tv_sec = 0
FLUSH_PAUSE.tv_nsec = 2_000_000


cdef int tcp_given(int fd, uint64_t* length) noexcept nogil:
    """Bytes that TCP has ever been given on this socket, but for a constant: acknowledged or in its queue. 0 or a negative errno."""
    cdef tcp_info information
    cdef unsigned int size = sizeof(information)
    cdef int queued = 0
    information.tcpi_bytes_acked = 0
    # In this order: an acknowledgement in between makes the sum too small, never too large.
    if getsockopt(fd, IPPROTO_TCP, TCP_INFO, &information, &size) < 0 or ioctl(fd, SIOCOUTQ, &queued) < 0:
        return -errno
    length[0] = information.tcpi_bytes_acked + <uint64_t>queued
    return 0


cdef void flush_begin(Connection* c) noexcept nogil:
    """The keys are installed and nothing has been sent under them: notes where TCP stands, if they are the kernel's."""
    cdef uint64_t given = 0
    if c.record_layer != RECORD_LAYER_KERNEL:
        return
    if tcp_given(c.fd, &given) < 0:
        c.flush = FLUSH_DONE                               # as if it never held anything back
    c.kernel_tx_expected = given
    c.kernel_tx_sequence = c.kernel_tx_records


cdef bint flush_complete(Connection* c) noexcept nogil:
    """Kernel layer, everything is sent and the last record closed: does TCP have it all? If not, the connection is marked when it may.

    A send completes with what was encrypted; what TCP had no room for waits in the kernel's record layer, which gives no notice of it. But
    the length of it all is known: what was sent, and the overhead of each record, which the record number tells the number of.
    """
    cdef lu.io_uring_sqe* sqe
    cdef uint64_t sequence = 0
    cdef uint64_t given = 0
    if c.record_layer != RECORD_LAYER_KERNEL or c.flush == FLUSH_DONE:
        return True
    if c.flush == FLUSH_WAITING_ROOM or c.flush == FLUSH_WAITING_TIME:
        return False
    if (ktls_transmit_sequence(c.fd, c.secrets.cipher_suite, &sequence) < 0 or tcp_given(c.fd, &given) < 0
            or given >= c.kernel_tx_expected + (sequence - c.kernel_tx_sequence) * RECORD_OVERHEAD):
        c.flush = FLUSH_DONE
        return True
    c.core.counters.flush_waits += 1
    sqe = uring_sqe(&c.core.uring)
    if c.flush == FLUSH_UNKNOWN:
        c.flush = FLUSH_WAITING_ROOM
        lu.io_uring_prep_poll_add(sqe, c.fd, POLLOUT)
    else:
        c.flush = FLUSH_WAITING_TIME                       # there is room, and the kernel's worker has not run yet
        lu.io_uring_prep_timeout(sqe, &FLUSH_PAUSE, 0, 0)
    lu.io_uring_sqe_set_data64(sqe, operation_data(c, OPERATION_FLUSH))
    c.operations += 1
    c.send_deadline_ns = c.core.now_ns + c.core.deadlines.send_ns
    return False


cdef void flush_done(Connection* c, int32_t result) noexcept nogil:
    """Completion of FLUSH."""
    if c.flush == FLUSH_WAITING_TIME:
        c.flush = FLUSH_UNKNOWN
    elif result < 0 or result & (POLLERR | POLLHUP):
        c.flush = FLUSH_DONE                               # nobody will take it any more
    else:
        c.flush = FLUSH_ROOM
    c.send_deadline_ns = 0
