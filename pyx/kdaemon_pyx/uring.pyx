"""One io_uring instance and its ring of provided receive buffers.

Belongs to the thread that calls ``uring_setup``: SINGLE_ISSUER and DEFER_TASKRUN (Linux 6.1) bind it to that thread, and completions
are only produced inside ``uring_enter``.
"""

from libc.errno cimport EAGAIN, EBUSY, EINTR, EINVAL, ENOMEM, ENOSYS, ETIME
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap

cdef extern from "<sys/mman.h>" nogil:
    const int MADV_DONTNEED
    int madvise(void* address, size_t length, int advice)

from kdaemon_pyx cimport liburing as lu
from kdaemon_pyx.atomics cimport load_acquire_u32


cdef enum:
    HELD_MAX = 512                 # completions that end a held wait


cdef int uring_setup(Uring* u, uint32_t entries) noexcept nogil:
    """Makes the ring with the best set of flags that the kernel takes. Returns 0 or a negative errno (EPERM: io_uring_disabled or seccomp)."""
    cdef lu.io_uring_params params
    cdef uint32_t common = lu.IORING_SETUP_CLAMP | lu.IORING_SETUP_CQSIZE | lu.IORING_SETUP_SUBMIT_ALL | lu.IORING_SETUP_TASKRUN_FLAG
    cdef uint32_t[2] wanted
    cdef int i, result = -ENOSYS
    wanted[0] = lu.IORING_SETUP_SINGLE_ISSUER | lu.IORING_SETUP_DEFER_TASKRUN
    wanted[1] = lu.IORING_SETUP_COOP_TASKRUN
    memset(u, 0, sizeof(Uring))
    for i in range(2):
        memset(&params, 0, sizeof(params))
        params.flags = common | wanted[i]
        params.cq_entries = entries * 4
        result = lu.io_uring_queue_init_params(entries, &u.ring, &params)
        if result != -EINVAL:
            break
    if result < 0:
        return result
    u.setup_flags = params.flags
    u.features = params.features
    if not (params.features & lu.IORING_FEAT_NODROP) or not (params.features & lu.IORING_FEAT_EXT_ARG):
        lu.io_uring_queue_exit(&u.ring)
        return -ENOSYS
    lu.io_uring_ring_dontfork(&u.ring)
    # Saves the file look-up in every io_uring_enter; without it everything works all the same.
    u.registered = lu.io_uring_register_ring_fd(&u.ring) == 1
    return 0


cdef void uring_teardown(Uring* u) noexcept nogil:
    lu.io_uring_queue_exit(&u.ring)


cdef lu.io_uring_sqe* uring_sqe(Uring* u) noexcept nogil:
    """The next submission entry; submits when the queue is full. Never NULL: after a fatal error the preparation goes nowhere and
    ``u.error`` ends the loop, so that no caller needs a path of its own for what the engine cannot survive."""
    cdef lu.io_uring_sqe* sqe = lu.io_uring_get_sqe(&u.ring)
    cdef int result, _attempt
    if sqe != NULL:
        return sqe
    for _attempt in range(64):
        u.enters += 1
        # With DEFER_TASKRUN the kernel may ask for completions to be taken first (EBUSY after an overflow): get_events runs them.
        result = lu.io_uring_submit_and_get_events(&u.ring)
        sqe = lu.io_uring_get_sqe(&u.ring)
        if sqe != NULL:
            return sqe
        if result < 0 and result != -EBUSY and result != -EAGAIN and result != -EINTR:
            break
    u.error = result if result < 0 else -EBUSY
    return &u.scratch


cdef bint has_work(Uring* u) noexcept nogil:
    """The kernel has completions to produce, or to move out of the overflow list, in the next io_uring_enter."""
    # Pairs with the kernel's atomic set of the bit after it queued the work; one that is missed now is seen in the next turn.
    return (load_acquire_u32(<uint32_t*>u.ring.sq.kflags) & (lu.IORING_SQ_TASKRUN | lu.IORING_SQ_CQ_OVERFLOW)) != 0


cdef int uring_enter(Uring* u, bint wait, uint64_t timeout_ns, uint32_t hold_us) noexcept nogil:
    """Submits what is prepared and, if asked, waits for one completion or the timeout; for ``hold_us`` at least, unless HELD_MAX
    complete before (IORING_FEAT_MIN_TIMEOUT). Returns 0 or a negative errno that is fatal."""
    cdef lu.io_uring_cqe* cqe = NULL
    cdef lu.__kernel_timespec timeout
    cdef int result
    if not wait and not lu.io_uring_sq_ready(&u.ring) and not has_work(u):
        return u.error
    u.enters += 1
    if wait:
        timeout.tv_sec = <int64_t>(timeout_ns // 1000000000)
        timeout.tv_nsec = <long long>(timeout_ns % 1000000000)
        if hold_us:
            result = lu.kdaemon_uring_wait(&u.ring, u.registered, HELD_MAX, &timeout, hold_us)
        else:
            result = lu.io_uring_submit_and_wait_timeout(&u.ring, &cqe, 1, &timeout, NULL)
    else:
        result = lu.io_uring_submit_and_get_events(&u.ring)
    if result >= 0 or result == -ETIME or result == -EINTR or result == -EAGAIN or result == -EBUSY:
        return u.error
    return result


cdef uint32_t uring_peek(Uring* u, lu.io_uring_cqe** cqes, uint32_t count) noexcept nogil:
    return lu.io_uring_peek_batch_cqe(&u.ring, cqes, count)


cdef void uring_seen(Uring* u, uint32_t count) noexcept nogil:
    lu.io_uring_cq_advance(&u.ring, count)


cdef int receive_ring_setup(
        ReceiveRing* r, Uring* u, uint16_t group, uint32_t count, uint32_t buffer_size) noexcept nogil:
    """``count`` (a power of two) buffers of ``buffer_size`` bytes, first touched here, on the engine's CPU. 0 or a negative errno."""
    cdef lu.io_uring_buf_reg reg
    cdef void* memory
    cdef uint32_t i
    cdef int result
    memset(r, 0, sizeof(ReceiveRing))
    r.count = count
    r.buffer_size = buffer_size
    r.group = group
    r.ring_size = count * sizeof(lu.io_uring_buf)
    r.memory_size = <size_t>count * buffer_size
    memory = mmap(NULL, r.ring_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if memory == MAP_FAILED:
        return -ENOMEM
    r.ring = <lu.io_uring_buf_ring*>memory
    memory = mmap(NULL, r.memory_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if memory == MAP_FAILED:
        munmap(r.ring, r.ring_size)
        r.ring = NULL
        return -ENOMEM
    r.memory = <uint8_t*>memory
    lu.io_uring_buf_ring_init(r.ring)
    memset(&reg, 0, sizeof(reg))
    reg.ring_addr = <uint64_t>r.ring
    reg.ring_entries = count
    reg.bgid = group
    result = lu.io_uring_register_buf_ring(&u.ring, &reg, 0)
    if result < 0:
        munmap(r.memory, r.memory_size)
        munmap(r.ring, r.ring_size)
        r.ring = NULL
        return result
    for i in range(count):
        receive_ring_recycle(r, <uint16_t>i)
    receive_ring_publish(r)
    return 0


cdef void receive_ring_teardown(ReceiveRing* r, Uring* u) noexcept nogil:
    if r.ring == NULL:
        return
    lu.io_uring_unregister_buf_ring(&u.ring, r.group)
    munmap(r.memory, r.memory_size)
    munmap(r.ring, r.ring_size)
    r.ring = NULL


cdef uint8_t* receive_ring_buffer(ReceiveRing* r, uint16_t index) noexcept nogil:
    return r.memory + <size_t>index * r.buffer_size


cdef void receive_ring_rest(ReceiveRing* r) noexcept nogil:
    """Gives the buffers' pages back. Only while no receive is outstanding: the kernel could be filling one, or have filled it."""
    if r.resident:
        madvise(r.memory, r.memory_size, MADV_DONTNEED)
        r.resident = 0


cdef void receive_ring_recycle(ReceiveRing* r, uint16_t index) noexcept nogil:
    """Gives a buffer back; the kernel sees it after receive_ring_publish(), one release store per batch."""
    lu.io_uring_buf_ring_add(r.ring, receive_ring_buffer(r, index), r.buffer_size, index,
                             lu.io_uring_buf_ring_mask(r.count), r.added)
    r.added += 1


cdef void receive_ring_publish(ReceiveRing* r) noexcept nogil:
    if r.added:
        # liburing's advance is a release store of the tail; its pair is the kernel's acquire load when it selects a buffer.
        lu.io_uring_buf_ring_advance(r.ring, r.added)
        r.added = 0
