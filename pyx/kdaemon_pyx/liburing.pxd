"""Declarations of liburing 2.3 (Debian 12's), and of newer io_uring constants that its headers do not have."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from posix.types cimport mode_t


cdef extern from "<liburing.h>" nogil:
    """
    /* Newer than Debian 12's liburing and kernel headers; values from linux/io_uring.h. */
    #ifndef IORING_CQE_F_SOCK_NONEMPTY
    #define IORING_CQE_F_SOCK_NONEMPTY (1U << 2)
    #endif
    #ifndef IORING_FEAT_RECVSEND_BUNDLE
    #define IORING_FEAT_RECVSEND_BUNDLE (1U << 14)
    #endif
    #ifndef IORING_FEAT_MIN_TIMEOUT
    #define IORING_FEAT_MIN_TIMEOUT (1U << 15)
    #endif

    /* liburing 2.3's io_uring_submit_and_wait_timeout with a least wait (Linux 6.12), of which it does not know yet: until min_wait_us have passed,
       only wait_nr completions end the wait; then one does. */
    static inline int kdaemon_uring_wait(struct io_uring *ring, int registered, unsigned wait_nr, struct __kernel_timespec *timeout, unsigned min_wait_us)
    {
        struct { __u64 sigmask; __u32 sigmask_size, min_wait_us; __u64 timeout; } arg = {0, _NSIG / 8, min_wait_us, (__u64)(size_t)timeout};
        unsigned flags = IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG | (registered ? 1U << 4 /* IORING_ENTER_REGISTERED_RING */ : 0);
        unsigned tail = ring->sq.sqe_tail;

        ring->sq.sqe_head = tail;
        __atomic_store_n(ring->sq.ktail, tail, __ATOMIC_RELEASE);    /* pair: the kernel's acquire of the tail, in io_uring_enter */
        return io_uring_enter2(ring->enter_ring_fd, tail - *(volatile unsigned *)ring->sq.khead, wait_nr, flags, (sigset_t *)&arg, sizeof arg);
    }
    """
    struct io_uring_sqe:
        uint8_t opcode
        uint8_t flags
        uint16_t ioprio
        int32_t fd
        uint64_t off
        uint64_t addr
        uint32_t len
        uint32_t msg_flags
        uint64_t user_data
        uint16_t buf_group

    struct io_uring_cqe:
        uint64_t user_data
        int32_t res
        uint32_t flags

    struct io_uring_params:
        uint32_t sq_entries
        uint32_t cq_entries
        uint32_t flags
        uint32_t features

    struct io_uring_sq:
        unsigned ring_entries
        unsigned sqe_head
        unsigned sqe_tail
        unsigned* kflags

    struct io_uring:
        io_uring_sq sq
        unsigned flags
        int ring_fd
        unsigned features

    struct io_uring_probe:
        uint8_t last_op

    struct io_uring_buf:
        uint64_t addr
        uint32_t len
        uint16_t bid

    struct io_uring_buf_ring:
        uint16_t tail

    struct io_uring_buf_reg:
        uint64_t ring_addr
        uint32_t ring_entries
        uint16_t bgid

    struct __kernel_timespec:
        int64_t tv_sec
        long long tv_nsec

    struct msghdr:
        void* msg_name
        uint32_t msg_namelen
        iovec* msg_iov
        size_t msg_iovlen
        void* msg_control
        size_t msg_controllen
        int msg_flags

    struct iovec:
        void* iov_base
        size_t iov_len

    struct sockaddr:
        pass

    unsigned IORING_SETUP_CQSIZE
    unsigned IORING_SETUP_CLAMP
    unsigned IORING_SETUP_SUBMIT_ALL
    unsigned IORING_SETUP_COOP_TASKRUN
    unsigned IORING_SETUP_SINGLE_ISSUER
    unsigned IORING_SETUP_DEFER_TASKRUN
    unsigned IORING_SETUP_TASKRUN_FLAG
    unsigned IORING_SQ_CQ_OVERFLOW
    unsigned IORING_SQ_TASKRUN
    unsigned IORING_FEAT_NODROP
    unsigned IORING_FEAT_EXT_ARG
    unsigned IORING_FEAT_MIN_TIMEOUT
    unsigned IORING_RECVSEND_POLL_FIRST
    unsigned IORING_RECV_MULTISHOT
    unsigned IORING_CQE_F_BUFFER
    unsigned IORING_CQE_F_MORE
    unsigned IORING_CQE_F_SOCK_NONEMPTY
    unsigned IORING_CQE_BUFFER_SHIFT
    unsigned IOSQE_BUFFER_SELECT
    unsigned IOSQE_CQE_SKIP_SUCCESS
    unsigned IOSQE_ASYNC
    unsigned IORING_ASYNC_CANCEL_ALL
    unsigned IORING_ASYNC_CANCEL_FD
    int IORING_OP_ACCEPT
    int IORING_OP_ASYNC_CANCEL
    int IORING_OP_CLOSE
    int IORING_OP_CONNECT
    int IORING_OP_READ
    int IORING_OP_READV
    int IORING_OP_RECV
    int IORING_OP_RECVMSG
    int IORING_OP_SEND
    int IORING_OP_SENDMSG
    int IORING_OP_SHUTDOWN
    int IORING_OP_WRITE

    int io_uring_queue_init_params(unsigned entries, io_uring* ring, io_uring_params* p)
    void io_uring_queue_exit(io_uring* ring)
    int io_uring_ring_dontfork(io_uring* ring)
    int io_uring_register_ring_fd(io_uring* ring)
    int kdaemon_uring_wait(io_uring* ring, int registered, unsigned wait_nr, __kernel_timespec* timeout, unsigned min_wait_us)
    io_uring_probe* io_uring_get_probe_ring(io_uring* ring)
    void io_uring_free_probe(io_uring_probe* probe)
    int io_uring_opcode_supported(const io_uring_probe* probe, int op)
    int io_uring_register_buf_ring(io_uring* ring, io_uring_buf_reg* reg, unsigned flags)
    int io_uring_unregister_buf_ring(io_uring* ring, int bgid)
    void io_uring_buf_ring_init(io_uring_buf_ring* br)
    int io_uring_buf_ring_mask(uint32_t ring_entries)
    void io_uring_buf_ring_add(io_uring_buf_ring* br, void* addr, unsigned len, unsigned short bid, int mask, int offset)
    void io_uring_buf_ring_advance(io_uring_buf_ring* br, int count)

    io_uring_sqe* io_uring_get_sqe(io_uring* ring)
    int io_uring_submit(io_uring* ring)
    int io_uring_submit_and_wait_timeout(
        io_uring* ring, io_uring_cqe** cqe_ptr, unsigned wait_nr, __kernel_timespec* ts, void* sigmask)
    int io_uring_submit_and_get_events(io_uring* ring)
    unsigned io_uring_sq_ready(const io_uring* ring)
    unsigned io_uring_peek_batch_cqe(io_uring* ring, io_uring_cqe** cqes, unsigned count)
    void io_uring_cq_advance(io_uring* ring, unsigned nr)

    void io_uring_prep_multishot_accept(io_uring_sqe* sqe, int fd, sockaddr* addr, uint32_t* addrlen, int flags)
    void io_uring_prep_connect(io_uring_sqe* sqe, int fd, const sockaddr* addr, uint32_t addrlen)
    void io_uring_prep_recv(io_uring_sqe* sqe, int fd, void* buf, size_t len, int flags)
    void io_uring_prep_recvmsg(io_uring_sqe* sqe, int fd, msghdr* msg, unsigned flags)
    void io_uring_prep_send(io_uring_sqe* sqe, int fd, const void* buf, size_t len, int flags)
    void io_uring_prep_sendmsg(io_uring_sqe* sqe, int fd, const msghdr* msg, unsigned flags)
    void io_uring_prep_read(io_uring_sqe* sqe, int fd, void* buf, unsigned nbytes, uint64_t offset)
    void io_uring_prep_readv(io_uring_sqe* sqe, int fd, const iovec* iovecs, unsigned nr_vecs, uint64_t offset)
    void io_uring_prep_write(io_uring_sqe* sqe, int fd, const void* buf, unsigned nbytes, uint64_t offset)
    void io_uring_prep_poll_add(io_uring_sqe* sqe, int fd, unsigned poll_mask)
    void io_uring_prep_timeout(io_uring_sqe* sqe, __kernel_timespec* ts, unsigned count, unsigned flags)
    void io_uring_prep_shutdown(io_uring_sqe* sqe, int fd, int how)
    void io_uring_prep_close(io_uring_sqe* sqe, int fd)
    void io_uring_prep_cancel64(io_uring_sqe* sqe, uint64_t user_data, int flags)
    void io_uring_prep_cancel_fd(io_uring_sqe* sqe, int fd, unsigned int flags)
    void io_uring_sqe_set_data64(io_uring_sqe* sqe, uint64_t data)
    void io_uring_sqe_set_flags(io_uring_sqe* sqe, unsigned flags)
